"""Queues of the latest features of every class: ring buffers in a method's `model_state`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Queue = dict[str, Any]  # `rows` (C, Q, d); `written` (C,): number of rows written to each class


def empty(classes: int, size: int, width: int) -> Queue:
    """Empty queues of `size` rows per class."""
    return {
        "rows": jnp.zeros((classes, size, width)),
        "written": jnp.zeros((classes,), jnp.int32),
    }


def push(queue: Queue, features: Float[Array, "b d"], labels: Int[Array, " b"]) -> Queue:
    """Write each row over the oldest row of its label's queue. Passes no gradient.

    The result is that of writing the rows one by one in their order. If a class has more rows than
    its queue holds, the last ones stay.
    """
    rows = queue["rows"]
    place, written = slots(queue["written"], labels, rows.shape[1])
    features = jax.lax.stop_gradient(features).astype(rows.dtype)
    return {"rows": rows.at[labels, place].set(features, mode="drop"), "written": written}


def slots(
    written: Int[Array, " c"], labels: Int[Array, " b"], size: int
) -> tuple[Int[Array, " b"], Int[Array, " c"]]:
    """Place of each row of a batch in its class's ring, and `written` after the batch.

    No two rows have the same place, so the order of a scatter does not matter. A row that a later
    row of the batch would replace gets the place `size`, past the end, where a scatter drops it.
    """
    same = jax.nn.one_hot(labels, written.shape[0], dtype=jnp.int32)
    total = jnp.sum(same, axis=0)
    rank = jnp.sum((jnp.cumsum(same, axis=0) - 1) * same, axis=-1)  # within its class
    place = (written[labels] + rank) % size
    return jnp.where(rank < total[labels] - size, size, place), written + total


def is_full(queue: Queue) -> Bool[Array, ""]:
    """Whether the queue of every class has been filled once."""
    return jnp.all(queue["written"] >= queue["rows"].shape[1])
