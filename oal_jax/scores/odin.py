"""Softmax confidence at a high temperature, after a step of the image towards confidence."""

import jax
import jax.numpy as jnp
from jax import lax

from oal_jax.scores.base import Score
from oal_jax.scores.logits import is_top
from oal_jax.scores.parameters import AtLeast0, Positive
from oal_jax.scores.temperature import log_odds


def odin(temperature: Positive = 1000.0, epsilon: AtLeast0 = 0.0014) -> Score:
    """Maximum softmax probability at temperature T of `x + epsilon sign(grad_x log max p(x; T))`.

    The value is `log_odds`, a strictly increasing function of one minus that probability; applied
    to outputs instead of images it is that of the images as they are. Pixels are not clipped
    after the step, and a pixel without a gradient stays where it is.

    Args:
      temperature: T, above 0.
      epsilon: length of the step in units of the pixels that `forward` takes, at least 0. The
        default is meant for pixels in [0, 1] and a `forward` that normalises them itself; images
        in [0, 255] are not rescaled, they want 255 times as much. (OpenOOD takes the step on
        normalised pixels and divides it by their standard deviation, which is the same.)

    References:
      Liang et al., Enhancing The Reliability of Out-of-distribution Image Detection in Neural
      Networks, 2018, arXiv 1706.02690, eq. 1 and 2.
    """

    def fit(outputs, labels, head, mesh):
        return {"temperature": jnp.float32(temperature), "epsilon": jnp.float32(epsilon)}

    def score(state, outputs):
        return log_odds(outputs.logits, state["temperature"])

    def perturb(state, forward, images):
        t = state["temperature"]

        def confidence(images):
            logits = forward(images).logits
            # Times T, so that the gradients of a hot softmax stay far from the smallest float32.
            log_p = t * jax.nn.log_softmax(logits / t, axis=-1)
            return jnp.sum(jnp.where(is_top(logits), log_p, 0.0))

        step = state["epsilon"] * jnp.sign(jax.grad(confidence)(lax.stop_gradient(images)))
        return forward(images + step)

    return Score(fit, score, perturb=perturb)


SCORES = {"odin": odin}
GRIDS = {"odin": {"temperature": (1.0, 10.0, 100.0, 1000.0), "epsilon": (0.0, 0.0014, 0.0028)}}
