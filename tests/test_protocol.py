"""Fitting, thresholds, csid sets, files of a result; the search."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from oal_jax import scores as post_hoc
from oal_jax.errors import UserError
from oal_jax.evaluation import protocol
from oal_jax.evaluation.metrics import METRICS, auroc, ood_metrics
from oal_jax.evaluation.protocol import Inputs, evaluate
from oal_jax.evaluation.search import search, write_search
from oal_jax.scores import Head, Outputs, Score

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
            lambda outputs, labels, head, mesh: {"count": jnp.float32(len(labels))},
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
            lambda outputs, labels, head, mesh: {},
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
    result = evaluate(["moved"], **sets, forward=lambda x: Outputs(x.reshape(len(x), -1)))
    for name, values in result.ood_scores["moved"].items():
        first = sets["ood"][name].images()[:, 0, 0, 0]
        np.testing.assert_allclose(values, 1.5 * first / 255, rtol=1e-6)
    first = sets["id_val"].images()[:, 0, 0, 0]
    np.testing.assert_allclose(result.id_val_scores["moved"], np.sort(1.5 * first / 255), rtol=1e-6)


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
    needy = lambda: Score(lambda o, y, h, m: {}, lambda s, o: o.logits[:, 0], needs_head=True)
    monkeypatch.setitem(post_hoc.SCORES, "needy", needy)
    with pytest.raises(UserError, match="needy needs the last linear layer"):
        evaluate(["needy"], **{**data, "head": None})


def test_nan_scores_and_missing_labels_are_refused(data, monkeypatch):
    broken = lambda: Score(lambda o, y, h, m: {}, lambda s, o: jnp.sqrt(o.logits[:, 0] - 1e3))
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
        result = evaluate(["knn"], **sets, params={"knn": {"k": k}})
        expected.append(100 * auroc(result.id_val_scores["knn"], result.ood_scores["knn"]["t"]))
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
        def fit(outputs, labels, head, mesh):
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


def test_rows_and_their_order(data, result):
    scores = ("energy", "knn")
    assert [(row.score, row.dataset) for row in result.rows] == [
        (score, name) for score in scores for name in ("near", "far")
    ] + [(score, name) for score in scores for name in ("nearood", "farood")]
    assert [(row.score, row.dataset) for row in result.validation_rows] == [
        (score, "tuning") for score in scores
    ] + [(score, "valood") for score in scores]
    rows = {(row.score, row.dataset): row for row in result.rows}
    metrics = ood_metrics(result.id_scores["knn"], result.ood_scores["knn"]["near"])
    assert rows["knn", "near"][3:8] == pytest.approx([100 * metrics[m] for m in METRICS])
    test = data["id_test"]
    right = 100 * np.mean(test.outputs.logits.argmax(axis=1) == test.labels)
    assert [row.id_accuracy for row in result.rows] == pytest.approx([right] * 8)


def test_thresholds_keep_95_percent_of_validation(data, result):
    logits = data["id_val"].outputs.logits.astype(np.float64)
    energy = -np.log(np.exp(logits).sum(axis=1))
    share = np.mean(energy <= result.thresholds["energy"] + 1e-4)
    assert share == pytest.approx(58 / 61)  # the smallest share of 61 above 95 %


def test_no_validation_file_without_validation_sets(tmp_path, data):
    protocol.write_tables(
        tmp_path, evaluate(["msp"], **{**data, "ood": {"far": data["ood"]["far"]}})
    )
    assert [path.name for path in tmp_path.glob("*.csv")] == ["ood.csv"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"groups": {**GROUPS, "near": "middle"}}, "'near'"),
        ({"groups": {}}, "group"),
        ({"groups": {"farood": "near"}, "ood": "farood"}, "farood"),
        ({"score_names": ["msp", "msp"]}, "msp"),
        ({"score_names": ["mps"]}, "'msp'"),
        ({"params": {"knn": {"k": 3}}}, "'knn'"),
        ({"ood": "nan"}, "msp.* bag"),
    ],
)
def test_mistakes_are_one_line(data, change, named):
    near = data["ood"]["near"]
    broken = near.outputs._replace(logits=near.outputs.logits * np.nan)
    sets = {"farood": {"farood": near}, "nan": {"bag": near._replace(outputs=broken)}}
    if "ood" in change:
        change = {"groups": {"bag": "near"}} | change | {"ood": sets[change["ood"]]}
    with pytest.raises(UserError, match=named) as error:
        evaluate(**{"score_names": ["msp"], **data, **change})
    assert "\n" not in str(error.value)
