"""The configs at the paper's scale: their settings, and whole smoke runs that need no files."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from oal_jax import main
from oal_jax.config import GENERATED, Config
from oal_jax.config.benchmarks import BENCHMARKS
from oal_jax.config.class_names import IMAGENET, generated_names
from oal_jax.config.rules import validate
from oal_jax.config.smoke import shrink
from oal_jax.data import class_names, sources
from oal_jax.errors import UserError
from oal_jax.generator.conditioning import prompt_word

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("cifar10", "cifar100", "imagenet200", "imagenet1k", "cifar10_32px", "cifar100_32px")
ID_SETS = dict(zip(NAMES, ("cifar10", "cifar100", "imagenet200", "imagenet"), strict=False))
ID_SETS |= {"cifar10_32px": "cifar10", "cifar100_32px": "cifar100"}


def settings(name) -> Config:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


def start(name, workdir, *flags) -> int:
    argv = ["main", f"--config={CONFIGS / f'{name}.py'}", f"--workdir={workdir}", *flags]
    return main.guard(main.run, argv)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_valid_before_and_after_shrinking(name):
    config = settings(name)
    with pytest.raises(UserError, match=r"data\.root is empty"):
        validate(config)
    config.data.root = "."
    validate(config)
    assert config.data.id_set == ID_SETS[name] and config.train.epochs == 100
    assert (config.teacher.width, config.teacher.patch) == (768, 16)  # as in Stable Diffusion v1
    # At the sizes of the paper: outliers a class; the reference's CIFAR ones are 1,000 and 10,000.
    counts = {"cifar10": 1000, "cifar100": 10_000, "imagenet200": 2500, "imagenet": 2500}
    knn = config.outliers.knn
    assert knn.repeats * knn.anchors * knn.per_anchor == counts[ID_SETS[name]]
    config.smoke, config.data.root = True, ""
    validate(config)
    small = shrink(config)
    validate(small)
    assert small.data.source == small.teacher.weights == small.generator.directory == GENERATED
    assert small.data.id_set == config.data.id_set and small.teacher.train == config.teacher.train
    assert not small.data.stream
    assert small.method.oal.objective == config.method.oal.objective
    assert small.student.stem == config.student.stem


def test_a_smoke_run_on_one_s_own_files_reads_them():
    config = settings("cifar100")
    config.smoke, config.data.root = True, "somewhere"
    data = shrink(config).data
    assert (data.source, data.root, data.train_images) == ("imglist", "somewhere", 800)


def test_the_two_sizes_differ_in_what_the_student_sees():
    large, small = (settings(name) for name in ("cifar10", "cifar10_32px"))
    assert (large.data.image_size, large.student.stem) == (224, "imagenet")
    assert (small.data.image_size, small.student.stem) == (32, "cifar")
    assert (large.method.oal.objective, small.method.oal.objective) == ("club", "energy")


def of_set(name, split, limit=0):
    benchmark = BENCHMARKS["cifar100"]
    labelled = name == benchmark.id_set
    return sources.load(
        "generated", name, split, id_set="cifar100", labelled=labelled, limit=limit, image_size=16
    )


def test_generated_sets_have_the_classes_of_those_that_they_stand_for():
    train, test = of_set("cifar100", "train", 300), of_set("cifar100", "test", 200)
    np.testing.assert_array_equal(train.images, of_set("cifar100", "train", 300).images)
    assert train.images.shape == (300, 16, 16, 3) and train.class_names[7] == "beetle"
    np.testing.assert_array_equal(np.bincount(train.labels), np.full(100, 3))
    # A class is the same in every split, and other sets are none of the classes.
    flat = lambda data: data.images.reshape(len(data.images), -1) / 255
    bank = flat(train)

    def nearest(data):
        points = flat(data)
        squares = (points**2).sum(1)[:, None] + (bank**2).sum(1)[None]
        distances = squares - 2 * points @ bank.T
        return train.labels[distances.argmin(1)], distances.min(1)

    predictions, distance = nearest(test)
    assert (predictions == test.labels).mean() > 0.95
    other = of_set("svhn", "test", 200)
    assert other.class_names == ("ood",) and (other.labels == 0).all()
    assert np.median(nearest(other)[1]) > 3 * np.median(distance)
    names = {name: generated_names(name) for name in ("imagenet200", "imagenet", "my_set")}
    assert [len(known) for known in names.values()] == [200, 20, 10]
    for known in names.values():
        assert all(prompt_word(name) for name in known)


def test_imagenet_s_ids_become_words():
    assert class_names.words(("n01440764", "n15075141", "pine_tree")) == (
        *("tench", "toilet tissue", "pine_tree"),
    )
    # Labels that everybody knows.
    words = tuple(IMAGENET.values())
    known = {1: "goldfish", 207: "golden retriever", 281: "tabby", 417: "balloon", 954: "banana"}
    assert {i: words[i] for i in known} == known
    assert list(IMAGENET) == sorted(class_names.IMAGENET) and len(set(words)) == 1000


def test_the_words_of_imagenet200_come_from_its_list(tmp_path):
    lists = tmp_path / "benchmark_imglist/imagenet200"
    lists.mkdir(parents=True)
    folder = tmp_path / "images_largescale"
    (folder / "val").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "val/1.png")
    (lists / "val_imagenet200.txt").write_text("val/1.png 1\n")
    load = lambda: sources.load(
        "imglist", "imagenet200", "validation", root=str(tmp_path), image_size=8
    )
    assert load().class_names[1] == "class 1"
    ids = list(IMAGENET)[::-5]  # 200, not in their usual order
    rows = [f"imagenet_1k/train/{id_}/{id_}_7.JPEG {label}" for label, id_ in enumerate(ids)]
    (lists / "train_imagenet200.txt").write_text("\n".join(rows))
    assert load().class_names == class_names.words(ids)
    (lists / "train_imagenet200.txt").write_text("\n".join([*rows[:-1], rows[0]]))
    assert load().class_names[1] == "class 1"  # a class without images: nothing is guessed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "imagenet1k", "cifar10_32px"])
def test_a_smoke_run_passes_every_stage_and_needs_no_files(tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--config.smoke=True", "--config.evaluation.scores=energy"]
    assert start(name, tmp_path / "run", *flags) == 0
    assert "nearood" in capsys.readouterr().out
    tensors = load_file(tmp_path / "run/teacher/teacher.safetensors")
    classes = len(generated_names(ID_SETS[name]))
    assert tensors["head.kernel"].shape == (64, classes)
    assert (tmp_path / "run/outliers/outliers.safetensors").exists()
    path = tmp_path / "run/latents/latents.safetensors"
    assert path.exists() == (not name.endswith("32px"))  # those train on k-NN outliers alone
    if path.exists():
        latents = load_file(path)["latents"]
        assert len(latents) == classes and np.isfinite(latents).all()


@pytest.mark.slow
def test_a_student_starts_from_a_classifier_of_the_same_config(tmp_path):
    common = ["--config.smoke=True", "--config.evaluation.scores=energy"]
    first = ["--config.method.name=ce", "--config.train.learning_rate=0.1"]
    assert start("cifar10_32px", tmp_path / "ce", *common, *first) == 0
    then = [f"--config.train.start={tmp_path / 'ce'}", "--config.train.learning_rate=1e-9"]
    kd = ["--config.method.name=kd", "--config.train.weight_decay=0"]
    assert start("cifar10_32px", tmp_path / "kd", *common, *then, *kd) == 0
    before, after = (
        load_file(tmp_path / name / "train" / "student.safetensors") for name in ("ce", "kd")
    )
    kernel = "params.student.conv1.kernel"
    np.testing.assert_allclose(after[kernel], before[kernel], atol=1e-6)
