"""What the student's batches hold: which images, in which range, drawn how, and what is refused."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Net, changed, form, refusal

from oal_jax.config import Config, Data, Method
from oal_jax.config.rules import validate
from oal_jax.data import procedural, sources
from oal_jax.data.image_files import Decoding
from oal_jax.data.info import DatasetInfo
from oal_jax.methods import registry
from oal_jax.outliers import pools
from oal_jax.runtime import artifacts, distributed
from oal_jax.scores import compute
from oal_jax.stages import batches, teacher, train
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context
from oal_jax.training.state import fresh_state, make_train_step

SHAPE, IMAGES, ROWS = (28, 28, 1), 64, 16
NO_LABELS = np.zeros(3, np.int32), ("ood",)


@pytest.fixture(autouse=True, scope="module")
def read_once():
    """Every set is read, or drawn, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oal_jax.stages.context.read_set", functools.cache(sources.read_set))
        yield


def context_of(tmp_path, method, images="procedural", shift=2, flip=True):
    """A smoke-sized run on a few of the embedded images."""
    settings = Config(
        smoke=True,  # 200 outlier images
        data=Data(train_images=IMAGES, shift=shift, flip=flip),
        method=method,
    )
    settings.outliers.images = images
    return Context(settings, tmp_path, distributed.make_mesh(), jax.random.key(0))


def batches_of(context, arrays=None, steps=(0,), rows=ROWS):
    """(arrays, the batch of each step), the batches drawn inside jit as the loop does."""
    if arrays is None:
        arrays = batches.make_arrays(context, batches.labelled_images(context))
    make_batch = batches.make_batches(context, net=None)
    draw = jax.jit(lambda arrays, step: make_batch(arrays, jnp.arange(rows), 0, step))
    held = jax.tree.map(jnp.asarray, arrays)
    return arrays, [jax.device_get(draw(held, step)) for step in steps]


METHODS = {
    "oe": (Method(name="oe"), {"outlier_image": 16}),
    "energy, fewer outliers": (Method(name="energy", outlier_batch=5), {"outlier_image": 5}),
    "woods": (Method(name="woods"), {"wild_image": 16}),
    "vos": (Method(name="vos"), {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_holds_bytes_as_fractions(tmp_path, name):
    method, counts = METHODS[name]
    arrays, (batch,) = batches_of(context_of(tmp_path, method))
    expected = {"image": (16, *SHAPE), "label": (16,)}
    expected |= {key: (count, *SHAPE) for key, count in counts.items()}
    assert {key: value.shape for key, value in batch.items()} == expected
    np.testing.assert_array_equal(batch["label"], arrays["labels"][:16])
    for key in ("image", *counts):
        levels = batch[key] * 255
        assert batch[key].dtype == np.float32
        # As bright as bytes are: neither 0 to 255 nor divided twice.
        assert levels.min() == 0 and 200 < levels.max() <= 255
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)


def test_a_step_decides_what_is_drawn(tmp_path):
    context = context_of(tmp_path, Method(name="woods"))
    arrays, (first, second, again) = batches_of(context, steps=(3, 4, 3))
    other = dataclasses.replace(context, key=jax.random.key(1))
    _, (elsewhere,) = batches_of(other, arrays | {"key": batches.key_data(other)}, steps=(3,))
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    wild = first["wild_image"]
    assert (wild != second["wild_image"]).any(axis=(1, 2, 3)).mean() > 0.9
    assert (wild != elsewhere["wild_image"]).any(axis=(1, 2, 3)).mean() > 0.9
    np.testing.assert_array_equal(first["image"], second["image"])  # of the epoch, not the step


def images_of(arrays, name):
    stored = arrays[name]
    return np.asarray(stored[np.arange(stored.shape[0])])


def as_bytes(images):
    return {np.rint(image * 255).astype(np.uint8).tobytes() for image in images}


def test_without_augmentation_the_images_are_those_of_the_sets(tmp_path):
    context = context_of(tmp_path, Method(name="oe"), shift=0, flip=False)
    arrays, (batch,) = batches_of(context)
    np.testing.assert_allclose(batch["image"] * 255, images_of(arrays, "images")[:16], atol=1e-4)
    known = {image.tobytes() for image in procedural.draw(200, SHAPE)}
    assert as_bytes(batch["outlier_image"]) <= known
    assert len(as_bytes(batch["outlier_image"])) == 16  # none twice


def test_outlier_images_of_a_set_are_augmented_as_id_images_are(tmp_path):
    context = context_of(tmp_path, Method(name="oe"), shift=3)
    arrays, (batch,) = batches_of(context)
    sets = {"image": "images", "outlier_image": "outlier_image"}
    for key, name in sets.items():
        whole = images_of(arrays, name)
        known = {image.tobytes() for image in whole}
        assert len(as_bytes(batch[key]) & known) <= 3  # one draw in 98 moves nothing
        # Shifts and flips of the set's images, and nothing else.
        padded = np.pad(whole, [(0, 0), (3, 3), (3, 3), (0, 0)])
        views = np.stack(
            [padded[:, y : y + 28, x : x + 28] for y in range(7) for x in range(7)], axis=1
        )
        moved = {view.tobytes() for view in views.reshape(-1, *SHAPE)}
        mirrored = {np.ascontiguousarray(v[:, ::-1]).tobytes() for v in views.reshape(-1, *SHAPE)}
        views = as_bytes(batch[key])
        assert views <= moved | mirrored
        assert views & (mirrored - moved) and views & (moved - mirrored)


# The pools


def draw_of(count, step=0, **changes):
    draw = pools.Draw(
        key=jax.random.key(7),
        step=jnp.int32(step),
        indices=jnp.arange(ROWS),
        count=count,
        mesh=distributed.make_mesh(),
        parts=1,
    )
    return draw._replace(**changes)


def numbered(size, width):
    """Rows that say which they are."""
    return np.repeat(np.arange(size, dtype=np.float32)[:, None], width, axis=1)


def test_rows_are_drawn_without_replacement_and_no_two_pools_draw_the_same():
    arrays = {"outlier": numbered(30, 5), "outlier_latent": numbered(30, 3)}
    features, latents = pools.knn_features(), pools.reduced_latents()
    rows = []
    for step in range(4):
        for pool in (features, latents):
            values = np.asarray(pool.draw(arrays, draw_of(30, step)))
            assert sorted(values[:, 0]) == list(range(30))
            rows.append(tuple(values[:, 0]))
    assert len(set(rows)) == 8  # each step and pool in another order
    few = np.asarray(features.draw({"outlier": numbered(4, 5)}, draw_of(9)))
    assert set(few[:, 0]) <= set(range(4)) and len(few) == 9


def test_stored_half_precision_reaches_the_batch_as_float32():
    drawn = pools.knn_features().draw({"outlier": numbered(8, 2).astype(np.float16)}, draw_of(3))
    assert drawn.dtype == jnp.float32
    latent = pools.id_latents().draw({"latent": np.ones((20, 4, 4, 2), np.float16)}, draw_of(3))
    assert latent.dtype == jnp.float32 and latent.shape == (ROWS, 4, 4, 2)


def test_controls_are_directions_and_normal_latents():
    directions = np.asarray(pools.random_features(6).draw({}, draw_of(50)))
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-6)
    arrays = {"latent": np.zeros((3, 8, 8, 4), np.float16)}
    latents = np.asarray(pools.random_latents().draw(arrays, draw_of(50)))
    assert latents.shape == (50, 8, 8, 4) and abs(latents.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("share", "parts", "count"), [(0.25, 1, 4), (0.25, 4, 4), (0.3, 4, 4), (0.01, 4, 4), (1, 8, 16)]
)
def test_devices_and_microbatches_share_the_outlier_images_evenly(share, parts, count):
    arrays = {"outlier_image": np.zeros((40, *SHAPE), np.uint8)}
    draw = lambda arrays: pools.images(Config(), share).draw(arrays, draw_of(99, parts=parts))
    assert jax.eval_shape(draw, arrays).shape == (count, *SHAPE)


def test_decoded_latents_are_augmented_beside_id_images_alone():
    stored = np.random.default_rng(0).integers(1, 256, (40, *SHAPE)).astype(np.uint8)
    config, arrays = Config(), {"outlier_image": stored}
    config.outliers.images = "decoded"
    draw = lambda share: jax.jit(lambda a: pools.images(config, share).draw(a, draw_of(16)))
    plain = np.asarray(draw(0.0)(arrays))
    assert as_bytes(plain) <= {image.tobytes() for image in stored}
    shifted = np.asarray(draw(1.0)(arrays))
    assert len(as_bytes(shifted) & {image.tobytes() for image in stored}) < 4
    assert plain.dtype == shifted.dtype == np.float32


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_wild_mixture_has_the_share_of_outliers(share):
    config = Config(data=Data(shift=0))
    config.method.woods.outlier_share = share
    black, white = (jnp.full((50, 8, 8, 1), value, jnp.uint8) for value in (0, 255))
    stored = {"unlabelled": black, "outliers": white}
    draw = jax.jit(
        lambda step: pools.wild_mixture(config).draw({"wild_image": stored}, draw_of(32, step))
    )
    images = np.stack([draw(step) for step in range(60)])
    assert set(np.unique(images)) <= {0, 1}
    is_outlier = images[..., 0, 0, 0]
    assert (images == is_outlier[..., None, None, None]).all()  # an image is of one kind
    deviation = np.sqrt(share * (1 - share) / is_outlier.size)
    assert abs(is_outlier.mean() - share) <= 4 * deviation
    if share < 1:
        # Drawn at every place and step, not a fixed block.
        assert is_outlier.mean(axis=0).min() > 0 and is_outlier.mean(axis=0).max() < 1
        assert is_outlier.sum(axis=1).std() > 0


def test_the_halves_of_woods_are_disjoint_and_whole(tmp_path):
    context = context_of(tmp_path, Method(name="woods"))
    everything = context.train_images()
    labelled = batches.labelled_images(context)
    (pool,) = registry.recipe_of(context.config).pools(context.config)
    unlabelled = pool.load(context)["unlabelled"]
    assert len(labelled.images) == len(labelled.labels) == len(unlabelled) == IMAGES // 2
    together = np.stack([labelled.images, unlabelled], axis=1).reshape(everything.images.shape)
    np.testing.assert_array_equal(together, everything.images)
    np.testing.assert_array_equal(labelled.labels, everything.labels[::2])
    for name in ("oe", "ce"):
        whole = batches.labelled_images(context_of(tmp_path, Method(name=name)))
        np.testing.assert_array_equal(whole.images, everything.images)


# Every method


@pytest.fixture(scope="module")
def finished(finished_run, tmp_path_factory):
    """The context of a finished run with every stage's files, and decoded latents beside them."""
    directory = tmp_path_factory.mktemp("files")
    for stage in ("teacher", "features", "outliers"):
        (directory / stage).symlink_to(finished_run / stage)
    (directory / "latents").mkdir()
    for path in (finished_run / "latents").iterdir():
        (directory / "latents" / path.name).symlink_to(path)
    count = len(artifacts.read_tensors(finished_run / "latents" / pools.LATENTS)["latents"])
    decoded = {"images": np.zeros((count, *SHAPE), np.uint8)}
    artifacts.write_tensors(directory / "latents" / pools.DECODED_LATENTS, decoded)
    return dataclasses.replace(pipeline.resolve(finished_run), workdir=directory)


def with_config(context, values):
    config = changed(copy.deepcopy(context.config), {"train.start": "run", **values})
    return dataclasses.replace(context, config=config)


CASES = {
    **{name: {"method.name": name} for name in registry.METHODS},
    **{f"oal, {s}": {"outliers.source": s} for s in ("none", "knn", "random", "diffusion")},
    "oal, club": {"method.oal.objective": "club"},
    "oal, club_alternate": {"method.oal.objective": "club_alternate"},
    "oal, decoded": {"outliers.images": "decoded"},
    "oal, no images": {"outliers.image_share": 0.0},
    "kd, teacher in the step": {"method.name": "kd", "teacher.views": 0},
    "kd, unleash": {"method.name": "kd", "method.unleash": True},
    "oe, decoded": {"method.name": "oe", "outliers.images": "decoded"},
    "npos, contrastive": {"method.name": "npos", "method.npos.contrastive_weight": 0.1},
}
NEED_THE_WHOLE_BATCH = {
    *("um", "umap", "woods", "oal, club", "oal, club_alternate", "kd, unleash"),
    "npos, contrastive",
}


FAST = ("ce", "oal", "woods")


@pytest.mark.parametrize(
    "case",
    [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_abstract_arrays_are_those_of_the_files_and_a_step_keeps_its_state(finished, case):
    context = with_config(finished, CASES[case])
    config, info = context.config, context.info
    data = batches.labelled_images(context)
    arrays = batches.make_arrays(context, data)
    latents = artifacts.read_tensors(finished.directory("latents") / pools.LATENTS)["latents"]
    abstract = batches.abstract_arrays(context, info, latents.shape[1:])
    assert form(abstract) == form(arrays)

    config.train.accumulate = 2
    if case in NEED_THE_WHOLE_BATCH:
        assert "train.accumulate=2" in refusal(registry.check, config)
        config.train.accumulate = 1
    registry.check(config)
    estimate = {"unmasked": 1.0, "constraint": 0.5}
    net = Net(num_classes=info.num_classes)
    method = train.assemble(config, net, info.image_shape, abstract, estimate, data.examples)
    key = jax.random.key(0)
    groups = list(jax.eval_shape(method.init, key)[0])
    optimizer = train.make_optimizer(config, groups, steps=10)
    state = jax.eval_shape(functools.partial(fresh_state, method, optimizer), key)
    make_batch = batches.make_batches(context, teacher.model(config, info.num_classes))
    step = make_train_step(method, optimizer, key, config.train.accumulate, unroll=False)

    def train_step(state, arrays, indices):
        return step(state, make_batch(arrays, indices, 0, state.step))

    indices = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    after, metrics = jax.eval_shape(train_step, state, abstract, indices)
    assert form(after) == form(state)
    assert all(m.shape == () for m in metrics.values()) and "loss" in metrics


def test_the_teacher_s_outputs_are_those_of_the_very_view(finished):
    context = with_config(finished, {"method.name": "kd"})
    _, (batch,) = batches_of(context)
    outputs = compute(teacher.load(context), batch["image"], ROWS, ("features",), context.mesh)
    np.testing.assert_allclose(batch["teacher_logits"], outputs.logits, rtol=0.01, atol=0.02)
    np.testing.assert_allclose(batch["teacher_features"], outputs.features, rtol=0.01, atol=0.02)
    in_step = with_config(finished, {"method.name": "kd", "teacher.views": 0})
    net = teacher.network(context, context.info.num_classes)
    arrays = batches.make_arrays(in_step, batches.labelled_images(in_step))
    make_batch = jax.jit(batches.make_batches(in_step, net))
    same = make_batch(jax.tree.map(jnp.asarray, arrays), jnp.arange(ROWS), 0, 0)
    np.testing.assert_allclose(same["image"], batch["image"], atol=1e-6)
    np.testing.assert_allclose(same["teacher_logits"], outputs.logits, rtol=1e-3, atol=1e-3)


def test_a_step_of_oal_draws_rows_of_the_stages_files(finished):
    context = with_config(finished, {"outliers.source": "diffusion"})
    _, (batch,) = batches_of(context)
    read = lambda stage, file: artifacts.read_tensors(context.directory(stage) / file)
    outliers = read("outliers", pools.OUTLIERS)["outliers"]
    latents = read("latents", pools.LATENTS)["latents"]
    rows = {
        "outlier": outliers.reshape(-1, outliers.shape[-1]),
        "outlier_latent": latents.reshape(len(latents), -1),
    }
    for key, stored in rows.items():
        drawn = batch[key].reshape(ROWS, -1)
        places = [np.flatnonzero((stored == row).all(axis=1)) for row in drawn]
        assert all(len(place) == 1 for place in places)
        assert len({int(place[0]) for place in places}) == ROWS
    id_latents = read("latents", pools.ID_LATENTS)["latents"]
    np.testing.assert_array_equal(batch["latent"], id_latents[:ROWS])


# Mistakes


def test_impossible_outlier_images_are_one_line(tmp_path, monkeypatch):
    oe = Method(name="oe")
    message = refusal(pools.outlier_images, context_of(tmp_path, oe, "fashion"))
    assert "outliers.images='fashion'" in message and "64 of its 200 images" in message
    message = refusal(pools.outlier_images, context_of(tmp_path, oe, "procedual"))
    assert "outliers.images='procedual'" in message
    message = refusal(pools.outlier_images, context_of(tmp_path, oe, "sandal"))
    assert "outliers.images='sandal'" in message and "'train'" in message
    context, read_set = context_of(tmp_path, oe, "photographs"), sources.read_set
    small = sources.ImageSet("small/train", np.zeros((3, 20, 20, 1), np.uint8), *NO_LABELS)
    monkeypatch.setattr(
        "oal_jax.stages.context.read_set",
        lambda spec: small if spec.name == "photographs" else read_set(spec),
    )
    message = refusal(pools.outlier_images, context)
    assert "(20, 20, 1)" in message and "(28, 28, 1)" in message


@pytest.mark.parametrize("name", ["oe", "energy", "woods"])
@pytest.mark.parametrize(
    ("images", "group"),
    [
        ("fashion", "id_set"),
        ("bag", "near"),
        ("mnist", "far"),
        ("val_noise", "validation"),
        ("fashion_blur", "csid"),
    ],
)
def test_sets_of_the_benchmark_are_no_outlier_images(name, images, group):
    settings = Config(method=Method(name=name))
    settings.train.start = "run"
    registry.check(settings)
    settings.outliers.images = images
    message = refusal(registry.check, settings)
    assert f"outliers.images='{images}'" in message and group in message
    # Other methods do not read it.
    registry.check(dataclasses.replace(settings, method=Method(name="ce")))
    # Nor is it a test set where the benchmark does not have it.
    if group == "far":
        settings.data.far = ("letters",)
        registry.check(settings)


@pytest.mark.parametrize("method", [Method(name="oe"), Method()])
def test_procedural_images_are_drawn_in_the_shape_of_the_id_images(tmp_path, monkeypatch, method):
    info = DatasetInfo("mine", ("cat",), Decoding.to_shape((20, 24, 3)), 12, ("cat",))
    monkeypatch.setattr("oal_jax.stages.context.read_info", lambda spec: info)
    context = context_of(tmp_path, method)
    context.config.data.source, context.config.data.root = "folder", "somewhere"
    context.config.outliers.image_share = 0.125
    validate(context.config)
    shown = pools.outlier_images(context)
    np.testing.assert_array_equal(shown, procedural.draw(200, (20, 24, 3)))
