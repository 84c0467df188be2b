"""Probability of an unknown class, from the tails of the distances to the class means."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from oal_jax.errors import UserError
from oal_jax.scores.base import Score, State
from oal_jax.scores.parameters import Count, Range

_SHIFT = 1e4  # libMR moves the smallest distance of a tail here before it fits the Weibull
_CERTAIN = 25.0  # log hazard of a class that no input can belong to: exp(-exp(25)) is 0


def openmax(tail: Annotated[int, Range(at_least=2)] = 20, alpha: Count = 3) -> Score:
    """Log odds of the unknown class of OpenMax, `log(P / (1 - P))`.

    Each class has the mean of the logits of its correctly classified ID training inputs, and a
    Weibull distribution fitted to the largest of their Euclidean distances to that mean. For an
    input, the i-th largest logit v loses the share `w = (alpha + 1 - i) / alpha * cdf(distance)`
    of itself to an unknown class, whose logit is the sum of these losses. P itself rounds to 1 for
    most OOD inputs; its log odds keep their order.

    The distances are shifted and fitted as by libMR, and the numbers agree with it; here a root
    finder solves the one equation of the maximum likelihood. The share is that of the authors'
    code. Algorithm 2 as printed has the survival function in place of the cdf, by which the
    *nearest* inputs would lose most.

    A class without a correct training input takes every input for unknown. A class whose tail has
    no two different distances uses the tail of all classes.

    Args:
      tail: number of distances of a class that are fitted, at least 2; fewer where it has fewer.
      alpha: number of the largest logits that lose a share, at least 1; at most all.

    Raises:
      UserError: at `fit`, where no input is classified correctly or no distances differ.

    References:
      Bendale and Boult, Towards Open Set Deep Networks, 2016, arXiv 1511.06233, algorithms 1 and 2.
    """

    def fit(outputs, labels, head, mesh):
        return fit_tails(outputs.logits, labels, tail)

    def score(state, outputs):
        return log_odds_of_unknown(state, outputs.logits, alpha)

    return Score(fit, score)


def fit_tails(
    logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], tail: int
) -> dict[str, Float[np.ndarray, "..."]]:
    """The mean of each class and the Weibull distribution of its `tail` largest distances.

    Returns:
      float32 `means` (c, c); `shape` and `offset` of `fit_weibull`, and the smallest fitted
      distance `start`, (c,); `shift`, a scalar.

    Raises:
      UserError: no input is classified correctly, or no distances differ.
    """
    logits = np.asarray(logits, np.float64)
    classes = logits.shape[1]
    correct = logits.argmax(axis=1) == labels
    if not correct.any():
        raise UserError(
            "openmax: no training input is classified correctly; check that the labels belong"
            " to these logits"
        )
    means, distances = np.zeros((classes, classes)), {}
    for c in np.unique(labels[correct]):
        rows = logits[correct & (labels == c)]
        means[c] = rows.mean(axis=0)
        distances[c] = np.sort(np.linalg.norm(rows - means[c][None, :], axis=1))
    tails = {c: d[-tail:] for c, d in distances.items()}
    all_tails = np.sort(np.concatenate(list(distances.values())))[-tail * len(tails) :]
    if not _varies(all_tails):
        raise UserError(
            "openmax: the training logits are all equally far from their class means, so there"
            " is no tail to fit; give more inputs"
        )
    shift = max(_SHIFT, 100 * all_tails[-1])  # beyond the distances, whatever their units
    shape, offset, start = np.zeros(classes), np.full(classes, _CERTAIN), np.zeros(classes)
    for c, distance in tails.items():
        distance = distance if _varies(distance) else all_tails
        start[c] = distance[0]
        shape[c], offset[c] = fit_weibull(distance, shift)
    state = {"means": means, "shape": shape, "offset": offset, "start": start, "shift": shift}
    return {name: np.asarray(x, np.float32) for name, x in state.items()}


def log_odds_of_unknown(
    state: State, logits: Float[Array, "n c"], alpha: int
) -> Float[Array, " n"]:
    """`log(P / (1 - P))` of the unknown class, to which the `alpha` largest logits give shares."""
    count = min(alpha, logits.shape[-1])
    _, ranked = lax.top_k(logits, count)

    # One rank at a time: all distances at once would be an (n, alpha, c) array.
    def step(shares, rank):
        c, weight = rank
        distance = jnp.linalg.norm(logits - state["means"][c], axis=-1)
        log_x = jnp.log1p((distance - state["start"][c]) / state["shift"])
        log_hazard = state["shape"][c] * log_x + state["offset"][c]
        share = -weight * jnp.expm1(-jnp.exp(log_hazard))
        return shares + share[:, None] * jax.nn.one_hot(c, logits.shape[-1]), None

    weights = (count - jnp.arange(count)) / count
    shares, _ = lax.scan(step, jnp.zeros_like(logits), (ranked.T, weights))
    unknown = jnp.sum(logits * shares, axis=-1)
    return unknown - jax.nn.logsumexp(logits * (1.0 - shares), axis=-1)


def _varies(distances: np.ndarray) -> bool:
    """Whether sorted distances differ by more than the noise of float32 logits."""
    return bool(distances[-1] - distances[0] > 1e-6 * distances[-1])


def fit_weibull(distances: np.ndarray, shift: float) -> tuple[float, float]:
    """Maximum likelihood Weibull of `x = distances - min(distances) + shift`.

    With u = log(x / shift) the shape k solves `sum(w u) - mean(u) = 1 / k`, w = softmax(k u). The
    left side grows with k, so there is one root, and the scale l follows from it. The function
    returns an offset in place of l, which is small where l and shift are large:
    `cdf(x) = 1 - exp(-exp(k u + offset))`.

    Args:
      distances: (n,), not all equal.
      shift: above 0 and large against the distances.

    Returns:
      The shape k, and the offset `k log(shift / l) = -log mean exp(k u)`.
    """
    from scipy import optimize, special

    u = np.log1p((distances - distances.min()) / shift)

    def excess(log_k):
        k = np.exp(log_k)
        return special.softmax(k * u) @ u - u.mean() - 1 / k

    low = -np.log(u.max() - u.mean()) - 1  # here 1 / k exceeds all that the left side can be
    high = low + 1
    while excess(high) <= 0:
        high += 1
    k = float(np.exp(optimize.brentq(excess, low, high, xtol=1e-12)))
    return k, float(np.log(len(u)) - special.logsumexp(k * u))


SCORES = {"openmax": openmax}
GRIDS = {"openmax": {"tail": (10, 20, 50), "alpha": (1, 3, 5, 10)}}
