"""Which of the sampled outliers are kept: those that look OOD, and are unlike each other."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Chosen(NamedTuple):
    """The rows that are kept of each class, and how they came to be.

    Attributes:
      rows: of all candidates, a row a class.
      accepted: candidates of each class that met all bounds.
      filled: of the kept ones of each class, those that did not.
    """

    rows: Int[np.ndarray, "C n"]
    accepted: Int[np.ndarray, " C"]
    filled: Int[np.ndarray, " C"]


@jax.jit
def max_softmax(logits: Float[Array, "n k"]) -> Float[Array, " n"]:
    """The largest softmax probability (MSP)."""
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


@jax.jit
def log_partition(logits: Float[Array, "n k"]) -> Float[Array, " n"]:
    """logsumexp of the logits: high for ID."""
    return jax.nn.logsumexp(logits, axis=-1)


@partial(jax.jit, static_argnames=("count",))
def farthest_points(
    features: Float[Array, "n d"], allowed: Bool[Array, " n"], count: int
) -> Int[Array, " m"]:
    """`count` of the allowed rows, each the furthest from those before it; the first is the first.

    Gonzalez's greedy choice (1985), at most twice the best covering radius. Of equals the first.
    Memory: one distance a row. Only the first `sum(allowed)` entries mean something.
    """
    first = jnp.argmax(allowed)
    chosen = jnp.zeros(count, jnp.int32).at[0].set(first)

    def body(i, carry):
        chosen, distance = carry
        squares = jnp.sum((features - features[chosen[i - 1]][None]) ** 2, axis=-1)
        distance = jnp.minimum(distance, squares)
        distance = distance.at[chosen[i - 1]].set(-1.0)  # never twice, also among equal points
        return chosen.at[i].set(jnp.argmax(distance)), distance

    start = jnp.where(allowed, jnp.inf, -1.0)
    return jax.lax.fori_loop(1, count, body, (chosen, start))[0]


def choose(
    features: Float[np.ndarray, "n d"],
    logits: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    per_class: int,
    *,
    max_msp: float = 1.0,
    max_energy: float = np.inf,
    diverse: bool = False,
) -> Chosen:
    """`per_class` of the candidates of each class.

    Where fewer of a class meet the bounds, the rest is filled up with those of the refused ones
    that look least ID, by logsumexp.

    Args:
      features, logits: of the candidates.
      labels: their classes, 0 .. C - 1, as many of each.
      per_class: how many are kept.
      max_msp: largest softmax probability of what is accepted.
      max_energy: largest logsumexp likewise.
      diverse: of more accepted than wanted, keep those of `farthest_points` and not the first.
    """
    energy = np.asarray(log_partition(logits))
    within = (np.asarray(max_softmax(logits)) <= max_msp) & (energy <= max_energy)
    kept, accepted = [], []
    for c in range(labels.max() + 1):
        candidates = np.flatnonzero(labels == c)
        good, bad = candidates[within[candidates]], candidates[~within[candidates]]
        accepted.append(len(good))
        if diverse and len(good) > per_class:
            rows = farthest_points(features[candidates], within[candidates], per_class)
            good = np.sort(candidates[np.asarray(rows)])
        bad = bad[np.argsort(energy[bad], kind="stable")]
        kept.append(np.concatenate([good, bad])[:per_class])
    counts = np.asarray(accepted)
    return Chosen(np.stack(kept), counts, np.maximum(per_class - counts, 0))
