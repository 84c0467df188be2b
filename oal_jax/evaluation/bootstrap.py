"""Confidence intervals of all metrics by the percentile bootstrap, with a single sort.

A resample only changes how often each input counts. So the scores are sorted once, equal scores
share a column, and a resample is a row of counts: every metric is then a few cumulative sums along
the rows. ID and OOD inputs are resampled separately, because their numbers belong to the benchmark.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from oal_jax.evaluation.metrics import METRICS, checked
from oal_jax.evaluation.tables import MEANS

_CELLS = 2_000_000  # resamples x scores at a time: 16 MB per array


class Interval(NamedTuple):
    """The interval of a metric, in percent. The fields are the columns of `intervals.csv`."""

    score: str
    dataset: str
    group: str
    metric: str
    low: float
    high: float


def resample(
    id_scores: Float[np.ndarray, " n"],
    ood_scores: Float[np.ndarray, " m"],
    resamples: int = 200,
    seed: int = 0,
    stream: int = 0,
) -> Float[np.ndarray, "b 5"]:
    """`METRICS` of each bootstrap sample, one metric a column, as shares in [0, 1].

    Args:
      id_scores: (n,) ood_scores of ID inputs.
      ood_scores: (m,) ood_scores of OOD inputs.
      resamples: number of samples.
      seed: seed of the draws. ID draws depend on it and on n alone, so all sets that are compared
        with the same ID set see the same ID samples.
      stream: index of the OOD set. Sets with different indices get independent draws.

    Raises:
      ValueError: an empty set, a NaN, or not one axis.
    """
    id_scores, ood_scores = checked(id_scores, "id_scores"), checked(ood_scores, "ood_scores")
    id_draws, ood_draws = np.random.default_rng(seed), np.random.default_rng([seed, 1, stream])
    # Columns from the highest score to the lowest.
    values, column = np.unique(-np.concatenate([id_scores, ood_scores]), return_inverse=True)
    id_column, ood_column = column[: len(id_scores)], column[len(id_scores) :]
    size = max(1, _CELLS // (len(id_scores) + len(ood_scores)))
    parts = []
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        id_counts = _counts(id_draws, id_column, len(values), rows)
        ood_counts = _counts(ood_draws, ood_column, len(values), rows)
        parts.append(_metrics(id_counts, ood_counts, len(id_scores), len(ood_scores)))
    return np.concatenate(parts)


def intervals(
    score: str,
    id_scores: Float[np.ndarray, " n"],
    sets: Mapping[str, Float[np.ndarray, " m"]],
    groups: Mapping[str, str],
    resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """Intervals of each metric on each set, then on the unweighted mean over each group.

    Args:
      score: name of the score.
      id_scores: ood_scores of ID test.
      sets: ood_scores by OOD set.
      groups: near, far or validation, by set.
      resamples: number of bootstrap samples. With 200 the ends are good to about a fifth of the
        interval's length.
      seed: seed of the draws.
      level: share of the samples between the ends.
    """
    samples = {
        name: resample(id_scores, values, resamples, seed, index)
        for index, (name, values) in enumerate(sets.items())
    }
    result = []
    for name in sets:
        result += _ends(score, name, groups[name], samples[name], level)
    for group, mean in MEANS.items():
        members = [samples[name] for name in sets if groups[name] == group]
        if members:
            result += _ends(score, mean, group, np.mean(members, axis=0), level)
    return result


def _ends(score, dataset, group, samples, level) -> list[Interval]:
    outside = 50 * (1 - level)
    low, high = 100 * np.percentile(samples, [outside, 100 - outside], axis=0)
    return [
        Interval(score, dataset, group, metric, float(a), float(b))
        for metric, a, b in zip(METRICS, low, high, strict=True)
    ]


def _counts(
    draws: np.random.Generator, column: Int[np.ndarray, " n"], columns: int, rows: int
) -> Float[np.ndarray, "b t"]:
    """Counts per column of n draws with replacement, one sample a row."""
    samples = column[draws.integers(0, len(column), (rows, len(column)))]
    samples += columns * np.arange(rows)[:, None]
    counts = np.bincount(samples.ravel(), minlength=rows * columns)
    return counts.reshape(rows, columns).astype(np.float64)


def _metrics(
    id_counts: Float[np.ndarray, "b t"], ood_counts: Float[np.ndarray, "b t"], n: int, m: int
) -> Float[np.ndarray, "b 5"]:
    """`metrics.ood_metrics` of each row. Columns run from the highest score to the lowest."""
    id_above, ood_above = np.cumsum(id_counts, axis=1), np.cumsum(ood_counts, axis=1)
    # An OOD input beats the ID inputs of lower columns and ties with those of its own column.
    auroc = np.sum(id_counts * (ood_above - ood_counts / 2), axis=1) / (n * m)
    aupr_out = _aupr(ood_above, id_above, ood_counts)
    id_below, ood_below = n - id_above + id_counts, m - ood_above + ood_counts
    aupr_in = _aupr(id_below[:, ::-1], ood_below[:, ::-1], id_counts[:, ::-1])
    # The first column that catches 95 % of OOD, and the last one that still keeps 95 % of ID.
    rows = np.arange(len(id_counts))
    caught = np.argmax(ood_above / m >= 0.95, axis=1)
    accepts = np.sum((n - id_above) / n >= 0.95, axis=1)
    missed = np.where(accepts > 0, m - ood_above[rows, np.maximum(accepts, 1) - 1], m)
    return np.stack([auroc, aupr_in, aupr_out, id_above[rows, caught] / n, missed / m], axis=1)


def _aupr(
    hits: Float[np.ndarray, "b t"],
    misses: Float[np.ndarray, "b t"],
    steps: Float[np.ndarray, "b t"],
) -> Float[np.ndarray, " b"]:
    """Area under the precision-recall curve by trapezoids; `steps` counts the new hits."""
    positives = hits + misses
    # Precision without a positive is 0 / 0, by convention 1.
    precision = np.where(positives > 0, hits, 1.0) / np.maximum(positives, 1.0)
    area = np.sum(precision * steps, axis=1) + np.sum(precision[:, :-1] * steps[:, 1:], axis=1)
    return (area + steps[:, 0]) / (2 * hits[:, -1])
