"""Unleashing Mask: a trained classifier is made to forget the examples it learned last.

Its mean cross-entropy is held at a constraint c, estimated as the loss of the same classifier
with a few per cent of its weights removed at random (stage `estimate_loss`). `um` fine-tunes all
weights so; `umap` holds them and trains a mask (see `masking.with_mask`).

Source: Zhu et al., arXiv 2306.03715, and its code. There the constraint is an argument that the
shipped configs never read; here the method's name or `method.um` is the one switch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform


def unleash(
    mean_cross_entropy: Float[Array, ""], constraint: float, beta: float = 1.0
) -> Float[Array, ""]:
    """|beta CE - c| + c: below the constraint c the gradient changes its sign; at it, it is zero.

    CE is the mean of the whole batch, not an example's. The form is that of flooding, arXiv
    2002.08709, where c is chosen by hand.
    """
    gap = beta * mean_cross_entropy - constraint
    return jnp.sign(gap) * gap + constraint  # the gradient of `jnp.abs` at 0 is 1


def transform(constraint: float, beta: float) -> Transform:
    """`unleash` as the `ce_transform` of any method: it touches the ID cross-entropy alone."""
    return lambda ce: unleash(ce, constraint, beta)


def with_constraint(method: Method, constraint: float) -> Method:
    """The same method, its constraint in the log."""

    def loss(*arguments):
        value, (model_state, metrics) = method.loss(*arguments)
        return value, (model_state, metrics | {"constraint": jnp.float32(constraint)})

    return method._replace(loss=loss)
