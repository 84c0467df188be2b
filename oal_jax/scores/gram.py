"""Deviation of Gram matrices from their range on the training set."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oal_jax.scores.base import Score
from oal_jax.scores.statistics import accumulate, counted

_HELD_OUT = 10  # every tenth training input


def gram() -> Score:
    """Sum over layers of how far Gram statistics leave their training range of the predicted class.

    The statistics are the row sums of `Outputs.grams`, for every power and channel. Below the least
    training value m that its predicted class has, a value v deviates by (m - v) / |m|; above the
    greatest M by (v - M) / |M|. The deviations of a layer add up, and are divided by their mean
    over held-out ID inputs: every tenth training input of each predicted class, which the ranges do
    not see. Positive, and larger for OOD inputs. (OpenOOD v1.5 had the opposite sign.)

    |m| and |M| count as at least 1e-6 of the layer's mean |M| at that power: a channel that is dead
    on ID data has the range 0 to 0. A class that no training input is predicted as takes the range
    of all classes. A layer whose held-out inputs never deviate, or a training set with fewer than
    ten inputs a class, is divided by 1.

    References:
      Sastry and Oore, Detecting Out-of-Distribution Examples with In-distribution Examples and Gram
      Matrices, 2020, arXiv 1912.12510, eq. 4 and 5.
    """

    def fit(outputs, labels, head, mesh):
        predicted = np.argmax(outputs.logits, axis=1).astype(np.int32)
        classes = outputs.logits.shape[1]
        held_out = _held_out(predicted)
        state = {}
        for i, layer in enumerate(outputs.grams):
            bounds = _ranges(layer, predicted, held_out, classes, mesh)
            total = 0.0
            if held_out.any():
                total = accumulate(
                    partial(_sum_of_deviations, bounds), (layer, predicted, held_out), mesh
                )
            mean = total / max(held_out.sum(), 1)
            bounds["expected"] = np.float32(mean if mean > 0 else 1.0)
            state |= {f"layer{i}_{key}": value for key, value in bounds.items()}
        return state

    def score(state, outputs):
        predicted = jnp.argmax(outputs.logits, axis=1)
        total = jnp.zeros_like(outputs.logits[:, 0])
        for i, layer in enumerate(outputs.grams):
            keys = ("low", "high", "unit", "expected")
            bounds = {key: state[f"layer{i}_{key}"] for key in keys}
            total += _deviation(bounds, layer, predicted) / bounds["expected"]
        return total

    return Score(fit, score, needs=("grams",))


def _held_out(predicted: Int[np.ndarray, " n"]) -> np.ndarray:
    # By class and not by row: labels may repeat every ten rows.
    order = np.argsort(predicted, kind="stable")
    ordered = predicted[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    held_out = np.zeros(len(order), bool)
    held_out[order] = rank % _HELD_OUT == _HELD_OUT - 1
    return held_out


def _ranges(layer, predicted, held_out, classes, mesh) -> dict[str, np.ndarray]:
    find = partial(_extremes, classes)
    both = accumulate(find, (layer, predicted, held_out), mesh, np.maximum)
    high, low = both[0], -both[1]
    absent = ~np.isfinite(high[:, 0, 0])
    high[absent], low[absent] = high[~absent].max(axis=0), low[~absent].min(axis=0)
    unit = 1e-6 * np.abs(high).mean(axis=(0, 2))
    return {
        "low": low.astype(np.float32),
        "high": high.astype(np.float32),
        "unit": np.maximum(unit, 1e-30).astype(np.float32),
    }


@partial(jax.jit, static_argnums=0)
def _extremes(
    classes: int,
    layer: Float[Array, "n p d"],
    predicted: Int[Array, " n"],
    held_out: Array,
    count: Array,
) -> Float[Array, "2 c p d"]:
    """The largest of each class of `layer` and of `-layer`; -inf where it has no input."""
    index = jnp.where(held_out, classes, predicted)
    values = (counted(sign * layer, count, -jnp.inf) for sign in (1, -1))
    return jnp.stack([jax.ops.segment_max(x, index, classes + 1)[:classes] for x in values])


def _deviation(bounds, layer: Float[Array, "n p d"], predicted) -> Float[Array, " n"]:
    low, high = bounds["low"][predicted], bounds["high"][predicted]
    unit = bounds["unit"][None, :, None]
    below = jnp.maximum(low - layer, 0) / jnp.maximum(jnp.abs(low), unit)
    above = jnp.maximum(layer - high, 0) / jnp.maximum(jnp.abs(high), unit)
    return jnp.sum(below + above, axis=(1, 2))


@jax.jit
def _sum_of_deviations(bounds, layer, predicted, held_out, count):
    counts = counted(held_out, count, False)
    return jnp.sum(jnp.where(counts, _deviation(bounds, layer, predicted), 0.0))


SCORES = {"gram": gram}
GRIDS: dict[str, dict[str, tuple]] = {}
