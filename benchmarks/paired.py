"""Paired differences over seeds and problems: their mean, with a bootstrap interval."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

Over = Literal["seeds", "within", "crossed"]


class Interval(NamedTuple):
    """A mean and the ends of its interval, in the units of the values; ends NaN where unknown."""

    mean: float
    low: float
    high: float


def paired_interval(
    values: Float[np.ndarray, "s p"],
    over: Over = "crossed",
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A bootstrap interval of the mean of differences, a row a seed and a column a problem.

    What is resampled says what the interval is of:
    - "seeds": seeds alone. Other seeds on these same problems.
    - "crossed": seeds, and, apart from them, problems: every seed of a sample has the same problems
      (Owen, The pigeonhole bootstrap, 2007). Other seeds on other problems of the kind: what a
      problem has in common over all seeds counts.
    - "within": seeds, and in each seed drawn the problems anew. For problems that are each seed's
      own; with the same problems under all seeds the interval is too long for these problems, and
      too short for others.

    The ends are expanded percentiles (Hesterberg, What teachers should know about the bootstrap,
    2015, section 5.3): for few seeds plain percentiles are too close to the mean.

    Args:
      values: (seeds, problems); of one seed or, for "crossed", one problem, the interval is over
        the other alone.
      over: what is resampled.
      resamples: bootstrap samples.
      level: share of such intervals that hold the true mean.
      seed: of the draws.

    Raises:
      ValueError: no values, or a NaN.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size or np.isnan(values).any():
        raise ValueError(f"values of shape {values.shape}: give a row a seed, no NaN")
    count, problems = values.shape
    draws = np.random.default_rng(seed)
    rows = draws.integers(0, count, (resamples, count))
    if over == "seeds" or problems == 1:
        units, means = count, values.mean(axis=1)[rows].mean(axis=1)
    elif over == "within":
        columns = draws.integers(0, problems, (resamples, count, problems))
        units, means = count, values[rows[..., None], columns].mean(axis=(1, 2))
    else:
        columns = draws.integers(0, problems, (resamples, problems))
        weights = _counts(rows, count), _counts(columns, problems)
        means = np.einsum("bs,sp,bp->b", weights[0], values, weights[1])
        units = min(n for n in (count, problems) if n > 1)
    mean = float(values.mean())
    if units < 2:
        return Interval(mean, float("nan"), float("nan"))
    # The normal distribution's tail at the quantile of t, for a variance of n - 1 in place of n.
    quantile = stats.t.ppf((1 - level) / 2, units - 1) * np.sqrt(units / (units - 1))
    outside = 100 * stats.norm.cdf(quantile)
    return Interval(mean, *map(float, np.percentile(means, [outside, 100 - outside])))


def _counts(drawn: np.ndarray, columns: int) -> Float[np.ndarray, "b n"]:
    """The share of each index in every row of draws."""
    one_hot = drawn[..., None] == np.arange(columns)
    return one_hot.mean(axis=1)
