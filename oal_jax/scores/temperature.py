"""Softmax confidence at a temperature that is fitted on ID validation data."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.scores.base import Score
from oal_jax.scores.logits import log_others

RANGE = (1e-3, 1e3)  # of the temperature


def temperature_scaling() -> Score:
    """Maximum softmax probability of `logits / T`, with T fitted on ID validation data.

    The value is `log_odds`, a strictly increasing function of one minus that probability. T
    minimises the negative log-likelihood: see `fit_temperature`.

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599, section 4.2,
      eq. 9. OpenOOD stops after 50 small L-BFGS steps from T = 1.5, often short of the minimum.
    """

    def fit(outputs, labels, head, mesh):
        return {"temperature": np.float32(fit_temperature(outputs.logits, labels))}

    def score(state, outputs):
        return log_odds(outputs.logits, state["temperature"])

    return Score(fit, score, fit_on="validation")


def fit_temperature(logits, labels) -> float:
    """The T that minimises the mean negative log-likelihood of `softmax(logits / T)`.

    In 1 / T the loss is convex, so its derivative has one sign change, found by Brent's method in
    float64. Without one in `RANGE`, T is the end on the side of the minimum: the lower end where
    every label has the largest logit, the upper where the logits know less than nothing.

    Args:
      logits: (n, c).
      labels: (n,) class indices, below c.

    Returns:
      T within `RANGE`; 1 where no logits differ within a row.

    Raises:
      UserError: a label is not the index of a logit.
    """
    from scipy import optimize, special

    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    count, classes = logits.shape
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise UserError(
            f"temperature_scaling: label {labels[wrong][0]} in row {int(wrong.argmax())}, but the"
            f" logits have {classes} classes"
        )
    gaps = logits - logits[np.arange(count), labels][:, None]
    if not gaps.any():
        return 1.0

    def slope(log_t):
        """Derivative of the mean loss in 1 / T."""
        return (special.softmax(gaps / np.exp(log_t), axis=1) * gaps).sum(axis=1).mean()

    low, high = np.log(RANGE)
    if slope(low) <= 0:
        return RANGE[0]
    if slope(high) >= 0:
        return RANGE[1]
    return float(np.exp(optimize.brentq(slope, low, high, xtol=1e-10)))


def log_odds(logits: Float[Array, "n c"], temperature: Float[Array, ""]) -> Float[Array, " n"]:
    """`log((1 - p) / p) - log(c - 1)` for the largest probability p of `softmax(logits / T)`.

    At most 0, and 0 where all logits are equal; strictly decreasing in p; all 0 for one class. In
    float32 p itself loses about as many digits as T has near p = 1/c, where a high temperature
    brings every input, and all of them near p = 1; this has its full precision at both ends.
    """
    rest = logits.shape[-1] - 1
    if not rest:
        return jnp.zeros_like(logits[:, 0])
    # Subtracted before the division: the common part of the logits would cost digits.
    gaps = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    mean = jnp.sum(jnp.expm1(gaps), axis=-1) / rest  # the term of the top class is 0
    near_uniform = mean > -0.5
    return jnp.where(
        near_uniform,
        jnp.log1p(jnp.where(near_uniform, mean, 0.0)),
        log_others(gaps) - np.log(rest).astype(np.float32),
    )


SCORES = {"temperature_scaling": temperature_scaling}
GRIDS: dict[str, dict[str, tuple]] = {}
