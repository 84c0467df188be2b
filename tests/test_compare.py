"""`--compare`: seeds of a config grouped, paired differences, OpenOOD's files, its error lines."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oal_jax import main
from oal_jax.config import Config, flatten
from oal_jax.evaluation.tables import Row, write_csv
from oal_jax.report import compare

FASHION = Path(__file__).parents[1] / "configs" / "fashion.py"
PUBLISHED = """dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC
bag,30,85,1,2,94
nearood,30,85,1,2,94
SVHN,2,98,1,2,94
farood,2,98,1,2,94
"""


def finished(folder, seed, near, far=(99.0, 1.0), sets=("bag", "mnist"), **changes):
    """A finished run, as far as a comparison reads it. near, far: AUROC and FPR."""
    config = flatten(Config()) | {"seed": seed} | changes
    (folder / "report").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        Row(score, dataset, group, auroc + bonus, 0.0, 0.0, fpr, 0.0, 90.0 + seed)
        for score, bonus in (("energy", 0.0), ("knn", 0.5))
        for dataset, group, (auroc, fpr) in (
            (sets[0], "near", near),
            ("nearood", "near", near),
            (sets[1], "far", far),
            ("farood", "far", far),
        )
    ]
    write_csv(folder / "report" / "ood.csv", rows)
    return folder


@pytest.fixture
def runs(tmp_path):
    ce = {"method.name": "ce"}
    return [
        finished(tmp_path / "ce0", 0, (80.0, 40.0), **ce),
        finished(tmp_path / "oal1", 1, (92.0, 25.0)),
        finished(tmp_path / "ce1", 1, (84.0, 30.0), **ce),
        finished(tmp_path / "oal0", 0, (90.0, 20.0)),
        finished(tmp_path / "oal2", 2, (94.0, 21.0)),
    ]


def test_seeds_of_a_config_are_one_case(runs):
    cases = compare.read(runs)
    assert [[run.path.name for run in case.runs] for case in cases] == [
        ["ce0", "ce1"],
        ["oal1", "oal0", "oal2"],
    ]
    assert cases[0].label.startswith("method.name=ce; seeds 0 1 (")
    table, differences = compare.compare(cases)
    near = table["near-OOD AUROC", "energy"]
    assert near["A"] == pytest.approx((82.0, np.std([80, 84], ddof=1), 2))
    assert near["B"] == pytest.approx((92.0, 2.0, 3))
    assert table["ID accuracy", ""]["B"].mean == 91
    assert compare.best(("near-OOD AUROC", "energy"), table) == {"B"}
    assert compare.best(("near-OOD FPR at 95 % OOD TPR", "knn"), table) == {"B"}
    assert compare.best(("far-OOD AUROC", "energy"), table) == {"A", "B"}
    # Both cases have seeds 0 and 1: differences of 10 and 8, whatever seed 2 is.
    paired = differences["near-OOD AUROC", "knn"]["B-A"]
    assert paired == pytest.approx((9.0, np.std([10, 8], ddof=1), 2))


def test_starts_and_paths_do_not_make_a_case(tmp_path):
    one = finished(tmp_path / "a", 0, (80.0, 40.0), **{"train.start": "runs/x0", "data.root": "/a"})
    other = finished(tmp_path / "b", 1, (80.0, 40.0), **{"train.start": "runs/x1"})
    fresh = finished(tmp_path / "c", 0, (80.0, 40.0))
    assert [len(case.runs) for case in compare.read([one, other, fresh])] == [2, 1]


def test_keys_newer_than_a_run_have_their_defaults(tmp_path):
    old, new = (finished(tmp_path / name, seed, (80.0, 40.0)) for seed, name in enumerate("ab"))
    config = json.loads((old / "config.json").read_text())
    del config["evaluation.keep_id"]
    (old / "config.json").write_text(json.dumps(config))
    assert len(compare.read([old, new])) == 1


def test_a_single_case_marks_its_best_score(tmp_path):
    table, differences = compare.compare(compare.read([finished(tmp_path / "a", 0, (80.0, 40.0))]))
    assert compare.best(("near-OOD AUROC", "knn"), table) == {"A"}
    assert compare.best(("near-OOD AUROC", "energy"), table) == set()
    assert compare.best(("ID accuracy", ""), table) == set()
    assert table["near-OOD AUROC", "knn"]["A"] == (80.5, None, 1)
    assert not differences


def test_a_published_file_is_one_more_column(runs, tmp_path):
    published = tmp_path / "ebo.csv"
    published.write_text(PUBLISHED)
    cases = compare.read([published, *runs])
    assert cases[-1].label == f"{published}, as score energy"
    table, differences = compare.compare(cases)
    assert table["far-OOD AUROC", "energy"]["C"] == (98, None, 1)
    assert "C" not in table["far-OOD AUROC", "knn"]
    assert table["ID accuracy", ""]["C"].mean == 94
    assert not any("C" in column for cells in differences.values() for column in cells)
    # Set by set, whatever the case of its name.
    by_set = {key[1]: cells for key, cells in table.items() if key[0].startswith("AUROC of each")}
    assert by_set["bag"]["A"].mean == 82 and by_set["bag"]["C"].mean == 85
    assert set(by_set["svhn"]) == {"C"} and set(by_set["mnist"]) == {"A", "B"}
    assert not any("knn" in title for title, _ in table)  # no file for it


def test_the_command_line(runs, tmp_path, capsys):
    (tmp_path / "ebo.csv").write_text(PUBLISHED)
    paths = [str(path) for path in [*runs, tmp_path / "ebo.csv"]]
    for name in ("page.html", "table.csv"):
        output = tmp_path / "out" / name
        assert main.guard(main.run, ["main", "--compare", *paths, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "92.00 ± 2.00 *" in text and "+9.00 ± 1.41" in text
    page = (tmp_path / "out" / "page.html").read_text()
    assert "<td class=best>92.00 ± 2.00</td>" in page and "+9.00 ± 1.41" in page
    assert "http" not in page and "<script" not in page
    lines = list(csv.reader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert lines[0] == ["case", "score", "measure", "mean", "std", "runs"]
    assert ["B", "energy", "near-OOD AUROC", "92.0000", "2.0000", "3"] in lines
    assert ["C", "energy", "near-OOD AUROC", "85.0000", "", "1"] in lines
    assert ["B-A", "knn", "near-OOD AUROC", "9.0000", "1.4142", "2"] in lines


def test_an_output_to_stdout_is_csv_alone(runs):
    command = [sys.executable, "-m", "oal_jax", "train", "--compare", *map(str, runs)]
    command += ["--output", "/dev/stdout"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = list(csv.reader(child.stdout.splitlines()))
    assert lines[0][0] == "case" and {len(line) for line in lines} == {6}
    assert "mean ± sample" in child.stderr


def test_names_are_escaped_on_the_page(tmp_path):
    path = finished(tmp_path / "<b>&", 0, (80.0, 40.0))
    page = compare.format_page(compare.read([path]))
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page


def test_runs_on_different_sets_get_a_note(runs, tmp_path):
    other = finished(
        tmp_path / "x", 0, (80.0, 40.0), sets=("shoe", "mnist"), **{"data.flip": False}
    )
    for paths, noted in ((runs, False), ([*runs, other], True)):
        cases = compare.read(paths)
        for text in (compare.format_text(cases), compare.format_page(cases)):
            assert ("different sets" in text) == noted


def test_the_page_has_the_notes_of_the_terminal(runs, tmp_path):
    tiny = finished(tmp_path / "tiny", 5, (80.0, 40.0), smoke=True)
    cases = compare.read([*runs, tiny])
    terminal = compare.format_text(cases).splitlines()
    notes = [line.removeprefix("note: ") for line in terminal if line.startswith("note: ")]
    page = compare.format_page(cases)
    assert all(note in page for note in notes)
    assert ["C" in n for n in notes if "SMOKE" in n] == [True]
    assert any("B shares 2 seeds with A" in note for note in notes)  # one of B's has no partner


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--compare"], "--compare"),
        (["--compare", "RUNS/none"], "none has no config.json"),
        (["--compare", "RUNS/ce0", "RUNS/half"], "half is not finished"),
        (["--compare", "RUNS/ce0", "RUNS/broken"], "broken/config.json is damaged"),
        (["--compare", "RUNS/ce0", "RUNS/empty"], "ood.csv has no rows"),
        (["--compare", "RUNS/ce0", "RUNS/ce1/../ce0"], "twice"),
        (["--compare", "RUNS/ce0", "RUNS/copy"], "the same run"),
        (["--compare", "RUNS/ce0", "RUNS/other"], "score energy on bag"),
        (["--compare", "RUNS/ce0", "--output", "x.pdf"], "x.pdf"),
        (["--compare", "RUNS/ce0", "--output"], "--output"),
        (["--compare", "RUNS/ce0", "--output", "RUNS/ce0/config.json/x.csv"], "x.csv can't"),
        (["--compare", "RUNS/ce0", "--stage=report"], "--stage"),
        (["--compare", "RUNS/ce0", "RUNS/none.csv"], "none.csv is missing"),
        (["--output=x.html", f"--config={FASHION}"], "--compare"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, arguments, named):
    ce = {"method.name": "ce"}
    finished(tmp_path / "copy", 0, (80.0, 40.0), **ce)
    finished(tmp_path / "other", 2, (80.0, 40.0), sets=("shoe", "mnist"), **ce)
    write_csv(finished(tmp_path / "empty", 3, (1.0, 1.0)) / "report" / "ood.csv", [])
    for name, text in (("half", "{}"), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    arguments = [argument.replace("RUNS", str(tmp_path)) for argument in arguments]
    assert main.guard(main.run, ["main", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0]


def test_a_comparison_starts_no_jax(runs):
    code = (
        "import sys, oal_jax.evaluation.metrics; print('jax' in sys.modules);"
        "from oal_jax import main; main.run(['main', '--compare', *sys.argv[1:]]);"
        "print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *map(str, runs)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    assert out[0] == out[-2] == "False"
