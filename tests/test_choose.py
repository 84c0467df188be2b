"""What configs/own.py leaves open, chosen for folders of 2 to 1,000 classes."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from oal_jax.config import flatten
from oal_jax.config.rules import validate
from oal_jax.data.own import FolderSummary
from oal_jax.stages.choose import FEW_IMAGES, MAX_STEPS, MIN_STEPS, Weights, choose

CONFIGS = Path(__file__).parents[1] / "configs"


def settings(**values):
    config = runpy.run_path(str(CONFIGS / "own.py"))["get_config"]()
    config.data.root = "somewhere"
    for path, value in values.items():
        section, _, name = path.rpartition("__")
        setattr(getattr(config, section), name, value)
    return config


def summary(classes, each, side=300, gray=False, ood=()):
    counts = {
        split: np.full(classes, max(1, round(each * share)))
        for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15))
    }
    sizes = np.full((7, 2), side)
    names = tuple(f"class {i}" for i in range(classes))
    return FolderSummary(names, counts, (), dict.fromkeys(ood, 20), sizes, gray, [])


FOLDERS = [(2, 10), (2, 300), (5, 20), (5, 60), (30, 100), (100, 1000), (1000, 5), (1000, 1000)]


@pytest.mark.parametrize(("classes", "each"), FOLDERS)
@pytest.mark.parametrize("method", ["ce", "oal"])
def test_every_open_field_gets_a_sound_value(classes, each, method):
    config, lines = choose(settings(method__name=method), summary(classes, each))
    validate(config)
    assert "-1" not in str([v for k, v in flatten(config).items() if k != "method.um.constraint"])
    train, data = config.train, config.data
    examples = classes * max(1, round(each * 0.7))
    steps = examples // train.batch_size * train.epochs
    assert 1 <= train.batch_size <= examples and train.batch_size.bit_count() == 1
    assert MIN_STEPS <= steps <= MAX_STEPS + examples // train.batch_size
    assert 16 <= data.image_size <= 300 and data.image_size % 8 == 0
    knn = config.outliers.knn
    assert knn.features_per_class <= round(each * 0.7)
    assert not data.stream or examples * data.image_size**2 * 3 > 2**33
    few = any("student.weights=FILE" in line for line in lines)
    assert few == (examples < classes * FEW_IMAGES)
    assert len(lines) == 3 + few + (method == "oal")
    assert method == "ce" or "no generator" in lines[3]


def test_a_value_that_the_user_gives_stays():
    given = {
        "train__epochs": 7,
        "train__batch_size": 5,
        "train__learning_rate": 0.2,
        "student__width": 3,
        "student__stem": "cifar",
        "data__image_size": 40,
        "data__channels": 1,
        "data__shift": 0,
        "data__far": ("photos",),
    }
    config, _ = choose(settings(**given), summary(3, 50, ood=("photos", "drawings")))
    for path, value in given.items():
        section, _, name = path.rpartition("__")
        assert getattr(getattr(config, section), name) == value


def test_channels_sizes_and_ood_sets_are_those_of_the_images():
    config, lines = choose(settings(), summary(3, 50, side=40, gray=True, ood=("a", "b")))
    assert (config.data.channels, config.data.image_size) == (1, 40)
    assert config.data.far == ("a", "b") and "a (20), b (20)" in lines[0]
    near, _ = choose(settings(data__near=("b",)), summary(3, 50, ood=("a", "b")))
    assert near.data.far == ("a",)
    without, _ = choose(settings(), summary(3, 50))
    assert without.data.far == ("none",)


def test_images_that_do_not_fit_in_memory_are_streamed():
    config, lines = choose(settings(), summary(10, 100), memory=10**6)
    assert config.data.stream and config.teacher.views == 0 and "from disk" in lines[1]


def test_a_given_network_is_a_frozen_one_for_few_images_and_takes_its_own_size():
    weights = Weights(224, 3, "vit_small_patch16_224")
    config = settings(student__weights="vit.safetensors")
    few, lines = choose(config, summary(1000, 5), weights)
    assert (few.student.tune, few.data.image_size, few.data.channels) == ("head", 224, 3)
    assert "vit_small_patch16_224" in lines[2] and len(lines) == 3
    many, _ = choose(config, summary(100, 1000), weights)
    assert many.student.tune == "all" and many.train.learning_rate < 0.05
    config.student.tune = "all"
    assert choose(config, summary(5, 60), weights)[0].student.tune == "all"
