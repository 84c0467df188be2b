"""The latest features of every class: ring buffers of fixed shape, for a method's `model_state`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Queue = dict[str, Any]  # `rows` (C, Q, d); `written` (C,): rows ever written to each class


def empty(classes: int, size: int, width: int) -> Queue:
    """Queues of `size` rows a class, with nothing in them."""
    return {
        "rows": jnp.zeros((classes, size, width)),
        "written": jnp.zeros((classes,), jnp.int32),
    }


def push(queue: Queue, features: Float[Array, "b d"], labels: Int[Array, " b"]) -> Queue:
    """Write each row to the queue of its label, over that queue's oldest row; no gradient.

    Rows of a batch are written in their order. Of more rows of a class than its queue holds, the
    last ones stay, as if they had been written one by one.
    """
    rows = queue["rows"]
    place, written = slots(queue["written"], labels, rows.shape[1])
    features = jax.lax.stop_gradient(features).astype(rows.dtype)
    return {"rows": rows.at[labels, place].set(features, mode="drop"), "written": written}


def slots(
    written: Int[Array, " c"], labels: Int[Array, " b"], size: int
) -> tuple[Int[Array, " b"], Int[Array, " c"]]:
    """Where in its class's ring each row of a batch goes, and `written` after the batch.

    No two rows have the same place, so the order of a scatter does not matter. A row whose place
    a later row of the batch takes gets `size`, past the end, where a scatter drops it.
    """
    same = jax.nn.one_hot(labels, written.shape[0], dtype=jnp.int32)
    total = jnp.sum(same, axis=0)
    rank = jnp.sum((jnp.cumsum(same, axis=0) - 1) * same, axis=-1)  # among the rows of its class
    place = (written[labels] + rank) % size
    return jnp.where(rank < total[labels] - size, size, place), written + total


def is_full(queue: Queue) -> Bool[Array, ""]:
    """Whether the queue of every class has been filled once."""
    return jnp.all(queue["written"] >= queue["rows"].shape[1])
