"""Scores that read the logits alone: energy, softmax probabilities, the largest logit."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from oal_jax.scores.base import Score
from oal_jax.scores.parameters import Count, Positive


def energy(temperature: Positive = 1.0) -> Score:
    """Free energy: `-T logsumexp(logits / T)`.

    Args:
      temperature: T, above 0; towards 0 the score becomes `max_logit`.

    References:
      Liu et al., Energy-based Out-of-distribution Detection, 2020, arXiv 2010.03759, eq. 4.
    """

    def fit(outputs, labels, head, mesh):
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

    def fit(outputs, labels, head, mesh):
        return {}

    def score(state, outputs):
        others = jnp.exp(log_others(outputs.logits))
        return others / (1.0 + others)

    return Score(fit, score)


def max_logit() -> Score:
    """Minus the largest logit.

    References:
      Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, 2022,
      arXiv 1911.11132, section 3.
    """

    def fit(outputs, labels, head, mesh):
        return {}

    def score(state, outputs):
        return -jnp.max(outputs.logits, axis=-1)

    return Score(fit, score)


def gen(gamma: Positive = 0.1, m: Count = 100) -> Score:
    """Generalised entropy: sum of `(p (1 - p))^gamma` over the m largest softmax probabilities.

    `1 - p` of the predicted class is the sum of the other probabilities, and powers are taken of
    logarithms, so that confident inputs keep their order.

    Args:
      gamma: exponent above 0. The paper's range is (0, 1); with much larger ones the terms of
        confident inputs fall below the smallest float32, hence the grid ends at 1, not at 10 as
        OpenOOD's does.
      m: how many probabilities, at least 1; all of them where there are fewer classes.

    References:
      Liu et al., GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection, CVPR 2023,
      section 3, with the sign turned.
    """

    def fit(outputs, labels, head, mesh):
        return {"gamma": jnp.float32(gamma)}

    def score(state, outputs):
        logits = outputs.logits
        log_p, _ = lax.top_k(log_probabilities(logits), min(m, logits.shape[-1]))
        # Below the top no probability exceeds 1/2, so there 1 - p loses nothing.
        log_rest = jnp.log1p(-jnp.exp(log_p[:, 1:]))
        log_not_top = -jax.nn.softplus(-log_others(logits))
        log_not_p = jnp.concatenate([log_not_top[:, None], log_rest], axis=1)
        return jnp.sum(jnp.exp(state["gamma"] * (log_p + log_not_p)), axis=-1)

    return Score(fit, score)


def is_top(logits: Float[Array, "n c"]) -> Bool[Array, "n c"]:
    """True at the largest logit of each row, at the first of several."""
    top = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.arange(logits.shape[-1])[None, :] == top


def log_others(logits: Float[Array, "n c"]) -> Float[Array, " n"]:
    """Log odds against the predicted class: `log(sum of the other probabilities / the largest)`.

    In (-inf, log(c - 1)]; -inf where there is one class. It neither saturates nor underflows.
    """
    gaps = logits - jnp.max(logits, axis=-1, keepdims=True)
    return jax.nn.logsumexp(jnp.where(is_top(logits), -jnp.inf, gaps), axis=-1)


def log_probabilities(logits: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """As `jax.nn.log_softmax`, and of full relative precision where a probability is almost 1."""
    gaps = logits - jnp.max(logits, axis=-1, keepdims=True)
    return gaps - jax.nn.softplus(log_others(logits))[:, None]


SCORES = {"energy": energy, "msp": msp, "max_logit": max_logit, "gen": gen}
GRIDS = {"gen": {"gamma": (0.01, 0.1, 0.5, 1.0), "m": (10, 50, 100, 200, 500, 1000)}}
