"""The config's fields, its rules between fields, and configs of older versions."""

import dataclasses

import pytest

from oal_jax import config
from oal_jax.config import Config, flatten, reference_faults, unflatten
from oal_jax.config.methods import SECTIONS
from oal_jax.config.rules import validate
from oal_jax.config.smoke import shrink
from oal_jax.errors import UserError
from oal_jax.methods import registry
from oal_jax.methods.registry import METHODS
from oal_jax.scores import SCORES


def fields(node=None, path=""):
    """(key, field, default) of every field of a config."""
    node = Config() if node is None else node
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        key = f"{path}.{f.name}" if path else f.name
        if dataclasses.is_dataclass(value):
            yield from fields(value, key)
        else:
            yield key, f, value


def with_value(key, value):
    settings = Config()
    *parents, name = key.split(".")
    node = settings
    for parent in parents:
        node = getattr(node, parent)
    setattr(node, name, value)
    return settings


def problem(key, value):
    with pytest.raises(UserError) as error:
        validate(with_value(key, value))
    return str(error.value)


def test_the_default_is_valid_and_every_field_has_a_meaning():
    validate(Config())
    assert all(f.metadata.get("meaning") for _, f, _ in fields())


def test_names_of_scores_and_methods_are_those_that_exist():
    assert set(config.SCORES) == set(SCORES)
    assert set(SECTIONS) == set(METHODS)
    sections = {f.name for f in dataclasses.fields(config.Method)}
    assert {name for names in SECTIONS.values() for name in names} <= sections


def test_a_user_meets_fewer_than_a_hundred_common_fields_and_at_most_thirteen_of_a_method():
    keys = [key for key, _, _ in fields()]
    common = [key for key in keys if not key.startswith("method.") or key.count(".") == 1]
    assert len(common) < 100
    for sections in SECTIONS.values():
        prefixes = tuple(f"method.{section}." for section in sections)
        assert sum(key.startswith(prefixes) for key in keys if prefixes) <= 13


@pytest.mark.parametrize(
    ("key", "f", "default"),
    [pytest.param(*row, id=row[0]) for row in fields() if row[1].metadata["limits"]],
)
def test_every_limit_is_checked(key, f, default):
    for name, limit in f.metadata["limits"].items():
        outside = {"above": limit, "below": limit, "at_least": limit - 1, "at_most": limit + 1}
        said = problem(key, type(default)(outside[name]))
        assert key in said and f"{limit:g}" in said


def test_every_choice_is_checked():
    for key, f, default in fields():
        if f.metadata["choices"]:
            bad = ("bogus",) if isinstance(default, tuple) else "bogus"
            assert key in problem(key, bad)


def test_all_mistakes_are_reported_at_once():
    settings = Config()
    settings.train.epochs, settings.student.stem = 0, "large"
    with pytest.raises(UserError, match="train.epochs") as error:
        validate(settings)
    assert "student.stem" in str(error.value)
    settings = Config()
    settings.student.depth, settings.teacher.heads = 19, 3
    with pytest.raises(UserError, match="student.depth") as error:
        validate(settings)
    assert "teacher.heads" in str(error.value)


@pytest.mark.parametrize(
    ("section", "small", "large"),
    [
        ("outliers.knn", "neighbour", "features_per_class"),
        ("outliers.knn", "anchors", "boundary_points"),
        ("outliers.knn", "boundary_points", "features_per_class"),
        ("outliers.knn", "per_anchor", "noise_rows"),
        ("method.vos", "per_class", "samples"),
        ("method.npos", "neighbour", "queue_size"),
        ("method.npos", "boundary_points", "queue_size"),
        ("method.npos", "anchors", "boundary_points"),
        ("method.npos", "per_anchor", "candidates"),
    ],
)
def test_sizes_of_outliers_fit_one_another(section, small, large):
    most = flatten(Config())[f"{section}.{large}"]
    said = problem(f"{section}.{small}", most + 1)
    assert f"{section}.{small}={most + 1}" in said and f"{section}.{large}={most}" in said


@pytest.mark.parametrize(
    "settings",
    [
        {"method.name": "um"},
        {"method.name": "umap"},
        {"method.unleash": True},
        {"method.name": "woods"},
        {"method.name": "oal", "method.oal.objective": "club"},
        {"method.name": "npos", "method.npos.contrastive_weight": 0.1},
    ],
)
def test_a_loss_of_the_whole_batch_is_not_accumulated(settings):
    flat = flatten(Config()) | settings | {"train.start": "somewhere"}
    registry.check(unflatten(flat))
    with pytest.raises(UserError, match=r"train\.accumulate"):
        registry.check(unflatten(flat | {"train.accumulate": 2}))


@pytest.mark.parametrize("name", ["oe", "energy", "woods", "oal"])
def test_no_method_trains_on_images_that_it_is_evaluated_on(name):
    settings = unflatten({"method.name": name, "outliers.image_share": 0.1})
    registry.check(settings)
    for images in ("fashion", "sandal", "letters", "val_noise"):
        settings.outliers.images = images
        with pytest.raises(UserError, match=f"outliers.images='{images}'"):
            registry.check(settings)


def test_a_config_comes_back_from_its_flat_form():
    settings = Config()
    settings.method.vos.queue_size, settings.data.near = 7, ("a", "b")
    assert unflatten(flatten(settings)) == settings


def test_keys_of_older_versions_are_ignored_with_a_warning_each():
    flat = flatten(Config(seed=3)) | {"latents.guide.by": "none", "stages_seed": -1}
    with pytest.warns(UserWarning) as warnings:
        assert unflatten(flat) == Config(seed=3)
    text = " ".join(str(w.message) for w in warnings)
    assert len(warnings) == 2 and "latents.guide.by" in text and "stages_seed" in text


def test_the_faults_of_the_official_code_come_together():
    settings = Config()
    faulty = reference_faults(settings)
    changed = {k for k, v in flatten(faulty).items() if flatten(settings)[k] != v}
    assert changed == {"outliers.official_code", "method.oal.objective"}
    validate(faulty)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_smoke_config_is_valid(name):
    settings = Config(smoke=True)
    settings.method.name, settings.train.start = name, "somewhere"
    validate(shrink(settings))
