"""Weight masks: each tensor keeps the weights of its highest scores, the others become zero.

Edge-popup trains the scores: the gradient passes the mask as if the mask were |score|.
Source: Ramanujan et al., arXiv 1911.13299; as Unleashing Mask uses it, arXiv 2306.03715.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int, Key

from oal_jax.methods.base import Groups, Method
from oal_jax.runtime.keys import named

Scores = dict[str, Any]  # a score per weight of the masked tensors, in the tree of the parameters


def zero_count(density: float, size: int) -> int:
    """Number of weights that a mask removes of a tensor of `size`.

    The whole part in float64, as in the paper's code, which calls the density prune_rate.
    """
    return int((1 - density) * size)


def magnitude_mask(scores: Float[Array, "..."], density: float) -> Bool[Array, "..."]:
    """Mask of the share `density` of the entries of largest |score|.

    False for `zero_count` entries; among equal ones the first are removed. Bisects on the floats
    read as integers (31 counts), which takes a twentieth of a sort's time on CPU (0.7 million
    scores in 21 tensors: 7 ms, 125 ms). It runs in every training step.
    """
    removed = zero_count(density, scores.size)
    if not removed:
        return jnp.ones(scores.shape, bool)
    # Floats that are not negative are in the order of their bits.
    order = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.int32).reshape(-1)
    highest = jnp.iinfo(jnp.int32).max
    last = _least(lambda bound: _count(order <= bound) >= removed, highest, 31)
    below = _count(order < last)

    def some_of_the_equal():
        equal, place = order == last, jnp.arange(order.size, dtype=jnp.int32)
        enough = lambda bound: below + _count(equal & (place <= bound)) >= removed
        end = _least(enough, order.size - 1, order.size.bit_length())
        return (order > last) | (equal & (place > end))

    mask = jax.lax.cond(_count(order <= last) == removed, lambda: order > last, some_of_the_equal)
    return mask.reshape(scores.shape)


def _count(condition: Bool[Array, " n"]) -> Int[Array, ""]:
    return jnp.sum(condition, dtype=jnp.int32)


def _least(holds: Any, highest: int, halvings: int) -> Int[Array, ""]:
    """The least integer in 0..highest for which `holds` is true; `holds` must be monotonic."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = holds(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = jnp.int32(0), jnp.int32(highest)
    return jax.lax.fori_loop(0, halvings, halve, bounds)[1]


def masked_tensors(params: Any) -> dict[tuple[str, ...], Any]:
    """{path: tensor} of the tensors that a mask covers: all kernels, no bias and no norm."""
    return {path: leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"}


def init_scores(key: Key[Array, ""], params: Any) -> Scores:
    """A random score per weight, U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""

    def draw(path, weight):
        bound = (weight.size // weight.shape[-1]) ** -0.5
        tensor_key = named(key, ".".join(path))
        return jax.random.uniform(tensor_key, weight.shape, minval=-bound, maxval=bound)

    return unflatten_dict({p: draw(p, w) for p, w in masked_tensors(params).items()})


def apply_masks(params: Any, scores: Scores, density: float) -> Any:
    """The effective parameters: w * mask(s) where there are scores, the others unchanged.

    d / d s = (d / d effective * w) * sign(s), with the gradient of |s| in place of the mask's.
    d / d w = d / d effective * mask.
    """
    effective = dict(flatten_dict(params))
    for path, s in flatten_dict(scores).items():
        size = jnp.sign(s) * s  # |s|, with the gradient 0 at 0
        through = size - jax.lax.stop_gradient(size)  # zero, with the gradient of |s|
        effective[path] *= magnitude_mask(jax.lax.stop_gradient(s), density) + through
    return unflatten_dict(effective)


def with_mask(method: Method, density: float, *, freeze: bool) -> Method:
    """The method with its student masked by trained scores, the group "mask".

    Args:
      method: has a group "student".
      density: share of each tensor's weights that the mask leaves.
      freeze: train the mask alone. The student's batch statistics still move.
    """

    def init(key):
        params, model_state = method.init(key)
        return params | {"mask": init_scores(named(key, "mask"), params["student"])}, model_state

    def effective(params: Groups) -> Groups:
        return params | {"student": apply_masks(params["student"], params["mask"], density)}

    def loss(params, model_state, batch, step, key):
        if freeze:
            params = params | {"student": jax.lax.stop_gradient(params["student"])}
        return method.loss(effective(params), model_state, batch, step, key)

    return Method(init, loss, lambda params: method.finish(effective(params)))
