"""One program on any devices: meshes, shardings, the same draws and results, elastic restore."""

import logging
import shutil
import sys
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLASSES, Net
from jax.sharding import PartitionSpec

from oal_jax import main
from oal_jax import scores as post_hoc
from oal_jax.config import Config
from oal_jax.data.augment import augment
from oal_jax.errors import UserError
from oal_jax.generator import attention, conditioning
from oal_jax.methods import ce
from oal_jax.outliers import knn
from oal_jax.runtime import artifacts, batched, distributed, preemption, processes
from oal_jax.scores import Head, Outputs
from oal_jax.scores.forward import make_forward
from oal_jax.stages import generator, latents
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context
from oal_jax.training import arrays as streams
from oal_jax.training import loop
from oal_jax.training.checkpoints import Checkpoints
from oal_jax.training.optimizer import grouped_sgd
from oal_jax.training.state import init_state, make_train_step

KEY = jax.random.key(5)
SIZES = (1, 2, 4)
QUICK = {"xla_backend_optimization_level": 0}  # the programs are tiny: compiling is the cost
IMAGE = (6, 6, 1)


def mesh_of(data, model=1):
    axes = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axes, devices=devices)


def test_a_mesh_has_all_devices():
    assert dict(distributed.make_mesh().shape) == {"data": 4, "model": 1}
    assert dict(distributed.make_mesh(2).shape) == {"data": 2, "model": 2}
    assert dict(distributed.make_mesh(4).shape) == {"data": 1, "model": 4}
    for model, near in ((3, 2), (8, 4), (0, 1)):
        with pytest.raises(
            UserError, match=rf"mesh.model={model} must divide the 4 devices .* example {near}"
        ):
            distributed.make_mesh(model)


def test_large_tensors_alone_are_split():
    shapes = {
        "kernel": jax.ShapeDtypeStruct((3, 3, 512, 1024), jnp.float32),
        "square": jax.ShapeDtypeStruct((512, 512), jnp.float32),
        "odd": jax.ShapeDtypeStruct((1001, 999), jnp.float32),
        "bias": jax.ShapeDtypeStruct((1024,), jnp.float32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    specs = jax.tree.map(lambda s: s.spec, distributed.shardings(shapes, mesh_of(2, 2)))
    assert specs == {
        "kernel": PartitionSpec(None, None, None, "model"),
        "square": PartitionSpec(None, "model"),
        "odd": PartitionSpec(),
        "bias": PartitionSpec(),
        "step": PartitionSpec(),
    }
    whole = distributed.shardings(shapes, mesh_of(4))
    assert {s.spec for s in jax.tree.leaves(whole)} == {PartitionSpec()}


def test_is_finite_reads_every_float():
    good = {"a": jnp.ones((4, 2)), "n": jnp.array([1]), "half": jnp.ones(3, jnp.bfloat16)}
    assert distributed.is_finite(good)
    for name, value in (("a", np.nan), ("half", -np.inf)):
        bad = np.array(good[name])
        bad[-1] = value
        assert not distributed.is_finite(good | {name: jax.device_put(bad)})
        spread = np.ones((8, 2), np.float32)
        spread[7] = value
        assert not distributed.is_finite({"x": distributed.place(spread, rows_over(4))})


def rows_over(size):
    return distributed.over_data(mesh_of(size))


def test_one_process_is_the_first_and_waits_for_nobody():
    assert processes.is_main() and not processes.several() and processes.index() == 0
    assert processes.on_main(lambda: {"a": (1, 2)}) == {"a": (1, 2)}  # as it is, not through JSON
    processes.wait_for_all()
    assert distributed.all_processes(True) and not distributed.all_processes(False)
    assert bool(preemption.any_process(True, distributed.make_mesh()))
    with processes.only_main_prints():
        assert sys.stdout is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("host", 2, 0), "--coordinator 'host' must be HOST:PORT"),
        ((":1234", 2, 0), "--coordinator ':1234' must be HOST:PORT"),
        (("host:0", 2, 0), "must be HOST:PORT, such as 10.0.0.1:1234"),
        (("host:65536", 2, 0), "must be HOST:PORT"),
        (("host:x", 2, 0), "must be HOST:PORT"),
        (("host:1", 0, 0), "--num-processes 0 must be at least 1"),
        (("host:1", 2, 2), "--process-id 2 must lie in 0..1"),
        (("host:1", 2, -1), "--process-id -1 must lie in 0..1"),
        ((None, 2, 0), "go together: give all"),
    ],
)
def test_impossible_processes_are_refused(arguments, said):
    with pytest.raises(UserError) as refused:
        distributed.initialize(*arguments)
    assert said in str(refused.value)


def test_no_time_to_join_is_refused():
    for name in ("join", "heartbeat"):
        with pytest.raises(UserError, match=f"--{name}-timeout 0 must be at least 1"):
            distributed.initialize("host:1", 2, 1, **{f"{name}_timeout": 0})
    distributed.initialize()  # nothing given: nothing to join


# What every draw of the project is made of, on a batch that is split over the devices.
def draws(mesh):
    images = jax.random.randint(KEY, (8, 12, 12, 3), 0, 256, jnp.int32).astype(jnp.uint8)

    @partial(jax.jit, compiler_options=QUICK)
    def drawn(images):
        images = distributed.shard_batch(images, mesh)
        rows = jnp.arange(8)
        return distributed.shard_batch(
            {
                "augmented": augment(KEY, images, rows, rows, shift=2, flip=True),
                "normal": jax.random.normal(KEY, (8, 5)),
                "rows": jax.random.choice(KEY, 100, (8,), replace=False),
                "directions": knn.sample_random(KEY, 8, 7),
                "permutation": jax.random.permutation(KEY, 64).reshape(8, 8),
                "bernoulli": jax.random.bernoulli(KEY, 0.3, (8, 50)),
            },
            mesh,
        )

    return jax.tree.map(np.asarray, drawn(distributed.replicate(images, mesh)))


def test_draws_are_the_same_bits_on_any_number_of_devices():
    assert jax.config.jax_threefry_partitionable
    one, *others = (draws(mesh_of(size)) for size in SIZES)
    for other in others:
        for name, values in one.items():
            if name == "directions":  # a sum for the length: its order is the compiler's choice
                np.testing.assert_allclose(other[name], values, rtol=1e-6)
            else:
                np.testing.assert_array_equal(other[name], values, err_msg=name)


PLAN = loop.Plan(examples=26, batch_size=8, epochs=2, log_every=2)
NET = Net(feature_width=8)


def sgd(groups, rate):
    settings = {"momentum": 0.9, "weight_decay": 5e-4, "clip": 1.0}
    return grouped_sgd(
        dict.fromkeys(groups, rate), steps=PLAN.steps, warmup=0.1, floor=0.0, **settings
    )


def images_of(count):
    return np.random.default_rng(0).integers(0, 256, (count, *IMAGE), np.uint8)


class Trained(NamedTuple):
    logged: np.ndarray  # (step, loss, norm of the gradient)
    state: Any
    outputs: list[np.ndarray]  # of all images, the last batch of them not full


def labels_of(count):
    return (np.arange(count) % CLASSES).astype(np.int32)


@contextmanager
def streamed(step):
    """The batches that the training below draws in memory."""

    def batches(step):
        while True:
            order = loop.epoch_order(KEY, step // PLAN.steps_per_epoch, PLAN)
            index = np.asarray(order)[step % PLAN.steps_per_epoch]
            images, labels = images_of(PLAN.examples)[index], labels_of(PLAN.examples)[index]
            yield {"index": index, "image": images, "label": labels}
            step += 1

    yield batches(step)


def train(mesh, plan=PLAN, checkpoints=None, **options) -> Trained:
    """Train a small classifier through the loop, on as many devices as the mesh has."""
    images, arrays = images_of(plan.examples), {}
    if "rows" not in options:
        arrays = {"images": images, "labels": labels_of(plan.examples)}
    method = ce.cross_entropy(NET, IMAGE)
    optimizer = sgd(["student"], 0.05)
    state = init_state(method, optimizer, KEY, mesh)
    state = (checkpoints and checkpoints.restore(state)) or state

    def make_batch(arrays, indices, epoch, step):
        del step
        views = jnp.broadcast_to(epoch, indices.shape)
        stored, labels = streams.drawn(arrays, indices)
        return {"image": augment(KEY, stored, indices, views, shift=1, flip=True), "label": labels}

    logged = []

    class Log:
        def write(self, step, metrics):
            logged.append((step, metrics["loss"], metrics["gradient_norm"]))

        def sync(self):
            pass

    state = loop.fit(
        make_train_step(method, optimizer, KEY),
        state,
        arrays,
        make_batch,
        plan,
        key=KEY,
        mesh=mesh,
        name="tiny",
        log=Log(),
        checkpoints=checkpoints,
        **options,
    )
    variables = {"params": state.params["student"], **state.model_state["student"]}
    forward = make_forward(NET, variables, ("features",))
    outputs = post_hoc.compute(forward, images, 8, ("features",), mesh)
    return Trained(np.array(logged), state, [outputs.logits, outputs.features])


def assert_alike(one: Trained, other: Trained) -> None:
    np.testing.assert_allclose(other.logged, one.logged, rtol=5e-4)
    states = [jax.tree.map(distributed.to_host, trained.state) for trained in (one, other)]
    chex.assert_trees_all_close(*states, rtol=5e-4, atol=1e-5)
    for a, b in zip(one.outputs, other.outputs, strict=True):
        assert len(a) == len(b) == PLAN.examples
        np.testing.assert_allclose(b, a, rtol=5e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained_on_one():
    return train(mesh_of(1))


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_training_and_evaluation_are_alike_on_any_number_of_devices(trained_on_one, size):
    assert_alike(trained_on_one, train(mesh_of(size)))


# In memory calls of two steps and, at the end of an epoch, of one.
RHYTHMS = {"memory": ({"steps_per_call": 2}, 2), "stream": ({"rows": streamed}, 1)}


@pytest.mark.parametrize("kind", RHYTHMS)
def test_after_the_first_epoch_nothing_is_compiled(kind, trained_on_one, monkeypatch, caplog):
    made, at_epoch, (options, lengths) = [], [], RHYTHMS[kind]
    compile_step = loop.compile_step

    def noted(*arguments, **more):
        made.append(compile_step(*arguments, **more))
        return made[-1]

    def evaluate(_):
        at_epoch.append(sum(r.getMessage().startswith("Compiling") for r in caplog.records))
        return {}

    monkeypatch.setattr(loop, "compile_step", noted)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        trained = train(mesh_of(4), evaluate=evaluate, **options)
    assert [step._cache_size() for step in made] == [1] * lengths
    assert len(at_epoch) == PLAN.epochs == 2 and at_epoch[0] == at_epoch[1] >= lengths
    assert_alike(trained_on_one, trained)


@pytest.fixture
def split_small(monkeypatch):
    """Tensors of a few elements are split as large ones are."""
    monkeypatch.setattr(distributed, "_SPLIT_FROM", 8)


def test_training_is_alike_with_split_parameters(trained_on_one, split_small):
    other = train(mesh_of(2, 2))
    assert_alike(trained_on_one, other)
    # They were made split, and stayed so, the momentum with them.
    kernels = [x for x in jax.tree.leaves(other.state) if x.shape == (3, 3, 1, 8)]
    assert len(kernels) == 2
    for kernel in kernels:
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 1, 4)}


@pytest.mark.slow
def test_the_generator_samples_alike_with_split_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_SPLIT_FROM", 4096)
    config, sampled = Config(), []
    config.latents.steps, config.latents.chunk = 4, 8
    for model in (1, 2):
        context = Context(config, tmp_path, distributed.make_mesh(model), KEY)
        sd, params = generator.load(context)
        where = jax.tree.leaves(distributed.shardings(params, context.mesh))
        assert sum("model" in s.spec for s in where) == (0 if model == 1 else 79)
        tokens = conditioning.class_tokens(sd, generator.class_words(context))
        vectors = np.random.default_rng(0).normal(size=(8, sd.text_width)).astype(np.float32)
        labels, indices = np.arange(8, dtype=np.int32), np.arange(8, dtype=np.uint32)
        sample = latents.sampling(context, sd)
        placed = distributed.place_parameters(params, context.mesh)
        sampled.append(sample(placed, *tokens, vectors, labels, indices))
    np.testing.assert_allclose(sampled[1], sampled[0], rtol=1e-4, atol=1e-4)


def test_blockwise_attention_leaves_a_batch_on_its_devices():
    rows = distributed.over_data(distributed.make_mesh())
    shape = (len(jax.devices()), 128, 2, 8)
    arrays = [jax.random.normal(key, shape) for key in jax.random.split(KEY, 3)]
    program = jax.jit(attention.blockwise, in_shardings=rows, out_shardings=rows)
    compiled = program.lower(*arrays).compile()
    assert "all-gather" not in compiled.as_text()
    mixed = compiled(*jax.device_put(arrays, rows))
    np.testing.assert_allclose(mixed, jax.jit(attention.whole)(*arrays), atol=2e-6)


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A directory with a checkpoint of the first epoch, of split parameters; and that state."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch, closing(Checkpoints(directory)) as checkpoints:
        patch.setattr(distributed, "_SPLIT_FROM", 8)
        return directory, train(mesh_of(2, 2), PLAN._replace(epochs=1), checkpoints).state


@pytest.mark.parametrize("onto", [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_a_checkpoint_is_read_onto_other_devices(half_way, split_small, onto):
    directory, saved = half_way
    like = distributed.place_parameters(jax.tree.map(np.zeros_like, saved), mesh_of(*onto))
    with closing(Checkpoints(directory)) as checkpoints:
        state = checkpoints.restore(like)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(saved))
    assert jax.tree.map(lambda x: x.sharding, state) == distributed.shardings(like, mesh_of(*onto))


@pytest.mark.slow
def test_a_training_goes_on_on_other_devices(half_way, trained_on_one, tmp_path):
    directory, saved = half_way
    shutil.copytree(directory, tmp_path / "checkpoints")
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        other = train(mesh_of(4), PLAN, checkpoints)
    rows = trained_on_one.logged
    assert_alike(trained_on_one._replace(logged=rows[rows[:, 0] > int(saved.step)]), other)


SCORES = ("energy", "knn", "mahalanobis", "react")


def scores_of(mesh):
    """Outputs of 21 images in batches of 8, and what scores fitted on them say."""
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(np.prod(IMAGE), 12)).astype(np.float32)
    head = Head(rng.normal(size=(12, CLASSES)).astype(np.float32), np.ones(CLASSES, np.float32))

    def forward(images):
        features = jax.nn.relu(images.reshape(len(images), -1) / 255 @ kernel)
        return Outputs(features @ head.kernel + head.bias[None], features)

    images = images_of(81)
    outputs = post_hoc.compute(forward, images[:60], 8, ("features",), mesh)
    others = post_hoc.compute(forward, images[60:], 8, ("features",), mesh)
    assert others.logits.shape == (21, CLASSES)
    found = {"logits": others.logits}
    for name in SCORES:
        score = post_hoc.make(name)
        state = post_hoc.fit(score, outputs, np.arange(60) % CLASSES, head, mesh=mesh)
        found[name] = post_hoc.apply(score, state, others, 8, mesh=mesh)
        assert found[name].shape == (21,)
    return found


def test_scores_are_alike_on_any_number_of_devices():
    one, four = (scores_of(mesh_of(size)) for size in (1, 4))
    for name, values in one.items():
        np.testing.assert_allclose(four[name], values, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("size", [1, 4])
def test_batches_are_split_over_the_devices(size):
    mesh, images = mesh_of(size), np.arange(30, dtype=np.float32).reshape(10, 3)
    assert batched.rows_per_batch(6, mesh) == {1: 6, 4: 8}[size]
    for batch, _ in batched.batches([images], 6, mesh):
        assert {shard.data.shape for shard in batch.addressable_shards} == {({1: 6, 4: 2}[size], 3)}
    result = batched.apply(jax.jit(lambda x: 2 * x), [images], 6, mesh)
    np.testing.assert_array_equal(result, 2 * images)


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path, capsys):
    mesh = mesh_of(4)
    distributed.check_batch("train.batch_size", 128, mesh)
    with pytest.raises(UserError, match="batch_size=129 .* 4 devices"):
        distributed.check_batch("train.batch_size", 129, mesh)
    flags = ["--config.smoke", "--config.method.name=ce", "--config.train.batch_size=129"]
    config = str(Path(__file__).parents[2] / "configs" / "fashion.py")
    argv = ["main", "--config", config, "--workdir", str(tmp_path), *flags]
    assert main.guard(main.run, argv) == 2
    assert "train.batch_size=129" in capsys.readouterr().err
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_a_run_goes_on_with_its_devices_laid_out_otherwise(tmp_path, monkeypatch):
    """With stages that write one small file each in place of the real ones."""
    ran = []

    def stage(path):
        name = path.rpartition(".")[2]

        def run(context):
            ran.append(name)
            file = context.directory(name) / "out.safetensors"
            artifacts.write_tensors(file, {"x": np.zeros(1)})
            return [file]

        return SimpleNamespace(run=run)

    def run_on(model):
        ran.clear()
        config = Config()
        config.mesh.model = model
        pipeline.run(config, tmp_path)
        return list(ran)

    monkeypatch.setattr(pipeline, "import_module", stage)
    assert run_on(1)
    flat = artifacts.read_json(tmp_path / "config.json")
    del flat["mesh.model"]
    artifacts.write_json(tmp_path / "config.json", flat)  # as before there was such a key
    assert run_on(2) == []
    assert pipeline.resolve(tmp_path).mesh.shape["model"] == 1  # a reader's devices are its own
    with pytest.raises(UserError, match="mesh.model=3 must divide the 4 devices"):
        run_on(3)
