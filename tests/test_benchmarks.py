"""Rows and tables of the suites that train, and the errors of the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation, cases, methods, run, step
from oal_jax.config import Config, flatten, unflatten
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.evaluation.tables import Row, with_means
from oal_jax.runtime.command import guard

CONFIGS = Path(__file__).parent.parent / "configs"


def table(near: float, far: float) -> list[Row]:
    """Four OOD sets with these AUROCs, and the rows of the means."""
    sets = [("a", "near", near), ("b", "near", near + 2), ("c", "far", far), ("v", "validation", 0)]
    rows = [
        Row("energy", name, group, auroc, 0.0, 0.0, 10.0, 20.0, 90.0) for name, group, auroc in sets
    ]
    return with_means(rows, ("near", "far", "validation"))


def test_summary_shows_mean_spread_and_paired_differences():
    tables = {
        ("kd", 0): table(50, 90),
        ("kd", 1): table(60, 92),
        ("oal-random", 0): table(53, 91),
        ("oal-random", 1): table(65, 93),
    }
    text = ablation.summary(tables, ["kd", "oal-random"], [0, 1])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    header = next(line for line in text.splitlines() if line.startswith("| case"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names[:7] == ["case", "a", "b", "c", "near", "far", "all"]
    # The last line of a case is that of the differences: +3 and +5 on a; the mean of a, b, c.
    cells = [cell.strip() for cell in lines["oal-random"].strip("|").split("|")]
    assert cells[1] == "+4.0 ± 1.4 (+3.0 +5.0)"
    assert cells[6] == "+3.0 ± 0.9 (+2.3 +3.7)"
    assert "| kd | 55.0 ± 7.1 |" in text


@pytest.mark.parametrize("suite", [ablation, methods])
def test_every_case_is_a_valid_config(suite, tmp_path):
    for name, case in suite.CASES.items():
        start = {"train.start": str(tmp_path)} if case.start else {}
        config = unflatten(flatten(Config()) | dict(case.changes) | start)
        validate(config)
        assert config.method.name == name.split("-")[0].split("+")[0]
        assert not case.start or case.start in suite.CASES


def test_every_step_is_of_a_valid_config(tmp_path):
    for changes in step.METHODS.values():
        validate(unflatten(flatten(Config()) | changes | {"train.start": str(tmp_path)}))


def test_the_table_of_methods_pairs_seeds_with_the_control():
    def scored(near, far):
        return [r._replace(score=score) for r in table(near, far) for score in methods.SCORES]

    tables = {("ce-more", 0): scored(50, 90), ("um", 0): scored(53, 91)}
    seconds = {("ce-more", 0): 2.0, ("um", 0): 3.0}
    text = methods.summary(tables, seconds, ["ce-more", "um"], [0])
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    assert len(lines) == 2 * len(methods.SCORES)
    um = dict(zip(head, lines[-1], strict=True))
    # Sets a, b and c: 53, 55, 91 against 50, 52, 90.
    assert um["all − ce-more"].startswith("+2.3 ±")
    assert um["AUROC near"].startswith("54.0") and um["train s"].startswith("3.0")


def test_a_row_has_the_fields_that_ratios_are_made_of():
    row = run.row("s", "c", [3.0, 1.0, 2.0], seed=5)
    assert (row["median_s"], row["min_s"], row["max_s"], row["runs"]) == (2.0, 1.0, 3.0, 3)
    assert row["device"] and row["versions"]["jax"] and row["seed"] == 5
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--suite", "ablatoin", "--output", "x"], ["suite 'ablatoin'", "'ablation'"]),
        (["--suite", "ablation", "--output", "x", "--cases", "no"], ["case 'no'"]),
        (["--suite", "ablation", "--output", "x", "--config.a=1"], ["config key 'a'"]),
        (["--suite", "ablation"], ["--output"]),
        (["--output", "x"], ["--suite"]),
    ],
)
def test_a_mistake_is_one_line(argv, words, capsys):
    assert guard(run.run, ["run", *argv]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words) and err.count("\n") == 1


def test_one_suite_at_a_time_writes_an_output(tmp_path, monkeypatch, capsys):
    """The second fails before it runs anything, and leaves the first one's lock."""
    output = tmp_path / "new" / "results.json"
    flags = ["run", "--suite", "ablation", "--output", str(output)]
    codes = []

    def inside(rest):
        if not codes:
            codes.append(None)
            codes[0] = guard(run.run, flags)
            assert list(output.parent.iterdir()) == [output.with_name(".results.json.lock")]
        return []

    monkeypatch.setattr("benchmarks.ablation.run", inside)
    assert guard(run.run, flags) == 0 and codes == [2]
    err = capsys.readouterr().err
    assert f"--output {output}" in err and err.count("\n") == 1
    assert json.loads(output.read_text()) == [] and list(output.parent.iterdir()) == [output]


def test_an_output_that_cannot_be_written_fails_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.ablation.run", lambda rest: pytest.fail("ran"))
    (tmp_path / "file").touch()
    output = str(tmp_path / "file" / "results.json")
    assert guard(run.run, ["run", "--suite", "ablation", "--output", output]) == 2
    err = capsys.readouterr().err
    assert f"--output {output}" in err and err.count("\n") == 1


def test_flags_win_over_what_a_suite_sets():
    flags = [f"--config={CONFIGS / 'fashion.py'}", "--config.train.epochs=3", "--cases=a"]
    settings = {"train.epochs": 2, "train.batch_size": 50, "evaluation.scores": ["energy"]}
    known = {"a": cases.Case({})}
    base = cases.parse(
        "s", "", known, [*flags, "--config.evaluation.scores=msp,knn"], settings
    ).base
    assert (base.train.epochs, base.train.batch_size) == (3, 50)
    assert list(base.evaluation.scores) == ["msp", "knn"]
    with pytest.raises(UserError, match=r"train\.epochs"):
        cases.parse("s", "", known, [*flags, "--config.train.epochs=three"])


def test_a_config_whose_files_are_named_by_flags():
    flags = [f"--config={CONFIGS / 'cifar10_32px.py'}", "--config.smoke=True"]
    assert cases.parse("s", "", {"a": cases.Case({})}, flags).base.smoke


def test_spread_needs_two_values_for_a_deviation():
    assert cases.spread([1.0, 3.0]) == f"2.0 ± {np.std([1, 3], ddof=1):.1f}"


@pytest.mark.slow
def test_a_suite_trains_its_cases_and_resumes(tmp_path, capsys):
    flags = ["--suite=ablation", f"--output={tmp_path / 'results.json'}", "--seeds=0", "--cases=ce"]
    flags += [f"--workdir={tmp_path / 'runs'}", "--config.smoke=True"]
    assert guard(run.run, ["run", *flags]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert (row["case"], row["seed"], row["runs"]) == ("ce", 0, 1)
    assert {"near", "far", "validation"} <= {metrics["group"] for metrics in row["metrics"]}
    assert "| ce |" in capsys.readouterr().out
    assert guard(run.run, ["run", *flags]) == 0
    (again,) = json.loads((tmp_path / "results.json").read_text())
    assert again["metrics"] == row["metrics"] and again["median_s"] == row["median_s"]
