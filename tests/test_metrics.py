"""Metrics against sklearn, the published definitions, and properties that hold for any data."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk

from oal_jax.evaluation import metrics
from oal_jax.evaluation.metrics import METRICS, ood_metrics
from oal_jax.evaluation.protocol import threshold

# Few distinct values, so that ties within and between the sets are the rule.
tied = st.integers(-6, 6).map(float)
wide = st.floats(-1e6, 1e6, width=32)
sizes = st.integers(1, 40)
scores = st.one_of(arrays(np.float64, sizes, elements=e) for e in (tied, wide))
fast = settings(max_examples=60, deadline=None)


def sklearn_metrics(id_scores, ood_scores):
    """The same five numbers, each from sklearn's own curve."""
    values = np.concatenate([id_scores, ood_scores])
    is_ood = np.arange(len(values)) >= len(id_scores)
    fpr, tpr, _ = sk.roc_curve(is_ood, values, drop_intermediate=False)
    id_fpr, id_tpr, _ = sk.roc_curve(~is_ood, -values, drop_intermediate=False)
    out_precision, out_recall, _ = sk.precision_recall_curve(is_ood, values)
    in_precision, in_recall, _ = sk.precision_recall_curve(~is_ood, -values)
    return {
        "auroc": sk.roc_auc_score(is_ood, values),
        "aupr_in": sk.auc(in_recall, in_precision),
        "aupr_out": sk.auc(out_recall, out_precision),
        "fpr_at_95_ood_tpr": fpr[np.argmax(tpr >= 0.95)],
        "fpr_at_95_id_tpr": id_fpr[np.argmax(id_tpr >= 0.95)],
    }


@fast
@given(scores, scores)
def test_agrees_with_sklearn(id_scores, ood_scores):
    ours, theirs = ood_metrics(id_scores, ood_scores), sklearn_metrics(id_scores, ood_scores)
    assert tuple(ours) == METRICS
    for name in METRICS:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-12, err_msg=name)


def test_agrees_with_sklearn_on_many_scores():
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(size=3000), np.round(rng.normal(1, 1, size=2000), 1)
    ours, theirs = ood_metrics(id_scores, ood_scores), sklearn_metrics(id_scores, ood_scores)
    for name in METRICS:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-12, err_msg=name)


def test_vector_of_the_official_code():
    """Confidences there are higher for ID, so ood_scores are their negatives."""
    id_scores, ood_scores = -np.array([0.9, 0.8, 0.7, 0.2]), -np.array([0.6, 0.3, 0.1, 0.05])
    values = ood_metrics(id_scores, ood_scores)
    assert values["auroc"] == 0.875
    assert values["fpr_at_95_ood_tpr"] == 0.25
    assert values["fpr_at_95_id_tpr"] == 0.5


def test_aupr_names_are_not_swapped():
    """With few ID inputs among many OOD ones, a constant score has their share as precision."""
    values = ood_metrics(np.zeros(1), np.zeros(9))
    assert values["aupr_in"] == pytest.approx((1 + 0.1) / 2)  # trapezoid from precision 1 to 0.1
    assert values["aupr_out"] == pytest.approx((1 + 0.9) / 2)


def test_single_functions_are_entries_of_the_dict():
    id_scores, ood_scores = np.array([0.1, 0.4, 0.4]), np.array([0.4, 0.9])
    for name, value in ood_metrics(id_scores, ood_scores).items():
        assert getattr(metrics, name)(id_scores, ood_scores) == value


@pytest.mark.parametrize("n", [20, 100, 1000])
def test_95_percent_is_reached_exactly(n):
    """19 of 20 is 95 %: rounding of the share must not ask for one more."""
    ranks = np.arange(n, dtype=float)
    values = ood_metrics(ranks, ranks + 0.5)
    # Catching 95 % of OOD means a threshold at n/20 + 0.5; ID from n/20 + 1 on lie above it.
    assert values["fpr_at_95_ood_tpr"] == pytest.approx(0.95 - 1 / n)
    assert values["fpr_at_95_id_tpr"] == pytest.approx(0.95 - 1 / n)


def test_perfect_and_inverted():
    low, high = np.arange(30.0), np.arange(30.0) + 100
    assert list(ood_metrics(low, high).values()) == pytest.approx([1, 1, 1, 0, 0])
    inverted = ood_metrics(high, low)
    assert inverted["auroc"] == 0
    assert inverted["fpr_at_95_ood_tpr"] == inverted["fpr_at_95_id_tpr"] == 1


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (100, 7)])
def test_constant_scores_tell_nothing(sizes):
    values = ood_metrics(*(np.full(n, 3.0) for n in sizes))
    assert values["auroc"] == 0.5
    assert values["fpr_at_95_ood_tpr"] == values["fpr_at_95_id_tpr"] == 1


@fast
@given(scores, scores)
def test_ranges_and_mirror(id_scores, ood_scores):
    values = ood_metrics(id_scores, ood_scores)
    assert all(0 <= v <= 1 + 1e-12 for v in values.values())
    mirrored = ood_metrics(-id_scores, -ood_scores)["auroc"]
    np.testing.assert_allclose(values["auroc"] + mirrored, 1, atol=1e-12)
    # Calling OOD the ID set and turning the sign changes the two kinds of each metric round.
    swapped = ood_metrics(-ood_scores, -id_scores)
    np.testing.assert_allclose(values["aupr_in"], swapped["aupr_out"], atol=1e-12)
    np.testing.assert_allclose(values["fpr_at_95_id_tpr"], swapped["fpr_at_95_ood_tpr"])


@fast
@given(scores, scores, st.randoms(use_true_random=False))
def test_only_ranks_matter(id_scores, ood_scores, random):
    values = ood_metrics(id_scores, ood_scores)
    _, ranks = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    cubes = ranks.astype(float) ** 3 - 5  # strictly increasing in the score
    assert ood_metrics(cubes[: len(id_scores)], cubes[len(id_scores) :]) == values
    shuffled = [random.sample(list(x), len(x)) for x in (id_scores, ood_scores)]
    assert ood_metrics(*shuffled) == values


@fast
@given(scores, scores)
def test_auroc_is_the_rank_statistic(id_scores, ood_scores):
    above = ood_scores[:, None] > id_scores[None, :]
    equal = ood_scores[:, None] == id_scores[None, :]
    expected = above.mean() + equal.mean() / 2
    np.testing.assert_allclose(metrics.auroc(id_scores, ood_scores), expected, atol=1e-12)


def test_infinite_scores_are_ranks_like_others():
    values = ood_metrics(np.array([-np.inf, 0.0, np.inf]), np.array([np.inf, 1.0]))
    assert values == ood_metrics(np.array([0.0, 1.0, 3.0]), np.array([3.0, 2.0]))


@pytest.mark.parametrize("bad", [np.array([0.0, np.nan]), np.zeros(0), np.zeros((2, 1))])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="id_scores"):
        ood_metrics(bad, np.ones(3))
    with pytest.raises(ValueError, match="ood_scores"):
        ood_metrics(np.ones(3), bad)


def test_id_accuracy():
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert metrics.id_accuracy(logits, np.array([1, 1, 1])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="NaN"):
        metrics.id_accuracy(logits * np.nan, np.array([1, 1, 1]))
    with pytest.raises(ValueError, match="labels"):
        metrics.id_accuracy(logits, np.array([1, 1]))


@fast
@given(scores, scores, st.sampled_from([0.5, 0.9, 0.95, 1.0]))
def test_threshold_keeps_just_enough(val_scores, ood_scores, keep):
    t = threshold(val_scores, keep)
    assert t in val_scores
    assert np.mean(val_scores <= t) >= keep - 1e-12
    assert np.mean(val_scores < t) < keep
    if keep == 0.95:
        accepted = np.mean(ood_scores <= t)
        assert accepted == pytest.approx(metrics.fpr_at_95_id_tpr(val_scores, ood_scores))


@pytest.mark.parametrize("n", [20, 60, 100, 1000, 1001])
def test_threshold_of_distinct_scores_keeps_no_more_than_needed(n):
    accepted = np.sum(np.arange(n) <= threshold(np.arange(n, dtype=np.float32)))
    assert accepted == -(-95 * n // 100)


def test_threshold_refuses_nan_and_nothing():
    for bad in (np.array([np.nan, 1.0]), np.zeros(0)):
        with pytest.raises(ValueError, match="threshold"):
            threshold(bad)
