"""Which stages run, which are skipped, and what a changed value or a damaged file leads to.

The stages here are stand-ins that write one small file each, new at every run.
"""

import dataclasses
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from oal_jax import main
from oal_jax.config import Config, flatten, unflatten
from oal_jax.config.smoke import shrink
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts
from oal_jax.stages import run as pipeline

ALL = [stage.name for stage in pipeline.plan(Config())]


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

    monkeypatch.setattr(pipeline, "import_module", lambda path: stage(path.rpartition(".")[2]))
    return log


def config(**changes):
    """The default config with {"a.b": value} changed."""
    return unflatten({**flatten(Config()), **{k.replace("__", "."): v for k, v in changes.items()}})


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
    ("method", "expected"),
    [
        ("ce", ["train", "evaluate", "report"]),
        ("kd", ["teacher", "features", "train", "evaluate", "report"]),
        ("oal", ALL),
        ("pixel", ALL),
    ],
)
def test_a_method_runs_the_stages_it_needs(ran, tmp_path, method, expected):
    assert run(ran, tmp_path, config(method__name=method)) == expected


AFTER_TRAIN = ["train", "evaluate", "report"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", 1, ALL),
        ("data.train_images", 1000, ALL),
        ("teacher.epochs", 3, ALL[:1] + ALL[2:]),
        # The same weights with other heads are another function.
        ("teacher.heads", 2, ALL[:1] + ALL[2:]),
        ("teacher.views", 0, ALL[2:]),
        ("generator.diffusion_epochs", 3, ["generator", "outliers", "latents", *AFTER_TRAIN]),
        ("outliers.knn.sigma", 0.5, ["outliers", "latents", *AFTER_TRAIN]),
        ("outliers.knn.features_per_class", 400, ALL[3:]),
        ("outliers.source", "knn", AFTER_TRAIN),
        ("latents.guidance", 5.0, ["latents", *AFTER_TRAIN]),
        ("latents.reduction", "flatten", AFTER_TRAIN),
        ("method.energy", 0.3, AFTER_TRAIN),
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
    changed = config(**{key: value})
    assert run(ran, tmp_path, changed, force=True) == expected
    assert run(ran, tmp_path, changed) == []


def test_every_config_value_is_read_by_some_stage_beside_the_report():
    read = [prefix for stage in pipeline.STAGES[:-1] for prefix in stage.reads_config]
    unread = [
        key
        for key in flatten(Config())
        if not any(pipeline._below(key, p) for p in read)
        and not key.startswith(("evaluation.", "mesh."))
    ]
    assert unread == []


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
    monkeypatch.setattr(pipeline, "_package", shipped.joinpath)
    run(ran, tmp_path / "run")
    files[stage].write_text("two")
    assert stage in run(ran, tmp_path / "run")
    run(ran, tmp_path / "trained", config(**{key: True}))
    files[stage].write_text("three")
    assert run(ran, tmp_path / "trained", config(**{key: True})) == []


def test_a_given_generator_that_changes_is_noticed(ran, tmp_path):
    given = tmp_path / "sd"
    (given / "unet").mkdir(parents=True)
    (given / "unet" / "model.safetensors").write_text("one")
    settings = config(**{"generator.directory": str(given)})
    run(ran, tmp_path / "run", settings)
    assert run(ran, tmp_path / "run", settings) == []
    (given / "unet" / "model.safetensors").write_text("another")
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_ends_the_stage_with_one_line(ran, tmp_path, capsys):
    def fill(context):
        (context.directory("features") / "out.safetensors.partial").symlink_to("/dev/full")

    ran.broken["features"] = fill
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
    with pytest.raises(UserError, match="--stage trian is not one of this config's: teacher, "):
        run(ran, tmp_path, only="trian")
    with pytest.raises(UserError, match="--stage latents is not one"):
        run(ran, tmp_path / "ce", config(**{"method.name": "ce"}), only="latents")


def test_another_config_is_refused_with_the_field_and_both_values(ran, tmp_path):
    run(ran, tmp_path, only="teacher")
    with pytest.raises(UserError, match=r"train.epochs was 6, now 9; .*--force"):
        run(ran, tmp_path, config(**{"train.epochs": 9}))
    with pytest.raises(UserError, match=r"seed was 0, now 1 and 1 more"):
        run(ran, tmp_path, config(**{"train.epochs": 9, "seed": 1}))
    assert artifacts.read_json(tmp_path / "config.json") == flatten(Config())


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_damaged_config_json_does_not_cost_the_run(ran, tmp_path, text):
    run(ran, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged; give .*--force") as caught:
        run(ran, tmp_path)
    assert "delete" not in str(caught.value)
    assert run(ran, tmp_path, force=True) == []
    assert run(ran, tmp_path) == []


def test_config_json_gives_the_config_back(ran, tmp_path):
    settings = config(**{"evaluation.scores": ["energy", "knn"], "train.clip": 0.5})
    run(ran, tmp_path, settings, only="teacher")
    assert pipeline.resolve(tmp_path).config == settings
    smoke = dataclasses.replace(settings, smoke=True)
    run(ran, tmp_path / "smoke", smoke, only="teacher")
    assert pipeline.resolve(tmp_path / "smoke").config == shrink(smoke)
    with pytest.raises(UserError, match=r"has no config\.json"):
        pipeline.resolve(tmp_path / "nothing")


def test_a_workdir_below_a_file_is_refused(ran, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is not a writable directory"):
            run(ran, workdir)
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    with pytest.raises(UserError, match="is not a writable directory"):
        run(ran, tmp_path / "taken")


def test_two_runs_at_once_are_refused(ran, tmp_path):
    """Also by force, and the second leaves the first one's config.json as it is."""
    pytest.importorskip("fcntl")
    refused = []

    def again(_):
        del ran.broken["teacher"]
        with pytest.raises(UserError, match="another run is at work") as caught:
            pipeline.run(config(seed=5), tmp_path, force=True)
        refused.append(caught.value)

    ran.broken["teacher"] = again
    assert run(ran, tmp_path) == ALL
    assert refused
    assert run(ran, tmp_path) == []


def test_stages_are_reused_from_another_run_of_the_same_inputs(ran, tmp_path):
    run(ran, tmp_path / "one")
    changed = config(**{"train.learning_rate": 0.3})
    assert run(ran, tmp_path / "two", changed, reuse=tmp_path / "one") == AFTER_TRAIN
    assert run(ran, tmp_path / "two", changed) == []
    assert run(ran, tmp_path / "three", config(seed=1), reuse=tmp_path / "one") == ALL


def test_a_class_with_too_few_images_is_told(tmp_path, capsys):
    import jax

    from oal_jax.runtime import distributed
    from oal_jax.stages import outliers
    from oal_jax.stages.context import Context

    context = Context(config(), Path(tmp_path), distributed.make_mesh(), jax.random.key(0))
    labels = np.int32([0] * 600 + [1] * 3)
    artifacts.write_tensors(
        context.directory("features") / "features.safetensors",
        {"features": np.ones((603, 4), np.float32), "labels": labels},
    )
    code = main.guard(lambda _: outliers.run(context), [])
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    assert "a class of fashion has 3 training images" in err
    assert "features_per_class=500" in err
    assert not (tmp_path / "outliers").exists()
