"""Suite `latent_outliers`: its intervals, its tables, its plan, and a whole tiny run of it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from benchmarks import cases, latent_outliers, run
from benchmarks.latent_outliers_tables import FULL, differences, summary, table_of
from benchmarks.paired import paired_interval
from oal_jax import main
from oal_jax.config import Config
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts

CONFIG = Path(__file__).parent.parent / "configs" / "fashion.py"


def test_equal_differences_have_no_width():
    for over in ("seeds", "within", "crossed"):
        found = paired_interval(np.full((5, 3), 1.5), over)
        np.testing.assert_allclose(found, 1.5)


def test_the_order_of_seeds_and_problems_within_the_noise_does_not_matter():
    values = np.random.default_rng(0).normal(1, 2, (12, 1))
    found = paired_interval(values, "crossed")
    assert found == paired_interval(values, "seeds")
    shifted = paired_interval(values + 10, "seeds")
    np.testing.assert_allclose(shifted, np.array(found) + 10)
    assert found.mean == pytest.approx(values.mean()) and found.low < found.mean < found.high


@pytest.mark.parametrize("count", [5, 10, 40])
def test_of_seeds_alone_it_is_the_interval_of_t(count):
    """Of normal values in their expected places; percentiles of a few seeds are a little short."""
    values = stats.norm.ppf((np.arange(count) + 0.5) / count)
    found = paired_interval(values[:, None], "seeds", resamples=40_000)
    half = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
    np.testing.assert_allclose([found.low, found.high], [-half, half], rtol=0.12)


def test_problems_alone_where_there_is_one_seed():
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert np.isnan(paired_interval(values, "seeds").low)
    crossed = paired_interval(values, "crossed")
    assert 1 <= crossed.low < 2.5 < crossed.high <= 4
    assert np.isnan(paired_interval(np.ones((1, 1)), "crossed").low)


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.array([[1, np.nan]]), np.zeros(3)])
def test_intervals_want_numbers(values):
    with pytest.raises(ValueError, match="a row a seed, no NaN"):
        paired_interval(values)


def coverage(over, seeds_of=0.0, problems_of=0.0, noise=1.0, fixed=True, shape=(10, 8)) -> float:
    """How often the interval holds the true mean: of these problems, or of all of their kind."""
    draws, held, trials = np.random.default_rng(7), 0, 500
    for trial in range(trials):
        problems = problems_of * draws.normal(size=(1, shape[1]))
        values = problems + seeds_of * draws.normal(size=(shape[0], 1))
        values = values + noise * draws.normal(size=shape)
        truth = problems.mean() if fixed else 0.0
        found = paired_interval(values, over, resamples=600, seed=trial)
        held += found.low <= truth <= found.high
    return held / trials


def test_coverage_over_seeds_on_these_problems():
    # 500 trials know a share of .95 to .02 (two standard errors).
    assert 0.92 < coverage("seeds", seeds_of=0.5) < 0.98
    assert 0.92 < coverage("seeds", seeds_of=0.5, problems_of=2.0) < 0.98
    assert 0.90 < coverage("seeds", seeds_of=0.5, shape=(5, 8)) < 0.98


def test_coverage_over_seeds_and_problems():
    other = {"seeds_of": 0.5, "problems_of": 1.0, "fixed": False}
    assert 0.92 < coverage("crossed", **other) <= 0.99
    # What problems have in common over the seeds is not in the other two.
    assert coverage("seeds", **other) < 0.85
    assert coverage("within", **other) < 0.9


def test_problems_drawn_anew_in_each_seed_are_careful_about_these_problems():
    assert coverage("within", seeds_of=0.2, problems_of=1.0) > 0.98


def metric(dataset, group, auroc, accuracy):
    return {"dataset": dataset, "group": group, "auroc": auroc, "id_accuracy": accuracy}


def result(case, problem, seed, near, far=90.0, accuracy=80.0, failed=False):
    left = problem != FULL
    metrics = [
        metric("sandal", "near", near if not left else 10, accuracy),
        *([metric("left_out", "near", near, accuracy)] if left else []),
        metric("nearood", "near", -1, accuracy),
        metric("mnist", "far", far - 1, accuracy),
        metric("photos", "far", far + 1, accuracy),
        metric("farood", "far", -1, accuracy),
        metric("val_blend", "validation", 70, accuracy),
        *([metric("val_left_out", "validation", near + 5, accuracy)] if left else []),
        metric("valood", "validation", -1, accuracy),
    ]
    common = {"case": case, "problem": problem, "seed": seed, "control": "b", "score": "energy"}
    if failed:
        return common | {"metrics": None, "train_s": None, "epoch_s": None, "outlier_s": None}
    return common | {"metrics": metrics, "train_s": 12.0, "epoch_s": 3.0, "outlier_s": None}


def results(gain=2.0, **more):
    rows = []
    for seed in range(4):
        for i, problem in enumerate((FULL, "coat", "boot")):
            base = 50 + seed + 10 * i
            rows.append(result("b", problem, seed, base))
            rows.append(result("a", problem, seed, base + gain * i, far=91.0, **more))
    return rows


def test_tables_take_each_problem_s_own_near_sets():
    table = table_of(results(), "a", True)
    assert table.seeds == [0, 1, 2, 3]
    np.testing.assert_allclose(table.of("near")[0], [62, 74])
    np.testing.assert_allclose(table.of("left_out")[0], [67, 79])
    np.testing.assert_allclose(table.of("families"), 70)
    np.testing.assert_allclose(table.of("far"), 91)
    np.testing.assert_allclose(table_of(results(), "b", False).of("near")[:, 0], [50, 51, 52, 53])


def test_differences_are_those_of_a_seed_and_a_problem():
    np.testing.assert_allclose(differences(results(), "a", True, "near"), [[2, 4]] * 4)
    np.testing.assert_allclose(differences(results(), "a", False, "far"), [[1]] * 4)


def test_a_seed_with_a_failed_run_is_left_out_on_both_sides():
    rows = results()
    rows[3] = result("a", "coat", 0, 0, failed=True)
    assert table_of(rows, "a", True).seeds == [1, 2, 3]
    assert differences(rows, "a", True, "near").shape == (3, 2)
    text = summary(rows)
    assert "| a | 11 | 1 |" in text
    assert "+3.00 [+3.00, +3.00]" in text


def test_the_summary_says_what_is_in_the_rows():
    text = summary(results())
    head, _, first = [line.split(" | ") for line in text.splitlines()[2:5]]
    assert first[head.index("far, full")] == "90.0 ± 0.0"
    assert first[head.index("s/outlier |")] == "- |"
    assert text.count("Minus `b`") == 1
    assert "| case | full | coat | boot |" in text
    assert "| a | 51.5 ± 1.3 | 63.5 ± 1.3 | 75.5 ± 1.3 |" in text


def test_pictures(tmp_path):
    found = latent_outliers.draw(results(), tmp_path / "r.json")
    assert [path.name for path in found] == ["r.png", "r.svg"]
    assert found[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"near, class left out" in found[1].read_bytes()
    assert (
        latent_outliers.draw([r for r in results() if r["case"] == "b"], tmp_path / "r.json") == []
    )


def plan(*flags):
    return latent_outliers._parse([f"--config={CONFIG}", *flags])


@pytest.mark.parametrize("name", latent_outliers.CASES)
def test_every_case_is_a_config_on_every_problem(name):
    _, made = plan()
    problems = latent_outliers._chosen(made.base, "", "trained")
    assert len(problems) == 9 and problems["coat"]["data.leave_out"] == ["coat"]
    for changes in problems.values():
        config = latent_outliers.config_of(made.base, changes, latent_outliers.CASES[name])
        validate(config)
        assert config.stages_seed == 0 and config.student.width == 8


def test_a_value_that_depends_on_others():
    _, made = plan("--config.train.epochs=6", "--config.train.batch_size=50", "--size=default")
    of = {
        name: latent_outliers.config_of(made.base, {}, latent_outliers.CASES[name])
        for name in ("kd-longer", "oal-random-half")
    }
    assert of["kd-longer"].train.epochs == 9 and of["kd-longer"].student.width == 16
    assert of["oal-random-half"].method.outlier_batch == 25


def test_what_cases_have_in_common_is_made_once():
    _, parsed = plan()
    names = ("kd", "pixel", "oal-none", "oal-random", "oal-diffusion", "oal-noised", "oal-class")
    configs = {
        name: latent_outliers.config_of(parsed.base, {}, latent_outliers.CASES[name])
        for name in names
    }
    tasks = latent_outliers._shared_by(configs, Path("shared"))
    # `oal-random` samples no more than the report shows.
    made = ["oal-random", "oal-diffusion", "oal-noised", "oal-class"]
    assert [task.workdir.name for task in tasks] == made
    assert [task.only for task in tasks] == ["latents"] * 4
    assert tasks[3].reuse == tuple(task.workdir for task in tasks[:3])
    alone = latent_outliers._shared_by({"kd": configs["kd"]}, Path("shared"))
    assert [task.only for task in alone] == ["features"]


def test_what_an_earlier_run_of_other_cases_made_is_found(tmp_path):
    _, parsed = plan()
    for case in ("pixel", "oal-diffusion"):
        (tmp_path / case).mkdir()
        (tmp_path / case / "config.json").write_text("{}")
    config = latent_outliers.config_of(parsed.base, {}, latent_outliers.CASES["pixel"])
    (task,) = latent_outliers._shared_by({"pixel": config}, tmp_path)
    assert task.reuse == (tmp_path / "oal-diffusion",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--problems=full,coats"], "problem 'coats' is unknown; known: full, t-shirt"),
        (["--cases=kdd"], "case 'kdd' is unknown; known: kd"),
        (["--control=kdd"], "--control 'kdd' is unknown"),
        (["--jobs=0"], "--jobs 0 must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line(flags, words, tmp_path, capsys):
    argv = ["run", "--suite=latent_outliers", f"--output={tmp_path / 'r.json'}"]
    assert main.guard(run.main, [*argv, f"--config={CONFIG}", *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_an_epoch_s_seconds_are_read_from_the_log(tmp_path, monkeypatch):
    from oal_jax.training import log

    clock = iter([0.0, 1.0, 2.0, 7.0, 8.0, 14.0, 15.0, 19.5])
    monkeypatch.setattr(log, "time", SimpleNamespace(time=lambda: next(clock)))
    written = log.MetricsLog(tmp_path, "train")
    for step in range(1, 8):
        written.write(step, {"loss": 1.0} | ({"val_accuracy": 0.5} if step in (1, 3, 5, 7) else {}))
    written.close()
    assert cases.epoch_seconds(tmp_path) == pytest.approx(6.0)  # 1, 7, 14 and 19.5


@pytest.mark.slow
def test_the_suite(tmp_path, capsys):
    work, output = tmp_path / "work", tmp_path / "r.json"
    argv = ["run", "--suite=latent_outliers", f"--output={output}", f"--config={CONFIG}"]
    argv += [f"--workdir={work}", "--problems=coat", "--cases=kd,oal-diffusion", "--seeds=0"]
    argv += ["--control=kd", "--teachers=shipped", "--config.smoke=True", "--keep=False"]
    assert main.guard(run.main, [*argv, "--jobs=2"]) == 0
    rows = json.loads(output.read_text())
    assert [r["case"] for r in rows] == ["kd", "oal-diffusion"]
    assert all(r["problem"] == "coat" and r["train_s"] > 0 for r in rows)
    assert all("left_out" in {m["dataset"] for m in r["metrics"]} for r in rows)
    assert rows[0]["outlier_s"] is None and rows[1]["outlier_s"] > 0
    said = capsys.readouterr().out
    assert "coat, seed 0, kd: done" in said and "Minus `kd`" in said
    assert (tmp_path / "r.svg").exists()
    # Before the students, everything is made once.
    for log in work.glob("coat/seed0/*.log"):
        lines = log.read_text().splitlines()
        for stage in ("teacher", "features", *(["latents"] if "oal" in log.name else [])):
            assert [line for line in lines if line.startswith(f"{stage}: taken from")]
    finished = work / "coat" / "seed0" / "kd"
    assert {p.name for p in finished.iterdir()} == {"config.json", "metrics.jsonl", "result.json"}
    # Again: nothing runs, not even with all that was shared gone.
    shutil.rmtree(work / "coat" / "shared")
    assert main.guard(run.main, [*argv, "--jobs=2"]) == 0
    assert "done" not in capsys.readouterr().out
    assert [r["metrics"] for r in json.loads(output.read_text())] == [r["metrics"] for r in rows]
    assert main.guard(run.main, [*argv, "--config.train.epochs=7"]) == 2
    assert "made by another config" in capsys.readouterr().err


def test_a_failed_training_is_a_row_without_numbers(tmp_path, monkeypatch):
    def collapse(*args, **kwargs):
        Path(args[1]).mkdir(parents=True, exist_ok=True)
        raise latent_outliers.TrainingFailed("student: collapsed")

    monkeypatch.setattr(latent_outliers.pipeline, "run", collapse)
    task = latent_outliers.Task({"seed": 1}, tmp_path / "run")
    monkeypatch.setattr(latent_outliers, "unflatten", lambda flat: Config())
    found = latent_outliers._run(task)
    assert found["metrics"] is None and found["failed"] == "student: collapsed"
    assert artifacts.read_json(tmp_path / "run" / "result.json")["row"] == found
    assert latent_outliers._finished(task) == found
    with pytest.raises(UserError, match="made by another config"):
        latent_outliers._finished(task._replace(config={"seed": 2}))
