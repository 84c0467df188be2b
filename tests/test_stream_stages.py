"""Streamed image sets in the stages: what they write is what sets in memory give."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from oal_jax.config import Config
from oal_jax.config.rules import validate
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.errors import UserError
from oal_jax.outliers.pools import outlier_images
from oal_jax.runtime import artifacts, distributed
from oal_jax.stages import batches
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context

SIDE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """An ID set of two classes, bright and dark, and two OOD sets."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    sizes = {"train": 80, "validation": 12, "test": 12}
    sets = {f"mine/{split}/{c}": n // 2 for split, n in sizes.items() for c in ("cat", "dog")}
    for name, count in (sets | {"near/test": 9, "far/test": 9, "more/train": 9}).items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shape = (SIDE + i % 3, SIDE + 4, 3)
            levels = rng.integers(0, 128, shape) + 128 * name.endswith("cat")
            Image.fromarray(levels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def config_of(root: Path, stream: bool = True, outlier_images: str = "", **method) -> Config:
    config = Config(smoke=True)
    config.outliers.images = outlier_images or config.outliers.images
    config.data = dataclasses.replace(
        config.data,
        source="folder",
        root=str(root),
        id_set="mine",
        near=("near",),
        far=("far",),
        image_size=SIDE,
        stream=stream,
    )
    config.method = dataclasses.replace(config.method, **method)
    teacher = {"train": True, "views": 0, "patch": 8, "width": 16, "depth": 1, "heads": 2}
    config.teacher = dataclasses.replace(config.teacher, **teacher, batch_size=8)
    config.train.batch_size, config.evaluation.batch_size = 8, 8
    config.evaluation.scores = ("energy", "mahalanobis")
    return config


def context_of(root: Path, workdir: Path, **options) -> Context:
    config = config_of(root, **options)
    validate(config)
    return Context(config, workdir, distributed.make_mesh(), jax.random.key(0))


@pytest.mark.slow
def test_every_stage_gives_what_it_gives_of_sets_in_memory(root, tmp_path):
    for name, stream in (("memory", False), ("stream", True)):
        config = config_of(root, stream, name="oal")
        config.outliers.source = "knn"
        pipeline.run(config, tmp_path / name)
    for stage, file in (
        ("teacher", "teacher.safetensors"),
        ("features", "features.safetensors"),
        ("train", "student.safetensors"),
        ("evaluate", "outputs.safetensors"),
    ):
        held, streamed = (
            artifacts.read_tensors(tmp_path / name / stage / file) for name in ("memory", "stream")
        )
        assert held.keys() == streamed.keys()
        for tensor in held:
            np.testing.assert_array_equal(held[tensor], streamed[tensor], err_msg=tensor)
    tables = [(tmp_path / name / "report/ood.csv").read_text() for name in ("memory", "stream")]
    assert tables[0] == tables[1] and tables[0].count("\n") > 4


def test_only_what_the_config_asks_for_is_streamed(root, tmp_path):
    context = context_of(root, tmp_path, name="ce")
    assert isinstance(context.train_images(), Streamed)
    assert isinstance(context.opened("test", "near"), Streamed)
    assert isinstance(context.images("validation"), ImageSet)  # for scores that read images
    assert batches.make_arrays(context, context.train_images()).keys() == {"key"}
    held = context_of(root, tmp_path, stream=False, name="ce")
    assert isinstance(held.train_images(), ImageSet)


def test_outliers_are_compared_with_streamed_images(root, tmp_path):
    context = context_of(root, tmp_path, outlier_images="more", name="oe")
    assert outlier_images(context).shape == (9, SIDE, SIDE, 3)
    for i in range(9):
        image = next((root / "mine/train/cat").glob(f"{i}.png")).read_bytes()
        path = tmp_path / f"same/train/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    (tmp_path / "mine").symlink_to(root / "mine")
    context = context_of(tmp_path, tmp_path, outlier_images="same", name="oe")
    with pytest.raises(UserError, match="9 of its 9 images are ID training images of mine"):
        outlier_images(context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "bundled"}, "'bundled' are held in memory; it is for tfds, imglist, fol"),
        ({"teacher.views": 2}, "teacher.views=2 keeps .* with data.stream=True it must be 0"),
        ({"method.name": "woods", "train.start": "x"}, "'woods' divides a set in memory"),
        ({"method.name": "oal", "generator.train": True}, "give a generator.directory"),
        ({"method.name": "oal", "data.on_corrupt": "skip"}, "leaves images without latents"),
        ({"data.workers": -1}, "data.workers=-1 must be at least 0"),
        ({"data.id_splits": ("train", "test")}, "id_splits=train,test must name three splits"),
        ({"data.id_splits": ("a,b,c",)}, "of data.source='tfds'"),
    ],
)
def test_what_a_stream_can_not_do_is_one_line(root, changes, message):
    config = config_of(root, outlier_images="more", name="kd")
    for key, value in changes.items():
        part, _, name = key.partition(".")
        setattr(getattr(config, part), name, value)
    with pytest.raises(UserError, match=message) as error:
        validate(config)
        batches.check_streamed(config)
    assert "\n" not in str(error.value)


def test_methods_without_a_teacher_may_name_views(root):
    config = config_of(root, name="ce")
    config.teacher.views = 4
    validate(config)
    batches.check_streamed(config)
