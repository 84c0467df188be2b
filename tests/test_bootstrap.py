"""Bootstrap intervals: the resamples of a plain loop, coverage, sets and means."""

import numpy as np
import pytest
from scipy.stats import norm

from oal_jax.evaluation import bootstrap
from oal_jax.evaluation.metrics import METRICS, ood_metrics


@pytest.mark.parametrize(("decimals", "n", "m"), [(1, 50, 30), (8, 50, 30), (2, 60_000, 40_000)])
def test_resamples_are_those_of_a_plain_loop(decimals, n, m):
    """The last case is larger than one chunk."""
    rng = np.random.default_rng(0)
    known = np.round(rng.normal(size=n), decimals)
    unknown = np.round(rng.normal(1, 1, size=m), decimals)
    resamples = 40 if n < 1000 else 25
    result = bootstrap.resample(known, unknown, resamples, seed=3, stream=2)
    id_rows = np.random.default_rng(3).integers(0, n, (resamples, n))
    ood_rows = np.random.default_rng([3, 1, 2]).integers(0, m, (resamples, m))
    pairs = zip(known[id_rows], unknown[ood_rows], strict=True)
    expected = [list(ood_metrics(*pair).values()) for pair in pairs]
    np.testing.assert_allclose(result, expected, atol=1e-12)


def test_intervals_cover_the_truth():
    """The AUROC of two unit normals one apart is the normal CDF at 1 / sqrt(2)."""
    rng = np.random.default_rng(0)
    truth = 100 * norm.cdf(1 / np.sqrt(2))
    covered = []
    for seed in range(200):
        known, unknown = rng.normal(size=150), rng.normal(1, 1, size=100)
        result = bootstrap.intervals("s", known, {"a": unknown}, {"a": "near"}, 200, seed)
        low, high = next(i[4:] for i in result if i.metric == "auroc")
        covered.append(low <= truth <= high)
    # 95 % of 200, within three standard deviations and the bootstrap's own shortfall.
    assert 0.88 <= np.mean(covered) <= 0.99


def test_intervals_of_sets_and_means():
    rng = np.random.default_rng(0)
    known = rng.normal(size=300)
    sets = {name: rng.normal(1, 1, size=200) for name in ("a", "b", "c")}
    groups = {"a": "near", "b": "near", "c": "far"}
    result = bootstrap.intervals("energy", known, sets, groups)
    assert [i.dataset for i in result[:: len(METRICS)]] == ["a", "b", "c", "nearood", "farood"]
    assert result == bootstrap.intervals("energy", known, sets, groups)
    widths = {i.dataset: i.high - i.low for i in result if i.metric == "auroc"}
    # The mean of two sets varies less than each, but not by sqrt(2): they share the ID inputs.
    assert 0.7 * widths["a"] < widths["nearood"] < widths["a"]
    assert widths["farood"] == widths["c"]
    for interval in result[: 3 * len(METRICS)]:
        value = 100 * ood_metrics(known, sets[interval.dataset])[interval.metric]
        assert interval.low <= value <= interval.high
