"""Scores that look at the logits alone: energy, maximum softmax probability, maximum logit."""

import jax
import jax.numpy as jnp

from oal_jax.errors import UserError
from oal_jax.scores.base import Score


def energy(temperature: float = 1.0) -> Score:
    """Free energy: `-T logsumexp(logits / T)`.

    Args:
      temperature: T, above 0; towards 0 the score becomes `max_logit`.

    References:
      Liu et al., Energy-based Out-of-distribution Detection, 2020, arXiv 2010.03759, eq. 4.
    """
    if not temperature > 0:
        raise UserError(f"energy: temperature must be above 0, got {temperature}")

    def fit(outputs, labels, head):
        return {"temperature": jnp.float32(temperature)}

    def score(state, outputs):
        t = state["temperature"]
        return -t * jax.nn.logsumexp(outputs.logits / t, axis=-1)

    return Score(fit, score)


def msp() -> Score:
    """One minus the maximum softmax probability, in [0, 1 - 1/c].

    Taken as the sum of the *other* probabilities: `1 - max p` in float32 gives exactly 0 for every
    confident input, and those ties cost AUROC; the sum keeps their order.

    References:
      Hendrycks and Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples
      in Neural Networks, 2017, arXiv 1610.02136, section 2.
    """

    def fit(outputs, labels, head):
        return {}

    def score(state, outputs):
        logits = outputs.logits
        top = jnp.argmax(logits, axis=-1, keepdims=True)
        ratio = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        is_top = jnp.arange(logits.shape[-1])[None, :] == top
        others = jnp.sum(jnp.where(is_top, 0.0, ratio), axis=-1)
        return others / (1.0 + others)

    return Score(fit, score)


def max_logit() -> Score:
    """Minus the largest logit.

    References:
      Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, 2022,
      arXiv 1911.11132, section 3.
    """

    def fit(outputs, labels, head):
        return {}

    def score(state, outputs):
        return -jnp.max(outputs.logits, axis=-1)

    return Score(fit, score)


GRIDS: dict[str, dict[str, tuple]] = {}
SCORES = {"energy": energy, "msp": msp, "max_logit": max_logit}
