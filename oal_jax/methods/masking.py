"""Weight masks layer by layer: the top scores of a tensor are kept, the rest of it is zero.

Edge-popup: the scores are trained, the gradient passes the mask as if it were the scores' size.
Source: Ramanujan et al., arXiv 1911.13299; as Unleashing Mask uses it, arXiv 2306.03715.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int, Key

from oal_jax.methods.base import Groups, Method
from oal_jax.runtime.keys import named

Scores = dict[str, Any]  # the tree of the parameters, masked tensors alone


def zero_count(keep: float, size: int) -> int:
    """How many of `size` weights a mask removes: the whole part, in float64, as the paper's code.

    `keep` is the share that stays; in that code it is called prune_rate.
    """
    return int((1 - keep) * size)


def keep_mask(scores: Float[Array, "..."], keep: float) -> Bool[Array, "..."]:
    """False for the `zero_count` entries of least |score|; of equal ones the first are removed.

    Bisection on the floats read as integers, 31 counts; it takes a twentieth of the time of a
    sort on CPU (0.7 million scores in 21 tensors: 7 ms, 125 ms), and runs once a training step.
    """
    removed = zero_count(keep, scores.size)
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

    kept = jax.lax.cond(_count(order <= last) == removed, lambda: order > last, some_of_the_equal)
    return kept.reshape(scores.shape)


def _count(wanted: Bool[Array, " n"]) -> Int[Array, ""]:
    return jnp.sum(wanted, dtype=jnp.int32)


def _least(holds: Any, highest: int, halvings: int) -> Int[Array, ""]:
    """The least integer in 0..highest at which `holds`, true from some number on, is true."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = holds(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = jnp.int32(0), jnp.int32(highest)
    return jax.lax.fori_loop(0, halvings, halve, bounds)[1]


def masked_tensors(params: Any) -> dict[tuple[str, ...], Any]:
    """{path: tensor} of what a mask covers: convolutions and the classifier's weight, no bias."""
    return {path: leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"}


def init_scores(key: Key[Array, ""], params: Any) -> Scores:
    """A score for each weight, U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): so the mask is random."""

    def draw(path, weight):
        bound = (weight.size // weight.shape[-1]) ** -0.5
        tensor_key = named(key, ".".join(path))
        return jax.random.uniform(tensor_key, weight.shape, minval=-bound, maxval=bound)

    return unflatten_dict({p: draw(p, w) for p, w in masked_tensors(params).items()})


def apply_masks(params: Any, scores: Scores, keep: float) -> Any:
    """The effective parameters: w * mask(s) where there are scores, the others as they are.

    d / d s = (d / d effective * w) * sign(s): the mask's own gradient is taken for that of |s|.
    d / d w = d / d effective * mask.
    """
    effective = dict(flatten_dict(params))
    for path, s in flatten_dict(scores).items():
        size = jnp.sign(s) * s  # |s|, with the gradient 0 at 0
        through = size - jax.lax.stop_gradient(size)  # zero, with the gradient of |s|
        effective[path] *= keep_mask(jax.lax.stop_gradient(s), keep) + through
    return unflatten_dict(effective)


def with_mask(method: Method, keep: float, *, freeze: bool) -> Method:
    """A method whose student is masked by trained scores, a group "mask" beside its own.

    Args:
      keep: share of each tensor's weights that stays.
      freeze: hold all the student's own parameters; its batch statistics go on moving.
    """

    def init(key):
        params, model_state = method.init(key)
        return params | {"mask": init_scores(named(key, "mask"), params["student"])}, model_state

    def effective(params: Groups) -> Groups:
        return params | {"student": apply_masks(params["student"], params["mask"], keep)}

    def loss(params, model_state, batch, step, key):
        if freeze:
            params = params | {"student": jax.lax.stop_gradient(params["student"])}
        return method.loss(effective(params), model_state, batch, step, key)

    return Method(init, loss, lambda params: method.finish(effective(params)))
