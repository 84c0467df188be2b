"""The choice of the headline score, and the warnings of a run."""

import json

import numpy as np
import pytest

import oal_jax
from oal_jax import main
from oal_jax.errors import UserError
from oal_jax.evaluation import Inputs, evaluate, headline
from oal_jax.report import summary
from oal_jax.scores import Head, Outputs

CLASSES, WIDTH = 3, 8


def data(n, shift=0.0, seed=0, width=WIDTH, scale=1.0):
    """Gaussian features around class means, and the logits of a fixed head."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    features = 4 * np.eye(CLASSES, width)[labels] + scale * rng.normal(size=(n, width)) + shift
    features = features.astype(np.float32)
    return Inputs(Outputs(features @ head(width).kernel, features), labels=labels)


def head(width=WIDTH):
    return Head(np.eye(width, CLASSES, dtype=np.float32), np.zeros(CLASSES, np.float32))


def outcome(scores, train, ood, **options):
    groups = {name: name.partition(" ")[0] for name in ood}
    known = data(90, seed=1), data(90, seed=2)
    result = evaluate(scores, train, *known, ood, groups, head(), **options)
    return result, groups


def test_the_best_mean_on_validation_sets_wins_whatever_the_test_sets_say():
    aurocs = {
        "energy": {"a": 80.0, "b": 60.0},
        "knn": {"a": 70.0, "b": 90.0},
        "msp": {"a": 1, "b": 2},
    }
    chosen = headline.choose(aurocs, ["w"])
    assert chosen == headline.Headline("knn", 80.0, "energy", 10.0, ("w",))
    assert "80.00" in chosen.reason and "10.00 above energy" in chosen.reason
    # One validation set is easy for mahalanobis, a near set is not.
    ood = {"validation": data(60, 3.0, seed=3), "near": data(60, 0.0, seed=4)}
    result, groups = outcome(["energy", "mahalanobis"], data(200), ood)
    aurocs = headline.validation_aurocs(result, groups)
    assert set(aurocs["energy"]) == {"validation"}
    assert headline.choose(aurocs).score == "mahalanobis"
    # Against ID validation: the rows of validation.csv are against ID test.
    known, unknown = result.id_val_scores["energy"], result.ood_scores["energy"]["validation"]
    pairs = np.sign(unknown[:, None] - known[None, :])
    assert aurocs["energy"]["validation"] == pytest.approx(50 * (1 + pairs.mean()))


def test_ties_and_single_scores():
    tied = headline.choose({"vim": {"a": 70.001}, "energy": {"a": 70.0}})
    assert (tied.score, tied.runner_up, tied.margin) == ("vim", "energy", 0.0)
    alone = headline.choose({"msp": {"a": 70.0}})
    assert alone == headline.Headline("msp", 70.0, None, None) and "no other" in alone.reason
    blind = headline.choose({"msp": {}, "knn": {}})
    assert blind == headline.Headline("msp", None, None, None)
    assert "no validation OOD sets" in blind.reason and not blind.warnings


def test_a_low_headline_is_a_warning():
    (warning,) = headline.choose({"msp": {"a": 59.9}, "knn": {"a": 50.0}}).warnings
    assert "msp" in warning and "59.9" in warning
    assert not headline.choose({"msp": {"a": 60.0}}).warnings


@pytest.mark.parametrize(
    ("accuracy", "counts", "near_chance"),
    [
        (24.0, [20] * 5, True),
        (29.0, [20] * 5, False),
        (81.0, [80, 20], True),  # always the larger class is right on 80 %
        (95.0, [80, 20], False),
        (54.0, [50, 50], True),
        (9.0, [1] * 1000, True),
        (15.0, [1] * 1000, False),
    ],
)
def test_accuracy_near_chance(accuracy, counts, near_chance):
    labels = np.repeat(np.arange(len(counts)), counts)
    warnings = headline.run_warnings(accuracy, labels, steps=100)
    assert [f"{accuracy:.1f}" in warning for warning in warnings] == [True] * near_chance


def test_few_steps():
    (warning,) = headline.run_warnings(99.0, np.arange(5), steps=6)
    assert "6 optimizer steps" in warning
    assert not headline.run_warnings(99.0, np.arange(5), steps=100)


def test_sound_fits_have_no_warning():
    ood = {"validation": data(40, 1.0, seed=3)}
    result, _ = outcome(["energy", "knn", "vim", "mahalanobis", "mood"], data(200), ood)
    assert headline.fit_warnings(result, data(200)) == []


def test_a_score_that_can_not_be_fitted_is_left_out_aloud():
    ood = {"validation": data(40, 1.0, seed=3)}
    few, params = data(30), {"knn": {"k": 50}}
    with pytest.raises(UserError, match="knn: k=50"):
        outcome(["knn", "energy"], few, ood, params=params)
    options = {"params": params, "leave_out_refused": True}
    result, groups = outcome(["knn", "energy"], few, ood, **options)
    assert list(result.thresholds) == ["energy"] and "k=50" in result.refused["knn"]
    assert {row.score for row in result.validation_rows} == {"energy"}
    (warning,) = headline.fit_warnings(result, few)
    assert "knn is left out" in warning and "k=50" in warning
    assert headline.choose(headline.validation_aurocs(result, groups)).score == "energy"
    with pytest.raises(UserError, match="no score can be computed: knn: k=50"):
        outcome(["knn"], few, ood, **options)


def test_knn_beyond_a_class():
    ood = {"validation": data(40, 1.0, seed=3)}
    result, _ = outcome(["knn"], data(120), ood, params={"knn": {"k": 50}})
    (warning,) = headline.fit_warnings(result, data(120))
    assert "k=50 is more than the 40" in warning
    result, _ = outcome(["knn"], data(120), ood)  # by default a tenth of the images
    assert headline.fit_warnings(result, data(120)) == []


def test_vim_with_an_empty_residual():
    def flat(inputs):
        features = inputs.outputs.features.copy()
        features[:, 4:] = 0  # no feature leaves the principal subspace of 4 directions
        return inputs._replace(outputs=inputs.outputs._replace(features=features))

    train, ood = flat(data(200)), {"validation": flat(data(40, 1.0, seed=3))}
    known = flat(data(90, seed=1))
    groups = {"validation": "validation"}
    result = evaluate(["vim", "residual", "energy"], train, known, known, ood, groups, head())
    warnings = headline.fit_warnings(result, train)
    assert [warning.split()[0] for warning in warnings] == ["vim", "residual"]
    assert "as energy does" in warnings[0]


def test_a_singular_covariance():
    train = data(12, width=20)
    groups, known = {"validation": "validation"}, data(60, seed=1, width=20)
    scores = ["energy", "mahalanobis", "relative_mahalanobis"]
    ood = {"validation": data(40, 1.0, seed=3, width=20)}
    result = evaluate(scores, train, known, known, ood, groups, head(20))
    (warning,) = headline.fit_warnings(result, train)
    assert "mahalanobis, relative_mahalanobis: " in warning and "singular" in warning
    assert "12 training features of width 20" in warning


def test_a_constant_score():
    train, known = data(60), data(60, seed=1)
    same = known.outputs._replace(logits=np.zeros_like(known.outputs.logits))
    known = known._replace(outputs=same)
    result = evaluate(["energy"], train, known, known, {"v": known}, {"v": "validation"})
    (warning,) = headline.fit_warnings(result, train)
    assert "energy" in warning and "every image" in warning


def test_files_and_the_terminal(finished_run, tmp_path, capsys):
    chosen = headline.read(finished_run / "report")
    stored = json.loads((finished_run / "report" / "headline.json").read_text())
    assert stored == chosen._asdict() | {"warnings": list(chosen.warnings)}
    assert chosen.score in ("energy", "mahalanobis", "knn") and chosen.validation_auroc > 0
    assert any("optimizer steps" in warning for warning in chosen.warnings)
    summary.show(finished_run / "report", smoke=True)
    out, err = capsys.readouterr()
    assert f"headline score: {chosen.score}" in out and chosen.runner_up in out
    table = [line.split() for line in out.splitlines()]
    assert table[table.index(next(r for r in table if r[:1] == ["score"])) + 1][0] == chosen.score
    assert err.splitlines() == [f"oal_jax: WARNING: {warning}" for warning in chosen.warnings]
    assert oal_jax.load(finished_run).score.name == chosen.score


def test_a_folder_without_ood_sets_from_start_to_detector(tmp_path, capsys):
    from test_made import folder

    folder(tmp_path / "data", each=24)
    code = main.guard(
        main.run,
        [
            *("main", "--config=configs/fashion_ce.py", f"--workdir={tmp_path / 'run'}"),
            *("--config.data.source=folder", f"--config.data.root={tmp_path / 'data'}"),
            *("--config.data.id_set=mine", "--config.smoke=True", "--config.train.batch_size=24"),
            "--config.evaluation.scores=energy,knn,mahalanobis",
        ],
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    report = tmp_path / "run" / "report"
    assert (report / "ood.csv").read_text().count("\n") == 1
    chosen = headline.read(report)
    assert "valood" in (report / "validation.csv").read_text() and chosen.runner_up
    assert f"headline score: {chosen.score}" in out and "made_jigsaw" in out
    assert "WARNING: the training took" in err
    assert "validation-OOD AUROC" in (report / "index.html").read_text()
    assert oal_jax.load(tmp_path / "run").score.name == chosen.score
