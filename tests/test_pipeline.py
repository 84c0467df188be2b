"""Which stages run, which are skipped, and what a changed value or a damaged file leads to.

The stages here are stand-ins that write one small file each, new at every run.
"""

import copy
import dataclasses
import errno
import itertools
import os
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import changed as with_values
from helpers import refusal
from small_stable_diffusion import SHIPPED

import oal_jax
from oal_jax import main
from oal_jax.config import Config, flatten, unflatten
from oal_jax.config.methods import SECTIONS
from oal_jax.config.smoke import shrink
from oal_jax.runtime import artifacts
from oal_jax.stages import check
from oal_jax.stages import plan as plans
from oal_jax.stages import run as pipeline

CONFIGS = Path(__file__).parent.parent / "configs"


def config(**changes):
    """A config that needs every stage, with {"a.b": value} changed."""
    return with_values(Config(), {"outliers.source": "diffusion", **changes})


def plan_of(settings):
    return [stage.name for stage in plans.plan(settings)]


ALL = [stage.name for stage in plans.STAGES if stage.name != "estimate_loss"]
AFTER_TRAIN = ["train", "evaluate", "report"]


@pytest.fixture
def ran(monkeypatch):
    """Names of the stages in the order they ran; `ran.broken` holds what a stage does instead."""
    numbers = itertools.count()

    class Ran(list):
        broken = {}  # noqa: RUF012

    log = Ran()

    def stage(name):
        def run(context):
            log.append(name)
            if name in log.broken:
                log.broken[name](context)
            path = context.directory(name) / "out.safetensors"
            artifacts.write_tensors(path, {"n": np.array([next(numbers)])})
            return [path]

        return SimpleNamespace(run=run)

    # The stages read nothing, so there is nothing to check before them.
    monkeypatch.setattr(check, "require", lambda context, reuse: None)
    monkeypatch.setattr(pipeline, "import_module", lambda path: stage(path.rpartition(".")[2]))
    return log


def run(ran, workdir, settings=None, **more):
    """The names of the stages that ran."""
    ran.clear()
    pipeline.run(settings or config(), workdir, **more)
    return list(ran)


def test_a_second_run_skips_everything(ran, tmp_path, capsys):
    assert run(ran, tmp_path) == ALL
    assert run(ran, tmp_path) == []
    assert capsys.readouterr().out.count("done already, skipped") == len(ALL)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ALL),
        ({"outliers.source": "random"}, [n for n in ALL if n != "outliers"]),
        ({"outliers.source": "knn"}, [n for n in ALL if n not in ("generator", "latents")]),
        ({"outliers.source": "none"}, ["teacher", "features", *AFTER_TRAIN]),
        (
            {"outliers.source": "none", "outliers.image_share": 0.5, "outliers.images": "decoded"},
            ALL,
        ),
        ({"method.oal.objective": "club"}, ALL),
        ({"method.name": "pixel"}, ALL),
        ({"method.name": "kd"}, ["teacher", "features", *AFTER_TRAIN]),
        ({"method.name": "kd", "teacher.views": 0}, ["teacher", *AFTER_TRAIN]),
        ({"method.name": "ce"}, AFTER_TRAIN),
        ({"method.name": "oe"}, AFTER_TRAIN),
        ({"method.name": "oe", "outliers.images": "decoded"}, ALL),
        ({"method.name": "woods"}, ["estimate_loss", *AFTER_TRAIN]),
        ({"method.name": "um", "method.um.constraint": 0.1}, AFTER_TRAIN),
    ],
)
def test_no_stage_runs_that_the_training_does_not_read(ran, tmp_path, changes, expected):
    settings = config(**changes)
    assert plan_of(settings) == expected
    if settings.method.name in ("woods", "um"):  # they need a trained start
        return
    assert run(ran, tmp_path, settings) == expected


def test_the_default_on_fashion_samples_no_outliers():
    settings = runpy.run_path(str(CONFIGS / "fashion.py"))["get_config"]()
    assert "outliers" not in plan_of(settings)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", 1, ALL),
        ("data.train_images", 8000, ALL),
        ("teacher.epochs", 3, ALL[:1] + ALL[2:]),
        # The same weights with other heads are another function.
        ("teacher.heads", 2, ALL[:1] + ALL[2:]),
        ("teacher.views", 0, ALL[2:]),
        ("generator.diffusion_epochs", 3, ["generator", "outliers", "latents", *AFTER_TRAIN]),
        ("outliers.knn.sigma", 0.5, ["outliers", "latents", *AFTER_TRAIN]),
        ("outliers.knn.features_per_class", 400, ALL[3:]),
        ("outliers.source", "knn", ["outliers", *AFTER_TRAIN]),
        ("latents.guidance", 5.0, ["latents", *AFTER_TRAIN]),
        ("method.oal.energy_weight", 0.3, AFTER_TRAIN),
        ("method.vos.weight", 0.3, ["report"]),  # the page shows the whole config
        ("student.width", 8, AFTER_TRAIN),
        ("train.learning_rate", 0.3, AFTER_TRAIN),
        ("evaluation.batch_size", 100, ["evaluate", "report"]),
        ("evaluation.scores", ["energy"], ["report"]),
        ("evaluation.keep_id", 0.9, ["report"]),
    ],
)
def test_a_changed_value_reruns_what_reads_it_and_what_depends_on_that(
    ran, tmp_path, key, value, expected
):
    run(ran, tmp_path)
    settings = config(**{key: value})
    assert run(ran, tmp_path, settings, force=True) == expected
    assert run(ran, tmp_path, settings) == []


def leaves(node, prefix=""):
    """(key, dataclass field, value) of every value of a config."""
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, value


def another(f, value):
    """Some other value of the same field."""
    if f.metadata.get("choices"):
        return next(choice for choice in f.metadata["choices"] if choice != value)
    if isinstance(value, bool):
        return not value
    return {str: "other", tuple: ("other",)}.get(type(value)) or value + 1


# They change no result: on which devices, with how much memory, how many files are left.
WITHOUT_EFFECT = {
    *("mesh.model", "data.workers", "student.remat", "teacher.remat", "train.keep_checkpoints"),
}


def test_every_value_is_read_by_a_stage_before_the_report():
    unread = set()
    for key, f, value in leaves(Config()):
        if key.startswith("evaluation."):
            continue
        method, (group, *rest) = "oal", key.split(".")
        if group == "method" and len(rest) == 2:
            method = next(name for name in SECTIONS if rest[0] in SECTIONS[name])
        before = with_values(Config(), {"method.name": method})
        after = with_values(copy.deepcopy(before), {key: another(f, value)})
        if all(stage.reads(before) == stage.reads(after) for stage in plans.STAGES[:-1]):
            unread.add(key)
    assert unread == WITHOUT_EFFECT


@pytest.mark.parametrize("key", ["teacher.train", "generator.train"])
def test_shipped_weights_are_inputs(ran, tmp_path, monkeypatch, key):
    stage = key.partition(".")[0]
    shipped = tmp_path / "package"
    folder = shipped / "pretrained" / "weights"
    (folder / "fashion_sd").mkdir(parents=True)
    files = {
        "teacher": folder / "fashion_teacher.safetensors",
        "generator": folder / "fashion_sd" / "model_index.json",
    }
    for path in files.values():
        path.write_text("one")
    monkeypatch.setattr(plans, "files", lambda package: shipped)
    run(ran, tmp_path / "run")
    files[stage].write_text("two")
    assert stage in run(ran, tmp_path / "run")
    run(ran, tmp_path / "trained", config(**{key: True}))
    files[stage].write_text("three")
    assert run(ran, tmp_path / "trained", config(**{key: True})) == []


def test_a_changed_file_of_the_generator_is_noticed(ran, tmp_path):
    directory = shutil.copytree(SHIPPED, tmp_path / "sd")
    settings = config(**{"generator.directory": str(directory)})
    run(ran, tmp_path / "run", settings)
    assert run(ran, tmp_path / "run", settings) == []
    (directory / "model_index.json").write_text("{}")
    assert run(ran, tmp_path / "run", settings)[0] == "generator"


def damage(path, how):
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("how", ["deleted", "truncated", "altered"])
@pytest.mark.parametrize("name", ["out.safetensors", "manifest.json"])
def test_damage_is_refused_by_name_and_redone_by_force(ran, tmp_path, capsys, how, name):
    run(ran, tmp_path)
    damage(tmp_path / "features" / name, how)
    capsys.readouterr()
    if (name, how) != ("manifest.json", "deleted"):  # without a manifest a stage is not done
        code = main.guard(lambda _: run(ran, tmp_path), [])
        out, err = capsys.readouterr()
        assert code == 2
        assert err.count("\n") == 1
        assert str(tmp_path / "features" / name) in err
        assert "--force" in err
        assert out == "teacher: done already, skipped\ngenerator: done already, skipped\n"
        assert ran == []
    assert run(ran, tmp_path, force=True) == ALL[2:]
    assert run(ran, tmp_path) == []


def test_an_interrupted_stage_is_not_done_and_finds_what_it_left(ran, tmp_path):
    def stop(context):
        (context.directory("train") / "checkpoint").write_text("half-way")
        raise KeyboardInterrupt

    ran.broken["train"] = stop
    with pytest.raises(KeyboardInterrupt):
        run(ran, tmp_path)
    assert not (tmp_path / "train" / "manifest.json").exists()
    seen = []
    ran.broken["train"] = lambda context: seen.append(
        (context.directory("train") / "checkpoint").exists()
    )
    assert run(ran, tmp_path) == AFTER_TRAIN
    assert seen == [True]


def test_nothing_of_other_inputs_is_resumed(ran, tmp_path):
    def stop(context):
        (context.directory("train") / "checkpoint").write_text("half-way")
        raise KeyboardInterrupt

    ran.broken["train"] = stop
    with pytest.raises(KeyboardInterrupt):
        run(ran, tmp_path)
    seen = []
    ran.broken["train"] = lambda context: seen.append(
        (context.directory("train") / "checkpoint").exists()
    )
    run(ran, tmp_path, config(**{"train.learning_rate": 0.3}), force=True)
    assert seen == [False]


def test_a_full_disk_ends_the_stage_with_one_line(ran, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        ran.broken["features"] = lambda _: patch.setattr(os, "fsync", full)
        code = main.guard(lambda _: run(ran, tmp_path), [])
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1 and "disk is full" in err
    assert [p.name for p in (tmp_path / "features").iterdir()] == ["started.json"]
    del ran.broken["features"]
    assert run(ran, tmp_path) == ALL[2:]


def test_stage_stops_after_the_one_named(ran, tmp_path):
    assert run(ran, tmp_path, only="features") == ALL[:3]
    assert run(ran, tmp_path) == ALL[3:]
    stages = lambda settings, name: pipeline.run(settings, tmp_path / "other", only=name)
    assert "--stage trian" in refusal(stages, config(), "trian")
    assert "--stage latents" in refusal(stages, config(**{"method.name": "ce"}), "latents")


def test_another_config_is_refused_with_the_field_and_both_values(ran, tmp_path):
    run(ran, tmp_path, only="teacher")
    message = refusal(pipeline.run, config(**{"train.epochs": 9}), tmp_path)
    assert "train.epochs was 6, now 9" in message and "--force" in message
    message = refusal(pipeline.run, config(**{"train.epochs": 9, "seed": 1}), tmp_path)
    assert "seed was 0, now 1" in message
    assert artifacts.read_json(tmp_path / "config.json") == flatten(config())


def test_a_run_continues_with_other_devices_and_readers(ran, tmp_path):
    run(ran, tmp_path)
    flat = artifacts.read_json(tmp_path / "config.json")
    assert flat.pop("mesh.model") == 1
    artifacts.write_json(tmp_path / "config.json", flat)  # of a version without this key
    assert run(ran, tmp_path, config(**{"data.workers": 2})) == []
    assert "mesh.model=3" in refusal(pipeline.run, config(**{"mesh.model": 3}), tmp_path)


def test_keys_of_an_older_version_are_dropped_with_a_warning(ran, tmp_path):
    run(ran, tmp_path)
    old = {"latents.guide.rate": 0.5, "method.micl": "energy", "outliers.lazy": True, "knn": 1}
    artifacts.write_json(tmp_path / "config.json", flatten(config()) | old)
    for key in old:
        with pytest.warns(UserWarning, match=f"'{key}'"):
            assert unflatten({**flatten(config()), key: old[key]}) == config()
    with pytest.warns(UserWarning) as caught:
        assert pipeline.resolve(tmp_path).config == config()
    assert len(caught) == len(old)
    assert run(ran, tmp_path) == []


def test_a_finished_run_of_an_older_version_loads(finished_run, tmp_path):
    run_parts = ("config.json", "train", "evaluate", "report")
    for name in run_parts[1:]:
        (tmp_path / name).symlink_to(finished_run / name)
    shutil.copy(finished_run / "config.json", tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    expected = oal_jax.load(finished_run)(images).ood_score
    flat = artifacts.read_json(tmp_path / "config.json") | {"latents.select.of": 2}
    artifacts.write_json(tmp_path / "config.json", flat)
    with pytest.warns(UserWarning, match=r"latents\.select\.of"):
        detector = oal_jax.load(tmp_path)
    np.testing.assert_array_equal(detector(images).ood_score, expected)


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_damaged_config_json_does_not_cost_the_run(ran, tmp_path, text):
    run(ran, tmp_path)
    (tmp_path / "config.json").write_text(text)
    message = refusal(pipeline.run, config(), tmp_path)
    assert "config.json" in message and "--force" in message
    assert run(ran, tmp_path, force=True) == []
    assert run(ran, tmp_path) == []


def test_config_json_gives_the_config_back(ran, tmp_path):
    settings = config(**{"evaluation.scores": ("energy", "knn"), "train.clip": 0.5})
    run(ran, tmp_path, settings, only="teacher")
    assert pipeline.resolve(tmp_path).config == settings
    smoke = dataclasses.replace(settings, smoke=True)
    run(ran, tmp_path / "smoke", smoke, only="teacher")
    assert pipeline.resolve(tmp_path / "smoke").config == shrink(smoke)
    assert "config.json" in refusal(pipeline.resolve, tmp_path / "nothing")


def test_a_workdir_below_a_file_is_refused(ran, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(workdir) in refusal(pipeline.run, config(), workdir)
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    assert str(tmp_path / "taken") in refusal(pipeline.run, config(), tmp_path / "taken")


def test_two_runs_at_once_are_refused(ran, tmp_path):
    """Also by force, and the second leaves the first one's config.json as it is."""
    pytest.importorskip("fcntl")
    refused = []

    def again(_):
        del ran.broken["teacher"]
        other = lambda: pipeline.run(config(seed=5), tmp_path, force=True)
        refused.append(refusal(other))

    ran.broken["teacher"] = again
    assert run(ran, tmp_path) == ALL
    assert str(tmp_path) in refused[0]
    assert run(ran, tmp_path) == []


def test_stages_are_reused_from_another_run_of_the_same_inputs(ran, tmp_path):
    run(ran, tmp_path / "one")
    other = config(**{"train.learning_rate": 0.3})
    assert run(ran, tmp_path / "two", other, reuse=tmp_path / "one") == AFTER_TRAIN
    assert run(ran, tmp_path / "two", other) == []
    assert run(ran, tmp_path / "three", config(seed=1), reuse=tmp_path / "one") == ALL
