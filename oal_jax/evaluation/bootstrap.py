"""Confidence intervals of all metrics by the percentile bootstrap, without sorting anew.

A resample only changes how often an input counts. So the scores are sorted once, inputs that share
a score are one column, and a resample is a row of counts; every metric then is a few cumulative
sums over rows. ID and OOD inputs are drawn apart, each as often as there are, since their numbers
are the benchmark's choice and no sample.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from oal_jax.evaluation.metrics import METRICS, checked
from oal_jax.evaluation.tables import MEANS, write_lines

_CELLS = 2_000_000  # resamples x scores at once: 16 MB an array


class Interval(NamedTuple):
    """Where a metric lies, in percent; the fields are the columns of `intervals.csv`."""

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
    """`METRICS` (columns, shares in [0, 1]) of `resamples` bootstrap samples.

    Args:
      id_scores: (n,) ood_scores of ID inputs.
      ood_scores: (m,) ood_scores of OOD inputs.
      resamples: how many samples.
      seed: of the draws. Those of ID inputs depend on it and n alone, so that sets which are
        compared with one ID set see it resampled alike.
      stream: number of the OOD set, for draws of its own.

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
    """Intervals of every metric on every set, then on the unweighted mean over each group.

    Args:
      score: name of the score.
      id_scores: ood_scores of ID test.
      sets: ood_scores by OOD set.
      groups: near, far or validation, by set.
      resamples: bootstrap samples; 200 give the ends to about a fifth of the interval's length.
      seed: of the draws.
      level: share of the samples between the ends.
    """
    samples = {
        name: resample(id_scores, values, resamples, seed, index)
        for index, (name, values) in enumerate(sets.items())
    }
    found = []
    for name in sets:
        found += _ends(score, name, groups[name], samples[name], level)
    for group, mean in MEANS.items():
        members = [samples[name] for name in sets if groups[name] == group]
        if members:
            found += _ends(score, mean, group, np.mean(members, axis=0), level)
    return found


def write_intervals(path: str | Path, found: Iterable[Interval]) -> None:
    """Writes `intervals.csv`, percent with 4 decimals, atomically."""
    lines = ([*i[:4], f"{i.low:.4f}", f"{i.high:.4f}"] for i in found)
    write_lines(path, [Interval._fields, *lines])


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
    """How often each column was drawn: n inputs a row, with replacement."""
    drawn = column[draws.integers(0, len(column), (rows, len(column)))]
    drawn += columns * np.arange(rows)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=rows * columns)
    return counts.reshape(rows, columns).astype(np.float64)


def _metrics(
    id_counts: Float[np.ndarray, "b t"], ood_counts: Float[np.ndarray, "b t"], n: int, m: int
) -> Float[np.ndarray, "b 5"]:
    """`metrics.ood_metrics` of every row; columns from the highest score to the lowest."""
    id_above, ood_above = np.cumsum(id_counts, axis=1), np.cumsum(ood_counts, axis=1)
    # An OOD input is above all ID inputs of lower columns, and even with those of its own.
    auroc = np.sum(id_counts * (ood_above - ood_counts / 2), axis=1) / (n * m)
    aupr_out = _aupr(ood_above, id_above, ood_counts)
    id_below, ood_below = n - id_above + id_counts, m - ood_above + ood_counts
    aupr_in = _aupr(id_below[:, ::-1], ood_below[:, ::-1], id_counts[:, ::-1])
    # The first column at which 95 % of OOD is caught, and the last that still keeps 95 % of ID.
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
    """Trapezoids between the points of the precision-recall curve; `steps` are new hits."""
    taken = hits + misses
    # No rank taken: precision is 0 / 0, and by convention 1.
    precision = np.where(taken > 0, hits, 1.0) / np.maximum(taken, 1.0)
    area = np.sum(precision * steps, axis=1) + np.sum(precision[:, :-1] * steps[:, 1:], axis=1)
    return (area + steps[:, 0]) / (2 * hits[:, -1])
