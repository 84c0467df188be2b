"""Outliers over the decision boundary: ID features moved until the teacher's prediction changes.

After BOOD (arXiv 2508.00350): the features nearest the boundary are pushed along a gradient until
they cross it, and a few steps further. The classifier here is the teacher's linear head, so the
margin between two classes is linear in the feature, its gradient is the difference of two columns
of the head, and every step brings the smallest margin down.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_SLACK = 1e-3  # norms of the feature that an exact step goes beyond the boundary, at least
MAX_STEPS = 2000


def logits_of(
    features: Float[Array, "n d"], kernel: Float[Array, "d k"], bias: Float[Array, " k"]
) -> Float[Array, "n k"]:
    """The head, in full float32: whether a prediction has changed must not depend on the device."""
    return jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None]


def margins(logits: Float[Array, "n k"]) -> Float[Array, " n"]:
    """The largest logit less the second largest."""
    first, second = jax.lax.top_k(logits, 2)[0].T
    return first - second


def nearest_boundary(
    logits: Float[Array, "n k"], label: Int[Array, ""], count: int
) -> Int[Array, " m"]:
    """The `count` rows of one class with the smallest margin, those predicted right first."""
    wrong = jnp.argmax(logits, axis=-1) != label
    return jnp.lexsort((margins(logits), wrong))[:count]


@partial(jax.jit, static_argnames=("count", "steps_after", "exact"))
def cross_class(
    features: Float[Array, "n d"],
    kernel: Float[Array, "d k"],
    bias: Float[Array, " k"],
    label: Int[Array, ""],
    *,
    count: int,
    step: float,
    steps_after: int,
    exact: bool,
) -> tuple[Float[Array, "m d"], Int[Array, " m"], Int[Array, " m"]]:
    """`count` features of a class, moved over the boundary.

    Args:
      features: raw features of the class, as the head takes them.
      kernel, bias: of the head.
      label: the class.
      step: length of a step in norms of the feature it starts from.
      steps_after: further steps after the prediction has changed.
      exact: go straight over the nearest of the boundaries instead, and `steps_after` steps beyond.

    Returns:
      The moved features; the rows of `features` they started from, nearest the boundary first; the
      steps until the prediction changed (1 where exact; more than `MAX_STEPS` where it never did).
    """
    rows = nearest_boundary(logits_of(features, kernel, bias), label, count)
    start = features[rows]
    own = jnp.argmax(logits_of(start, kernel, bias), axis=-1)
    length = jnp.linalg.norm(start, axis=-1)
    if exact:
        beyond = jnp.maximum(step * steps_after, _SLACK) * length
        return _exactly(start, kernel, bias, own, beyond), rows, jnp.ones_like(rows)

    def moved(points):
        direction = _downhill(points, kernel, bias, own)
        return points + step * length[:, None] * direction

    def inside(points):
        return jnp.argmax(logits_of(points, kernel, bias), axis=-1) == own

    def body(carry):
        points, steps, walking = carry
        points = jnp.where(walking[:, None], moved(points), points)
        return points, steps + walking, walking & inside(points)

    def unfinished(carry):
        _, steps, walking = carry
        return jnp.any(walking) & (jnp.max(steps) <= MAX_STEPS)

    zeros = jnp.zeros(count, jnp.int32)
    points, steps, _ = jax.lax.while_loop(
        unfinished, body, (start, zeros, jnp.ones(count, jnp.bool_))
    )
    points = jax.lax.fori_loop(0, steps_after, lambda _, p: moved(p), points)
    return points, rows, steps


def _downhill(points, kernel, bias, own) -> Float[Array, "m d"]:
    """Unit vectors along which the margin of class `own` over the best other one falls."""
    others = _others(logits_of(points, kernel, bias), own)
    gradient = kernel.T[jnp.argmax(others, axis=-1)] - kernel.T[own]
    return gradient / jnp.maximum(jnp.linalg.norm(gradient, axis=-1, keepdims=True), 1e-12)


def _others(logits: Float[Array, "m k"], own: Int[Array, " m"]) -> Float[Array, "m k"]:
    return jnp.where(jnp.arange(logits.shape[1])[None] == own[:, None], -jnp.inf, logits)


def _exactly(start, kernel, bias, own, beyond) -> Float[Array, "m d"]:
    """The feet of the perpendiculars on the nearest boundaries, and `beyond` further."""
    others = _others(logits_of(start, kernel, bias), own)
    gaps = jnp.take_along_axis(logits_of(start, kernel, bias), own[:, None], axis=1) - others
    weights, squares = kernel.T, jnp.sum(kernel**2, axis=0)
    products = jnp.matmul(weights[own], kernel, precision=jax.lax.Precision.HIGHEST)
    sizes = jnp.sqrt(jnp.maximum(squares[None] + squares[own][:, None] - 2 * products, 1e-12))
    nearest = jnp.argmin(gaps / sizes, axis=-1)
    normal = weights[nearest] - weights[own]
    size = jnp.maximum(jnp.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    gap = jnp.take_along_axis(gaps, nearest[:, None], axis=1)
    return start + (gap / size + beyond[:, None]) * normal / size
