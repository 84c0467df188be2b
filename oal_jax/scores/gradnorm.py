"""Length of the gradient that would make the prediction uniform."""

import jax.numpy as jnp

from oal_jax.scores.base import Score
from oal_jax.scores.parameters import Positive


def gradnorm(temperature: Positive = 1.0) -> Score:
    """Minus the L1 norm of `d KL(u || softmax(logits / T)) / d W`, W the last layer's kernel.

    The gradient is the outer product of the features f and `(p - u) / T`, with u = 1/c, so its
    norm is `|f|_1 |p - u|_1 / T`: no automatic differentiation. The official code, and OpenOOD,
    leave out the 1/c of the mean over classes: their values are c times these.

    Args:
      temperature: T, above 0.

    References:
      Huang et al., On the Importance of Gradients for Detecting Distributional Shifts in the Wild,
      2021, arXiv 2110.00218, section 3, and for the product section 5.
    """

    def fit(outputs, labels, head, mesh):
        return {"temperature": jnp.float32(temperature)}

    def score(state, outputs):
        t = state["temperature"]
        logits = outputs.logits
        gaps = (logits - jnp.max(logits, axis=-1, keepdims=True)) / t
        # p - u from exp - 1, which is exact where a high temperature makes all exp almost 1.
        a = jnp.expm1(gaps)
        offset = a - jnp.mean(a, axis=-1, keepdims=True)
        total = logits.shape[-1] + jnp.sum(a, axis=-1)
        length = jnp.sum(jnp.abs(outputs.features), axis=-1)
        return -length * jnp.sum(jnp.abs(offset), axis=-1) / (total * t)

    return Score(fit, score, needs=("features",))


SCORES = {"gradnorm": gradnorm}
GRIDS: dict[str, dict[str, tuple]] = {}
