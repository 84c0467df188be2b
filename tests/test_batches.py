"""What the student's batches hold: which images, in which range, drawn how, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from oal_jax.config import Config, Data, Exposure, Method, Wild
from oal_jax.config.rules import validate
from oal_jax.data import procedural, sources
from oal_jax.errors import UserError
from oal_jax.stages import batches
from oal_jax.stages.context import Context

SHAPE, IMAGES, ROWS = (28, 28, 1), 64, 16
NO_LABELS = np.zeros(3, np.int32), ("ood",)
# The programs are tiny: compiling them is the cost.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True, scope="module")
def read_once():
    """Every set is read, or drawn, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oal_jax.stages.context.read_set", functools.cache(sources.read_set))
        yield


def context_of(tmp_path, method, images="procedural", shift=2, flip=True):
    """A smoke-sized run on a few of the embedded images, on one device."""
    settings = Config(
        smoke=True,  # 200 outlier images
        data=Data(train_images=IMAGES, shift=shift, flip=flip),
        method=method,
    )
    settings.outliers.images = images
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    return Context(settings, tmp_path, mesh, jax.random.key(0))


def drawn(context, arrays=None, steps=(0,), rows=ROWS):
    """(arrays, the batch of each step), the batches drawn inside jit as the loop does."""
    if arrays is None:
        arrays = batches.make_arrays(context, batches.labelled_images(context))
    make_batch = batches.make_batches(context, arrays, net=None)
    draw = quick(lambda arrays, step: make_batch(arrays, jnp.arange(rows), 0, step))
    held = jax.tree.map(jnp.asarray, arrays)
    return arrays, [jax.device_get(draw(held, step)) for step in steps]


METHODS = {
    "oe": (Method(name="oe"), {"outlier_image": 16}),
    "energy, fewer outliers": (Method(name="energy", outlier_batch=5), {"outlier_image": 5}),
    "poem": (Method(name="poem", exposure=Exposure(poem_ratio=3)), {"outlier_image": 48}),
    "woods": (Method(name="woods"), {"wild_image": 16}),
    "vos": (Method(name="vos"), {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_holds_bytes_as_fractions(tmp_path, name):
    method, counts = METHODS[name]
    context = context_of(tmp_path, method)
    arrays, (batch,) = drawn(context)
    wanted = {"image": (16, *SHAPE), "label": (16,)}
    wanted |= {key: (count, *SHAPE) for key, count in counts.items()}
    assert {key: value.shape for key, value in batch.items()} == wanted
    np.testing.assert_array_equal(batch["label"], arrays["labels"][:16])
    for key in ("image", *counts):
        levels = batch[key] * 255
        assert batch[key].dtype == np.float32
        # As bright as bytes are: neither 0 to 255 nor divided twice.
        assert levels.min() == 0 and 200 < levels.max() <= 255
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)


def test_a_step_decides_what_is_drawn(tmp_path):
    context = context_of(tmp_path, Method(name="woods"))
    arrays, (first, second) = drawn(context, steps=(3, 4))
    _, (again,) = drawn(context, arrays, steps=(3,))
    other = dataclasses.replace(context, key=jax.random.key(1))
    _, (elsewhere,) = drawn(other, steps=(3,))
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    wild = first["wild_image"]
    assert (wild != second["wild_image"]).any(axis=(1, 2, 3)).mean() > 0.9
    assert (wild != elsewhere["wild_image"]).any(axis=(1, 2, 3)).mean() > 0.9
    np.testing.assert_array_equal(first["image"], second["image"])  # of the epoch, not the step


def as_bytes(images):
    return {np.rint(image * 255).astype(np.uint8).tobytes() for image in images}


def test_without_augmentation_the_images_are_those_of_the_sets(tmp_path):
    context = context_of(tmp_path, Method(name="oe"), shift=0, flip=False)
    arrays, (batch,) = drawn(context)
    np.testing.assert_allclose(batch["image"] * 255, arrays["images"][:16], atol=1e-4)
    known = {image.tobytes() for image in procedural.draw(200, SHAPE)}
    assert as_bytes(batch["outlier_image"]) <= known
    assert len(as_bytes(batch["outlier_image"])) == 16  # none twice


def test_outlier_images_of_a_set_are_augmented_as_id_images_are(tmp_path):
    context = context_of(tmp_path, Method(name="oe"), shift=3)
    arrays, (batch,) = drawn(context)
    sets = {"image": arrays["images"], "outlier_image": arrays["outlier_image"]}
    for key, whole in sets.items():
        known = {image.tobytes() for image in whole}
        assert len(as_bytes(batch[key]) & known) <= 3  # one draw in 98 moves nothing
        # Shifts and flips of the set's images, and nothing else.
        padded = np.pad(whole, [(0, 0), (3, 3), (3, 3), (0, 0)])
        views = np.stack(
            [padded[:, y : y + 28, x : x + 28] for y in range(7) for x in range(7)], axis=1
        )
        moved = {view.tobytes() for view in views.reshape(-1, *SHAPE)}
        mirrored = {np.ascontiguousarray(v[:, ::-1]).tobytes() for v in views.reshape(-1, *SHAPE)}
        found = as_bytes(batch[key])
        assert found <= moved | mirrored
        assert found & (mirrored - moved) and found & (moved - mirrored)


def test_decoded_latents_are_not_augmented(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(1, 256, (40, *SHAPE)).astype(np.uint8)
    monkeypatch.setitem(batches.READERS, "decoded latents", lambda context: images)
    context = context_of(tmp_path, Method(name="oe"), images="decoded", shift=4)
    arrays, (batch,) = drawn(context)
    assert arrays["outlier_image"] is images
    assert as_bytes(batch["outlier_image"]) <= {image.tobytes() for image in images}
    assert batch["outlier_image"].dtype == np.float32 and batch["outlier_image"].max() == 1


def test_outliers_that_are_no_images_come_as_they_are(tmp_path, monkeypatch):
    features = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    reduced = 7 + np.random.default_rng(1).normal(size=(30, 3)).astype(np.float32)
    monkeypatch.setitem(batches.READERS, "knn", lambda context: features)
    monkeypatch.setitem(batches.READERS, "reduced latents", lambda context: reduced)
    context = context_of(tmp_path, Method(name="oal", micl="reference"))
    arrays = {"images": np.zeros((20, *SHAPE), np.uint8), "labels": np.zeros(20, np.int32)}
    arrays |= {"outlier": features, "outlier_latent": reduced}
    arrays["key"] = batches.key_data(context)
    _, (batch,) = drawn(context, arrays)
    for key, pool in (("outlier", features), ("outlier_latent", reduced)):
        rows = [np.flatnonzero((pool == row).all(axis=1)) for row in batch[key]]
        assert all(len(found) == 1 for found in rows)
        assert len({int(found[0]) for found in rows}) == ROWS


# The wild mixture


def test_the_halves_of_woods_are_disjoint_and_whole(tmp_path):
    context = context_of(tmp_path, Method(name="woods"))
    everything = context.train_images()
    labelled = batches.labelled_images(context)
    unlabelled = batches.unlabelled_images(context)
    assert len(labelled.images) == len(labelled.labels) == len(unlabelled) == IMAGES // 2
    together = np.stack([labelled.images, unlabelled], axis=1).reshape(everything.images.shape)
    np.testing.assert_array_equal(together, everything.images)
    np.testing.assert_array_equal(labelled.labels, everything.labels[::2])
    first, second = ({x.tobytes() for x in half} for half in (labelled.images, unlabelled))
    assert not first & second
    for name in ("oe", "ce"):
        kept = batches.labelled_images(context_of(tmp_path, Method(name=name)))
        np.testing.assert_array_equal(kept.images, everything.images)
    arrays = batches.make_arrays(context, labelled)
    np.testing.assert_array_equal(arrays["images"], labelled.images)
    np.testing.assert_array_equal(arrays["wild_image"], unlabelled)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_wild_mixture_has_the_share_of_outliers(tmp_path, share):
    method = Method(name="woods", wild=Wild(share=share))
    context = context_of(tmp_path, method, shift=0)
    arrays = batches.make_arrays(context, batches.labelled_images(context))
    arrays["wild_image"] = np.zeros_like(arrays["wild_image"])
    arrays["outlier_image"] = np.full_like(arrays["outlier_image"], 255)
    _, found = drawn(context, arrays, steps=range(60), rows=32)
    white = np.stack([batch["wild_image"] for batch in found])
    assert set(np.unique(white)) <= {0, 1}
    is_outlier = white[..., 0, 0, 0]
    assert (white == is_outlier[..., None, None, None]).all()  # an image is of one kind
    count = is_outlier.size
    deviation = np.sqrt(share * (1 - share) / count)
    assert abs(is_outlier.mean() - share) <= 4 * deviation
    if share < 1:
        # Drawn anew at every place and step, not a fixed block.
        assert is_outlier.mean(axis=0).min() > 0 and is_outlier.mean(axis=0).max() < 1
        assert is_outlier.sum(axis=1).std() > 0


# Mistakes


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_outlier_images_that_cannot_be_are_told(tmp_path, monkeypatch):
    oe = Method(name="oe")
    said = refusal(batches.outlier_images, context_of(tmp_path, oe, "fashion"))
    assert "outliers.images='fashion': 64 of its 200 images are ID training images" in said
    said = refusal(batches.outlier_images, context_of(tmp_path, oe, "procedual"))
    assert "outliers.images='procedual': no bundled image set 'procedual': choose one of" in said
    said = refusal(batches.outlier_images, context_of(tmp_path, oe, "sandal"))
    assert "outliers.images='sandal': image set 'sandal' has no split 'train'" in said
    context, read_set = context_of(tmp_path, oe, "photographs"), sources.read_set
    small = sources.ImageSet("small/train", np.zeros((3, 20, 20, 1), np.uint8), *NO_LABELS)
    monkeypatch.setattr(
        "oal_jax.stages.context.read_set",
        lambda spec: small if spec.name == "photographs" else read_set(spec),
    )
    said = refusal(batches.outlier_images, context)
    assert "its images have shape (20, 20, 1), those of fashion/train (28, 28, 1)" in said


@pytest.mark.parametrize("name", ["oe", "energy", "poem", "doe", "woods"])
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
    validate(settings)
    settings.outliers.images = images
    said = refusal(validate, settings)
    assert said.startswith(f"config outliers.images='{images}' is the {group} set of the benchmark")
    # The others don't read it.
    validate(dataclasses.replace(settings, method=Method(name="ce")))
    # Nor is it a test set, where the benchmark is told to leave it out.
    if group == "far":
        settings.data.far = ("letters",)
        validate(settings)


@pytest.mark.parametrize("method", [Method(name="oe"), Method()])
def test_procedural_images_are_drawn_in_the_shape_of_the_id_images(tmp_path, monkeypatch, method):
    images = np.zeros((12, 20, 24, 3), np.uint8)
    data = sources.ImageSet("mine/train", images, np.zeros(12, np.int32), ("cat",))
    monkeypatch.setattr("oal_jax.stages.context.read_set", lambda spec: data)
    context = context_of(tmp_path, method)
    context.config.data.source, context.config.data.root = "folder", "somewhere"
    context.config.outliers.image_share = 0.125
    validate(context.config)
    shown = batches.outlier_images(context)
    np.testing.assert_array_equal(shown, procedural.draw(200, (20, 24, 3)))
