"""Validation OOD sets that are made from the ID images."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import oal_jax
from oal_jax.config import Config
from oal_jax.config.benchmarks import MADE, resolve
from oal_jax.data import made
from oal_jax.data.sources import load
from oal_jax.runtime import distributed
from oal_jax.stages.context import Context

SIZES = [(28, 28, 1), (32, 32, 3), (21, 33, 3), (40, 17, 4), (2, 2, 1)]


def photographs(n, shape, classes=3):
    """Noisy images of which no two are alike, and labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % classes


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", MADE)
def test_sets_of_every_size(name, shape):
    images, labels = photographs(30, shape)
    before = images.copy()
    ood = made.make(name, images, labels)
    assert ood.shape == (100, *shape) and ood.dtype == np.uint8
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(ood, made.make(name, images, labels))
    assert len(np.unique(ood.reshape(100, -1), axis=0)) > (2 if shape[0] == 2 else 25)
    if shape[0] > 2:
        known = {image.tobytes() for image in images}
        assert not [image for image in ood if image.tobytes() in known]
    if shape[2] == 4 and name in ("made_noise", "made_shapes"):
        assert (ood[..., 3] == 255).all()


@pytest.mark.parametrize(("n", "classes"), [(1, 1), (2, 1), (5, 5)])
def test_sets_of_few_images(n, classes):
    images, labels = photographs(n, (9, 9, 3), classes)
    for name in MADE:
        assert made.make(name, images, labels, count=7).shape == (7, 9, 9, 3)


def test_sets_are_rearrangements_and_means():
    images, labels = photographs(12, (6, 6, 1), 2)
    pixels = {tuple(np.sort(image.ravel())) for image in images}
    for name in ("made_rotated", "made_jigsaw"):
        assert {
            tuple(np.sort(image.ravel())) for image in made.make(name, images, labels)
        } == pixels
    means = {
        ((images[i].astype(int) + images[j] + 1) // 2).astype(np.uint8).tobytes()
        for i in range(12)
        for j in range(12)
        if labels[i] != labels[j]
    }
    assert {image.tobytes() for image in made.make("made_blended", images, labels)} <= means


def test_rows_are_spread_over_a_set_of_classes_in_turn():
    rows = made.base_rows(5000, (28, 28, 1))
    assert len(rows) == 500 == len(set(rows)) and (np.diff(rows) > 0).all()
    assert np.bincount(rows % 5).min() > 70
    assert made.base_rows(30, (28, 28, 1)).tolist() == list(range(30))
    assert len(made.base_rows(5000, (28, 28, 1), limit=20)) == 20
    assert len(made.base_rows(5000, (4096, 4096, 3))) < 10


def folder(root, classes=("cat", "dog", "emu"), each=6):
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for name in classes:
            for i in range(each):
                path = root / "mine" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_has_them_by_default(tmp_path, stream):
    folder(tmp_path)
    config = Config()
    config.data = dataclasses.replace(
        config.data, source="folder", root=str(tmp_path), id_set="mine", stream=stream
    )
    run = Context(config, tmp_path, distributed.make_mesh(), jax.random.key(0))
    assert run.benchmark.validation == MADE and not run.benchmark.near + run.benchmark.far
    known = run.images("validation")
    for name in MADE:
        data = run.opened("validation", name)
        assert data.name == f"{name}/validation" and data.class_names == ("ood",)
        assert data.examples == 100 and data.image_shape == (16, 16, 3)
        np.testing.assert_array_equal(data.images, made.make(name, known.images, known.labels))
    sets = oal_jax.load_sets("mine", source="folder", root=str(tmp_path))
    assert set(sets.validation_ood) == set(MADE) and not sets.near


def test_the_images_of_a_class_that_is_left_out_are_in_none(tmp_path):
    options = {"id_set": "mine", "labelled": False, "root": str(tmp_path), "leave_out": ("dog",)}
    folder(tmp_path)
    cats = load("folder", "mine", "validation", root=str(tmp_path), leave_out=("dog",))
    turned = load("folder", "made_rotated", "validation", **options)
    allowed = {np.rot90(image, k).tobytes() for image in cats.images for k in (1, 3)}
    assert {image.tobytes() for image in turned.images} <= allowed


def test_generated_and_bundled_sets_have_them_too():
    for source, id_set, shape in (
        ("generated", "cifar10", (32, 32, 3)),
        ("bundled", "fashion", (28, 28, 1)),
    ):
        ood = load(source, "made_jigsaw", "validation", id_set=id_set, labelled=False, limit=40)
        assert ood.images.shape == (100, *shape) and not ood.labels.any()


def test_benchmarks_with_validation_sets_keep_theirs():
    assert not set(MADE) & set(resolve("fashion").validation + resolve("cifar10").validation)
    assert resolve("fashion", validation=["made_noise"]).validation == ("made_noise",)
    assert resolve("mine", far=["a"], validation=["none"]).validation == ()
    assert resolve("mine", source="folder").validation == MADE
