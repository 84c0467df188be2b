"""Fitting, thresholds and csid sets; the search; intervals; OpenOOD's layout; comparing runs."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import norm

from oal_jax import main
from oal_jax import scores as post_hoc
from oal_jax.config import Config, flatten
from oal_jax.errors import UserError
from oal_jax.evaluation import bootstrap, protocol, tables
from oal_jax.evaluation.metrics import METRICS, auroc, ood_metrics
from oal_jax.evaluation.protocol import Inputs, evaluate
from oal_jax.evaluation.search import search, write_search
from oal_jax.evaluation.tables import OpenOODRow, Row, read_csv, write_csv
from oal_jax.report import compare
from oal_jax.scores import Head, Outputs, Score

FASHION = Path(__file__).parents[1] / "configs" / "fashion.py"
CLASSES, WIDTH = 3, 6
GROUPS = {"fog": "csid", "near": "near", "far": "far", "tuning": "validation", "blur": "csid"}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    means = 3 * np.eye(CLASSES, WIDTH, dtype=np.float32)

    def inputs(n, shift=0.0, known=True):
        labels = rng.integers(0, CLASSES, n)
        features = (means[labels] if known else 0) + shift + rng.normal(size=(n, WIDTH))
        features = features.astype(np.float32)
        return Inputs(Outputs(features @ means.T, features), labels=labels if known else None)

    ood = {"fog": inputs(30, 0.4), "near": inputs(50, 0.9, False), "far": inputs(40, 0, False)}
    ood |= {"tuning": inputs(30, -0.3, False), "blur": inputs(20, -0.8)}
    return {
        "id_train": inputs(90),
        "id_val": inputs(61),
        "id_test": inputs(70),
        "ood": ood,
        "groups": GROUPS,
        "head": Head(means.T, np.zeros(CLASSES, np.float32)),
    }


@pytest.fixture(scope="module")
def result(data):
    return evaluate(["energy", "knn"], **data, params={"knn": {"k": 4}}, batch_size=32)


def test_csid_sets_have_accuracy_and_rejected_share(data, result):
    assert [row[:2] for row in result.csid_rows] == [
        (score, name) for score in ("energy", "knn") for name in ("fog", "blur")
    ]
    for row in result.csid_rows:
        shifted = data["ood"][row.dataset]
        right = np.mean(shifted.outputs.logits.argmax(axis=1) == shifted.labels)
        above = result.csid_scores[row.score][row.dataset] > result.thresholds[row.score]
        assert row[2:] == pytest.approx((100 * right, 100 * above.mean()))
    assert {row.dataset for row in result.rows} == {"near", "far", "nearood", "farood"}
    assert set(result.ood_scores["knn"]) == {"near", "far", "tuning"}


def test_full_spectrum_takes_shifted_sets_as_id(data, result):
    rows = {(row.score, row.dataset): row for row in result.full_spectrum_rows}
    assert list(rows) == [(s, d) for s in ("energy", "knn") for d in ("near", "far")] + [
        (s, d) for s in ("energy", "knn") for d in ("nearood", "farood")
    ]
    known = [result.id_scores["knn"], *result.csid_scores["knn"].values()]
    expected = ood_metrics(np.concatenate(known), result.ood_scores["knn"]["far"])
    assert rows["knn", "far"][3:8] == pytest.approx([100 * expected[m] for m in METRICS])
    sets = [data["id_test"], data["ood"]["fog"], data["ood"]["blur"]]
    right = [s.outputs.logits.argmax(axis=1) == s.labels for s in sets]
    assert rows["knn", "far"].id_accuracy == pytest.approx(100 * np.concatenate(right).mean())


def test_shares_called_ood(result):
    shares = protocol.rejected(result)["knn"]
    assert list(shares) == ["ID validation", "ID test", "fog", "blur", "near", "far", "tuning"]
    # 58 of 61 is the least number that keeps 95 %.
    assert shares["ID validation"] == pytest.approx(100 * 3 / 61)
    above = result.id_scores["knn"] > result.thresholds["knn"]
    assert shares["ID test"] == pytest.approx(100 * above.mean())
    assert np.all(np.diff(result.id_val_scores["knn"]) >= 0)


def test_files_for_a_detector(tmp_path, data, result):
    files = protocol.write_detectors(tmp_path, result)
    assert all(path.is_file() for path in files) and len(files) == 4
    assert json.loads((tmp_path / "parameters.json").read_text()) == {"energy": {}, "knn": {"k": 4}}
    limits = json.loads((tmp_path / "thresholds.json").read_text())
    for name in ("energy", "knn"):
        tensors = load_file(tmp_path / "detectors" / f"{name}.safetensors")
        stored = tensors.pop("id_val_scores")
        assert stored.dtype == np.float32
        assert protocol.threshold(stored) == limits[name]
        state = {key.removeprefix("state."): value for key, value in tensors.items()}
        assert {k: v.shape for k, v in state.items()} == {
            k: v.shape for k, v in result.states[name].items()
        }
        score = post_hoc.make(name, **result.params[name])
        again = post_hoc.apply(score, state, data["id_test"].outputs, 32)
        np.testing.assert_array_equal(again, result.id_scores[name])


def test_tables_are_listed_and_ood_csv_has_no_shifted_set(tmp_path, result):
    files = protocol.write_tables(tmp_path, result)
    assert {str(p.relative_to(tmp_path)) for p in files} == {
        "ood.csv", "validation.csv", "fullspectrum.csv", "csid.csv", "openood/energy.csv",
        "openood/knn.csv",
    }  # fmt: skip
    assert all(path.is_file() for path in files)
    assert (tmp_path / "csid.csv").read_text().split("\n")[
        0
    ] == "score,dataset,id_accuracy,rejected"
    assert "fog" not in (tmp_path / "ood.csv").read_text()


def test_scores_are_fitted_where_they_say(data, monkeypatch):
    def factory(on):
        return lambda: Score(
            lambda outputs, labels, head: {"count": jnp.float32(len(labels))},
            lambda state, outputs: state["count"] + outputs.logits[:, 0],
            fit_on=on,
        )

    monkeypatch.setitem(post_hoc.SCORES, "on_train", factory("train"))
    monkeypatch.setitem(post_hoc.SCORES, "on_validation", factory("validation"))
    states = evaluate(["on_train", "on_validation"], **data).states
    assert float(states["on_train"]["count"]) == 90
    assert float(states["on_validation"]["count"]) == 61
    unlabelled = {**data, "id_val": data["id_val"]._replace(labels=None)}
    with pytest.raises(UserError, match="on_validation: ID validation has no labels"):
        evaluate(["on_validation"], **unlabelled)


@pytest.fixture
def moved(monkeypatch):
    """A score that moves images, and notes nothing but what it is given."""

    def factory(step=0.5):
        def perturb(state, forward, images):
            return forward(images + step * images)

        return Score(
            lambda outputs, labels, head: {},
            lambda state, outputs: outputs.logits[:, 0],
            perturb=perturb,
        )

    monkeypatch.setitem(post_hoc.SCORES, "moved", factory)


def _with_images(data):
    rng = np.random.default_rng(1)

    def add(inputs):
        n = len(inputs.outputs.logits)
        images = rng.integers(0, 256, (n, 2, 2, 1), dtype=np.uint8)
        return inputs._replace(images=lambda: images)

    sets = {name: add(data[name]) for name in ("id_train", "id_val", "id_test")}
    return {**data, **sets, "ood": {name: add(x) for name, x in data["ood"].items()}}


def test_scores_that_move_images_see_them_in_unit_range(data, moved):
    sets = _with_images(data)
    found = evaluate(["moved"], **sets, forward=lambda x: Outputs(x.reshape(len(x), -1)))
    for name, values in found.ood_scores["moved"].items():
        first = sets["ood"][name].images()[:, 0, 0, 0]
        np.testing.assert_allclose(values, 1.5 * first / 255, rtol=1e-6)
    first = sets["id_val"].images()[:, 0, 0, 0]
    np.testing.assert_allclose(found.id_val_scores["moved"], np.sort(1.5 * first / 255), rtol=1e-6)


def test_scores_that_move_images_say_what_they_lack(data, moved):
    sets = _with_images(data)
    with pytest.raises(UserError, match=r"moved moves the images.*forward function"):
        evaluate(["moved"], **sets)
    none = {**sets, "id_val": sets["id_val"]._replace(images=None)}
    with pytest.raises(UserError, match="the images of ID validation"):
        evaluate(["moved"], **none, forward=lambda x: Outputs(x.reshape(len(x), -1)))
    few = {**sets, "id_test": sets["id_test"]._replace(images=lambda: sets["ood"]["far"].images())}
    with pytest.raises(UserError, match="ID test has 40 images but 70 outputs"):
        evaluate(["moved"], **few, forward=lambda x: Outputs(x.reshape(len(x), -1)))


def test_a_head_is_asked_for_only_where_it_is_read(data, monkeypatch):
    evaluate(["energy"], **{**data, "head": None})
    needy = lambda: Score(lambda o, y, h: {}, lambda s, o: o.logits[:, 0], needs_head=True)
    monkeypatch.setitem(post_hoc.SCORES, "needy", needy)
    with pytest.raises(UserError, match="needy needs the last linear layer"):
        evaluate(["needy"], **{**data, "head": None})


def test_nan_scores_and_missing_labels_are_refused(data, monkeypatch):
    broken = lambda: Score(lambda o, y, h: {}, lambda s, o: jnp.sqrt(o.logits[:, 0] - 1e3))
    monkeypatch.setitem(post_hoc.SCORES, "broken", broken)
    with pytest.raises(UserError, match="broken: 70 of 70 ood_scores of ID test are NaN"):
        evaluate(["broken"], **data)
    bare = {**data["ood"], "fog": data["ood"]["fog"]._replace(labels=None)}
    with pytest.raises(UserError, match="set fog has no labels"):
        evaluate(["energy"], **{**data, "ood": bare})


def _search(data, grid, name="knn"):
    tuning = {"tuning": data["ood"]["tuning"]}
    return search(name, grid, data["id_train"], data["id_val"], tuning, data["head"], None, 32)


def test_search_is_the_best_of_evaluations(data, tmp_path):
    params, table = _search(data, {"k": (1, 7, 40, 5000)})
    expected = []
    for k in (1, 7, 40):
        sets = {**data, "ood": {"t": data["ood"]["tuning"]}, "groups": {"t": "near"}}
        found = evaluate(["knn"], **sets, params={"knn": {"k": k}})
        expected.append(100 * auroc(found.id_val_scores["knn"], found.ood_scores["knn"]["t"]))
    assert [trial.auroc for trial in table[:3]] == pytest.approx(expected)
    assert params == {"k": (1, 7, 40)[int(np.argmax(expected))]}
    assert [trial.chosen for trial in table] == [trial.params == params for trial in table]
    assert table[3].auroc is None and "5000" in table[3].refusal
    write_search(tmp_path / "search.csv", table)
    lines = list(csv.reader((tmp_path / "search.csv").read_text().splitlines()))
    assert lines[0] == ["score", "parameters", "auroc", "chosen"]
    assert lines[2] == ["knn", "k=7", f"{expected[1]:.4f}", str(int(params["k"] == 7))]
    assert lines[4] == ["knn", "k=5000", "", "0"]


def test_search_fits_anew_and_takes_the_first_of_equals(data, monkeypatch):
    fitted = []

    def factory(width=0, other=0):
        def fit(outputs, labels, head):
            fitted.append((width, other))
            return {"width": jnp.float32(width)}

        return Score(fit, lambda state, outputs: outputs.logits[:, 0] * 0 + state["width"])

    monkeypatch.setitem(post_hoc.SCORES, "shaped", factory)
    params, table = _search(data, {"width": (3, 5), "other": (1, 2)}, "shaped")
    assert fitted == [(3, 1), (3, 2), (5, 1), (5, 2)]
    assert [trial.auroc for trial in table] == [50] * 4  # constant scores
    assert params == {"width": 3, "other": 1}


def test_search_refusals(data):
    with pytest.raises(UserError, match="no value of the grid of knn can be used: knn: k=400"):
        _search(data, {"k": (400, 500)})
    with pytest.raises(UserError, match="validation OOD sets"):
        search("knn", {"k": (1,)}, data["id_train"], data["id_val"], {})
    with pytest.raises(UserError, match="no grid"):
        _search(data, {}, "energy")


@pytest.mark.parametrize("decimals", [1, 8])
def test_resamples_are_those_of_a_plain_loop(decimals, monkeypatch):
    rng = np.random.default_rng(0)
    known = np.round(rng.normal(size=50), decimals)
    unknown = np.round(rng.normal(1, 1, size=30), decimals)
    monkeypatch.setattr(bootstrap, "_CELLS", 560)  # chunks of seven
    found = bootstrap.resample(known, unknown, 40, seed=3, stream=2)
    id_rows = np.random.default_rng(3).integers(0, 50, (40, 50))
    ood_rows = np.random.default_rng([3, 1, 2]).integers(0, 30, (40, 30))
    pairs = zip(known[id_rows], unknown[ood_rows], strict=True)
    expected = [list(ood_metrics(*pair).values()) for pair in pairs]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_intervals_cover_the_truth():
    """Of normals one apart, AUROC is the normal distribution function at 1 / sqrt(2)."""
    rng = np.random.default_rng(0)
    truth = 100 * norm.cdf(1 / np.sqrt(2))
    covered = []
    for seed in range(200):
        known, unknown = rng.normal(size=150), rng.normal(1, 1, size=100)
        found = bootstrap.intervals("s", known, {"a": unknown}, {"a": "near"}, 200, seed)
        (low, high) = next(i[4:] for i in found if i.metric == "auroc")
        covered.append(low <= truth <= high)
    # 95 % of 200, give or take three standard deviations and the bootstrap's own shortfall.
    assert 0.88 <= np.mean(covered) <= 0.99


def test_intervals_of_sets_and_means(tmp_path):
    rng = np.random.default_rng(0)
    known = rng.normal(size=300)
    sets = {name: rng.normal(1, 1, size=200) for name in ("a", "b", "c")}
    groups = {"a": "near", "b": "near", "c": "far"}
    found = bootstrap.intervals("energy", known, sets, groups)
    assert [i.dataset for i in found[:: len(METRICS)]] == ["a", "b", "c", "nearood", "farood"]
    assert found == bootstrap.intervals("energy", known, sets, groups)
    widths = {i.dataset: i.high - i.low for i in found if i.metric == "auroc"}
    # The mean of two sets is known better than each, but not by sqrt(2): they share the ID inputs.
    assert 0.7 * widths["a"] < widths["nearood"] < widths["a"]
    assert widths["farood"] == widths["c"]
    for interval in found[: 3 * len(METRICS)]:
        value = 100 * ood_metrics(known, sets[interval.dataset])[interval.metric]
        assert interval.low <= value <= interval.high
    bootstrap.write_intervals(tmp_path / "intervals.csv", found)
    lines = (tmp_path / "intervals.csv").read_text().split("\n")
    assert lines[0] == "score,dataset,group,metric,low,high" and len(lines) == 27


def test_openood_layout(tmp_path, result):
    protocol.write_tables(tmp_path, result)
    text = (tmp_path / "openood" / "knn.csv").read_text().split("\n")
    assert text[0] == "dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC"
    assert [line.split(",")[0] for line in text[1:-1]] == ["near", "nearood", "far", "farood"]
    row = next(r for r in result.rows if (r.score, r.dataset) == ("knn", "far"))
    columns = (row.fpr_at_95_ood_tpr, row.auroc, row.aupr_in, row.aupr_out, row.id_accuracy)
    assert text[3] == ",".join(["far", *(f"{value:.2f}" for value in columns)])
    read = tables.read_openood(tmp_path / "openood" / "knn.csv")
    assert read[2] == OpenOODRow("far", *(round(value, 2) for value in columns))


def test_published_files_are_read_and_told_apart(tmp_path):
    path = tmp_path / "ebo.csv"
    path.write_text(
        ",FPR@95,AUROC,AUPR_IN,AUPR_OUT,CCR_4,ACC\n"
        "cifar100,66.60 ± 4.46,86.36 ± 0.58,80,90,1,95.06\nTIN,56.08,88.8,1,2,3,95.06\n"
    )
    theirs = tables.read_openood(path)
    assert theirs[0] == OpenOODRow("cifar100", 66.6, 86.36, 80, 90, 95.06)
    ours = [theirs[1]._replace(dataset="tin", auroc=90.0), theirs[1]._replace(dataset="mnist")]
    lines = tables.difference(ours, theirs)
    assert "FPR@95 56.08 -> 56.08 (+0.00), AUROC 88.80 -> 90.00 (+1.20)" in lines[0]
    assert lines[1].split() == ["mnist", "only", "in", "ours"]
    assert lines[2].split() == ["cifar100", "only", "in", "theirs"] and len(lines) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column dataset"),
        ("dataset,AUROC\n", "has no column FPR@95"),
        ("dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\na,1,2,3,4\n", "line 2 is not a data set"),
        ("dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\na,1,2,x,4,5\n", "line 2 is not a data set"),
    ],
)
def test_bad_published_files(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        tables.read_openood(tmp_path / "a.csv")


def test_aggregate_is_mean_and_sample_deviation():
    rng = np.random.default_rng(0)
    runs = [[Row("s", d, "near", *rng.normal(size=6)) for d in ("a", "b")] for _ in range(4)]
    means, deviations = tables.aggregate(runs)
    values = np.array([[row[3:] for row in rows] for rows in runs])
    np.testing.assert_allclose([row[3:] for row in means], values.mean(axis=0))
    np.testing.assert_allclose([row[3:] for row in deviations], values.std(axis=0, ddof=1))
    assert [row[:3] for row in means] == [row[:3] for row in runs[0]]
    assert np.isnan(tables.aggregate(runs[:1])[1][0].auroc)
    with pytest.raises(UserError, match="no row of score s on b"):
        tables.aggregate([runs[0], runs[1][:1]])


def _run(folder, seed, near, far=(99.0, 1.0), **changes):
    """A finished run as far as a comparison reads it."""
    config = flatten(Config()) | {"seed": seed} | changes
    (folder / "report").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        Row(score, dataset, group, value + bonus, 0, 0, fpr, 0, 90 + seed)
        for score, bonus in (("energy", 0.0), ("knn", 0.5))
        for dataset, group, (value, fpr) in (
            ("bag", "near", near),
            ("nearood", "near", near),
            ("mnist", "far", far),
            ("farood", "far", far),
        )
    ]
    write_csv(folder / "report" / "ood.csv", rows)
    return folder


@pytest.fixture
def runs(tmp_path):
    ce = {"method.name": "ce"}
    return [
        _run(tmp_path / "ce0", 0, (80.0, 40.0), **ce),
        _run(tmp_path / "oal1", 1, (92.0, 25.0)),
        _run(tmp_path / "ce1", 1, (84.0, 30.0), **ce),
        _run(tmp_path / "oal0", 0, (90.0, 20.0)),
        _run(tmp_path / "oal2", 2, (94.0, 21.0)),
    ]


def test_seeds_of_a_config_are_one_case(runs):
    cases = compare.read(runs)
    assert [[item.path.name for item in case.runs] for case in cases] == [
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
    # Seeds 0 and 1 are shared: differences of 10 and 8, whatever seed 2 is.
    paired = differences["near-OOD AUROC", "knn"]["B-A"]
    assert paired == pytest.approx((9.0, np.std([10, 8], ddof=1), 2))


def test_comparison_on_the_command_line(runs, tmp_path, capsys):
    paths = [str(path) for path in runs]
    for name in ("page.html", "table.csv"):
        output = tmp_path / "out" / name
        assert main.guard(main.run, ["main", "--compare", *paths, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "92.00 ± 2.00 *" in text and "+9.00 ± 1.41" in text
    page = (tmp_path / "out" / "page.html").read_text()
    assert "<td class=best>92.00 ± 2.00</td>" in page and "http" not in page
    lines = list(csv.reader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert lines[0] == ["case", "score", "measure", "mean", "std", "runs"]
    assert ["B", "energy", "near-OOD AUROC", "92.0000", "2.0000", "3"] in lines
    assert ["B-A", "knn", "near-OOD AUROC", "9.0000", "1.4142", "2"] in lines


def test_starts_and_places_are_no_other_case(tmp_path):
    first = _run(tmp_path / "a", 0, (80.0, 40.0), **{"train.start": "runs/x0", "data.root": "/a"})
    second = _run(tmp_path / "b", 1, (80.0, 40.0), **{"train.start": "runs/x1"})
    fresh = _run(tmp_path / "c", 0, (80.0, 40.0))
    cases = compare.read([first, second, fresh])
    assert [len(case.runs) for case in cases] == [2, 1]


def test_one_run_marks_its_best_score(tmp_path):
    table, differences = compare.compare(compare.read([_run(tmp_path / "a", 0, (80.0, 40.0))]))
    assert compare.best(("near-OOD AUROC", "knn"), table) == {"A"}
    assert compare.best(("near-OOD AUROC", "energy"), table) == set()
    assert not differences


def test_a_published_file_is_one_more_column(runs, tmp_path):
    published = tmp_path / "ebo.csv"
    lines = ["dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC", "bag,30,85,1,2,94"]
    lines += ["nearood,30,85,1,2,94", "svhn,2,98,1,2,94", "farood,2,98,1,2,94"]
    published.write_text("\n".join(lines))
    cases = compare.read([*runs, published])
    table, differences = compare.compare(cases)
    assert cases[-1].label == f"{published}, as score energy"
    assert table["far-OOD AUROC", "energy"]["C"].mean == 98
    assert "C" not in table["far-OOD AUROC", "knn"]
    assert table["ID accuracy", ""]["C"].mean == 94
    text = compare.format_text(cases, table, differences)
    assert "AUROC 85.00 -> 82.00 (-3.00)" in text
    assert [line.split()[0] for line in text.split("\n") if "only in theirs" in line] == ["svhn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "at least one finished run"),
        (["--compare", "RUNS/none"], "has no config.json; it is not the directory of a run"),
        (["--compare", "RUNS/ce0", "RUNS/half"], "half is not finished"),
        (["--compare", "RUNS/ce0", "RUNS/ce1/../ce0"], "twice"),
        (["--compare", "RUNS/ce0", "RUNS/copy"], "are the same run: one config, one seed"),
        (["--compare", "RUNS/ce0", "--output", "x.pdf"], "must end in .html or .csv"),
        (["--compare", "RUNS/ce0", "--output"], "--output wants a file name"),
        (["--compare", "RUNS/ce0", "--stage=report"], "--stage does not go with --compare"),
        (["--compare", "RUNS/ce0", "RUNS/none.csv"], "none.csv is missing"),
        (["--output=x.html", f"--config={FASHION}"], "--output goes with --compare"),
    ],
)
def test_mistakes_of_a_comparison(runs, tmp_path, capsys, arguments, message):
    _run(tmp_path / "copy", 0, (80.0, 40.0), **{"method.name": "ce"})
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    given = [argument.replace("RUNS", str(tmp_path)) for argument in arguments]
    assert main.guard(main.run, ["main", *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_rows_of_a_comparison_are_what_was_written(runs):
    cases = compare.read(runs[:1])
    assert cases[0].mean == read_csv(runs[0] / "report" / "ood.csv")


def test_metrics_and_comparisons_start_no_jax(runs):
    code = (
        "import sys, oal_jax.evaluation.metrics; print('jax' in sys.modules);"
        "from oal_jax import main; main.run(['main', '--compare', *sys.argv[1:]]);"
        "print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *map(str, runs)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    assert out[0] == out[-2] == "False"
