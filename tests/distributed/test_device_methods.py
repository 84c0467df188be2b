"""The training methods and their outliers are alike on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CLASSES, Net, assert_trees_close, unit

from oal_jax.aot import costs
from oal_jax.config import Config, Knn
from oal_jax.methods import ce, registry, student
from oal_jax.runtime import artifacts, distributed
from oal_jax.stages import generator, outliers
from oal_jax.stages.context import Context
from oal_jax.training.state import init_state, make_train_step, split

KEY, IMAGE, NET = jax.random.key(5), (6, 6, 1), Net(feature_width=8)


def mesh_of(size):
    axes = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((size, 1), ("data", "model"), axes, devices=jax.devices()[:size])


def method_of(name):
    """(method, batch) of a name of the registry, made as stage `train` makes it."""
    config = Config()
    config.method.name, config.outliers.source = name, "diffusion"
    config.outliers.image_share = 0.5
    config.teacher.width = 6
    for options in (config.method.vos, config.method.npos):
        options.queue_size, options.start = 4, 0.0
    config.method.vos.samples = 16
    npos = config.method.npos
    npos.candidates, npos.neighbour, npos.boundary_points, npos.per_anchor = 8, 2, 4, 2
    rng, rows, latent = np.random.default_rng(0), 16, (5, 5, 4)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    uniform = lambda count: rng.uniform(size=(count, *IMAGE)).astype(np.float32)
    batch = {
        "image": uniform(rows),
        "label": (np.arange(rows) % CLASSES).astype(np.int32),
        "teacher_logits": normal(rows, CLASSES),
        "teacher_features": normal(rows, 6),
        "latent": normal(rows, *latent),
        "outlier": normal(rows, 6),
        "outlier_latent": normal(rows, *latent),
        "outlier_image": uniform(rows // 2),
        "wild_image": uniform(rows),
    }
    parts = registry.Parts(
        config,
        NET,
        IMAGE,
        shapes={"latent": (rows, *latent)},
        steps=10,
        epoch_steps=5,
        start_loss=1.0,
        ce_transform=None,
    )
    return registry.build(parts, constraint=0.5), batch


def two_steps(name, size):
    """State and metrics after two steps on `size` devices."""
    method, batch = method_of(name)
    mesh, optimizer = mesh_of(size), optax.sgd(0.01, momentum=0.9)
    step = jax.jit(make_train_step(method, optimizer, KEY))
    state = init_state(method, optimizer, KEY, mesh)
    batch = distributed.place(batch, distributed.over_data(mesh))
    assert len(batch["image"].addressable_shards) == size
    for _ in range(2):
        state, metrics = step(state, batch)
    return jax.device_get((state, metrics))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [n if n == "oal" else slow(n) for n in registry.METHODS])
def test_a_method_is_alike_on_one_and_four_devices(name):
    assert_trees_close(two_steps(name, 1), two_steps(name, 4), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("unroll", [True, False])
def test_microbatches_stay_spread_over_the_devices(unroll):
    mesh = mesh_of(4)
    batch = {"image": jnp.arange(16.0).reshape(16, 1, 1, 1)}
    parts = jax.jit(lambda b: split(distributed.shard_batch(b, mesh), 2))(batch)["image"]
    assert parts.shape == (2, 8, 1, 1, 1)
    for shard in parts.addressable_shards:
        assert shard.data.shape == (2, 2, 1, 1, 1)
        first = shard.index[1].start * 2  # of the device's rows in the batch
        rows = np.asarray(shard.data).reshape(2, 2)
        np.testing.assert_array_equal(rows, first + np.array([[0, 2], [1, 3]]))

    method, optimizer = ce.cross_entropy(NET, IMAGE), optax.sgd(1.0)
    _, batch = method_of("ce")
    step = make_train_step(method, optimizer, KEY, 2, unroll)
    spread = jax.jit(lambda s, b: step(s, distributed.shard_batch(b, mesh)))
    state = init_state(method, optimizer, KEY)
    arguments = distributed.replicate((state, batch), mesh)
    text = spread.lower(*arguments).compile().as_text()
    assert "all-reduce" in text
    assert not [n for n in ("all-gather", "all-to-all", "collective-permute") if n in text]
    assert_trees_close(spread(*arguments), jax.jit(step)(state, batch), atol=1e-5)


def test_joining_two_split_batches_sends_nothing():
    rows = distributed.over_data(mesh_of(4))
    batches = [jax.ShapeDtypeStruct((n, 5), jnp.float32, sharding=rows) for n in (8, 12)]

    def sent(join, separate):
        def function(a, b):
            joined = jax.lax.with_sharding_constraint(2 * join(a, b), rows)
            return [jax.lax.with_sharding_constraint(part, rows) for part in separate(joined)]

        text = jax.jit(function).lower(*batches).compile().as_text()
        return costs.collectives(text)

    assert sent(student.join, lambda x: student.separate(x, 8)) == {}
    assert sent(lambda *both: jnp.concatenate(both), lambda x: (x[:8], x[8:])) != {}


def test_devices_share_out_the_classes_of_the_outliers(tmp_path, monkeypatch):
    """Three classes on one, two and four devices, which do not divide them."""
    monkeypatch.setattr(generator, "token_norms", lambda context: np.ones(3, np.float32))
    config = Config()
    config.outliers.knn = Knn(
        features_per_class=30,
        neighbour=9,
        boundary_points=6,
        anchors=5,
        noise_rows=20,
        repeats=2,
    )
    labels = np.repeat(np.arange(3, dtype=np.int32), 35)
    features = unit(np.random.default_rng(0).normal(size=(105, 12)) + 3 * np.eye(12)[labels])
    tensors = {"features": features.astype(np.float32), "labels": labels}
    written = []
    for size in (1, 2, 4):
        context = Context(config, tmp_path / str(size), mesh_of(size), KEY)
        artifacts.write_tensors(context.directory("features") / "features.safetensors", tensors)
        (path,) = outliers.run(context)
        written.append(artifacts.read_tensors(path)["outliers"])
    for other in written[1:]:
        np.testing.assert_allclose(other, written[0], atol=1e-6)
