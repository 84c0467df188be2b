"""Unleashing Mask: makes a trained classifier forget the examples that it learned last.

Holds the mean cross-entropy at a constraint c. Stage `estimate_loss` estimates c as the loss of the
same classifier with a few per cent of its weights removed at random. `um` fine-tunes all weights;
`umap` freezes them and trains a mask (see `masking.with_mask`).

Source: Zhu et al., arXiv 2306.03715, and its code.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform


def unleash(
    mean_cross_entropy: Float[Array, ""], constraint: float, beta: float = 1.0
) -> Float[Array, ""]:
    """|beta CE - c| + c, whose gradient changes its sign below the constraint c and is zero at it.

    CE is the mean over the whole batch. The form is that of flooding (arXiv 2002.08709), which
    chooses c by hand.
    """
    gap = beta * mean_cross_entropy - constraint
    return jnp.sign(gap) * gap + constraint  # the gradient of `jnp.abs` at 0 is 1


def transform(constraint: float, beta: float) -> Transform:
    """`unleash` as the `ce_transform` of any method."""
    return lambda ce: unleash(ce, constraint, beta)


def with_constraint(method: Method, constraint: float) -> Method:
    """The method with its constraint among the metrics."""

    def loss(*arguments):
        value, (model_state, metrics) = method.loss(*arguments)
        return value, (model_state, metrics | {"constraint": jnp.float32(constraint)})

    return method._replace(loss=loss)
