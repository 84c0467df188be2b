"""The one way to run a jitted function over many rows, split over the devices of a mesh.

Every batch has one shape, so one program serves sets of any size: the last batch is filled up with
copies of its last row, and the results of those copies are cut off.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from oal_jax.runtime import distributed


class NoRows(ValueError):
    """There is no chunk, so the shapes of the results are unknown."""


def rows_per_batch(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up to a multiple of the devices that share a batch."""
    devices = mesh.shape["data"]
    return -(-batch_size // devices) * devices


def batches(chunks: Iterable[Any], batch_size: int, mesh: Mesh) -> Iterator[tuple[Any, int]]:
    """(batch, count) pairs: rows on the devices, of which the first `count` are not filling.

    Args:
      chunks: pytrees of arrays on the host, each with rows along the first axis. A set in memory is
        one chunk. A batch never spans two chunks, so chunks of a stream should be of
        `rows_per_batch` rows.
      batch_size: rows of a batch; see `rows_per_batch`.
      mesh: devices; the rows are split over its "data" axis.

    Yields:
      At least one batch a chunk: that of an empty chunk is filled with zeros.
    """
    size, sharding = rows_per_batch(batch_size, mesh), distributed.over_data(mesh)
    for chunk in chunks:
        n = len(jax.tree.leaves(chunk)[0])
        for start in range(0, max(n, 1), size):
            take = lambda x, start=start: _filled(x[start : start + size], size)
            yield distributed.place(jax.tree.map(take, chunk), sharding), min(size, n - start)


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    rows = np.asarray(rows)
    if len(rows) == size:
        return rows
    missing = [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(rows, missing, mode="edge" if len(rows) else "constant")


def results(
    function: Callable[[Any], Any], chunks: Iterable[Any], batch_size: int, mesh: Mesh
) -> Iterator[Any]:
    """The host's copy of `function(batch)` for each batch, without the filling.

    Each result is read after the next batch was dispatched, so the device never waits for the host.

    Args:
      function: jitted; a batch to a pytree of arrays with a row for each of its rows.
      chunks, batch_size, mesh: as for `batches`.
    """
    waiting = None
    for batch, count in batches(chunks, batch_size, mesh):
        dispatched = function(batch), count
        if waiting is not None:
            yield _on_host(*waiting)
        waiting = dispatched
    if waiting is not None:
        yield _on_host(*waiting)


def _on_host(outputs: Any, count: int) -> Any:
    return jax.tree.map(lambda x: distributed.to_host(x)[:count], outputs)


def apply(
    function: Callable[[Any], Any], chunks: Iterable[Any], batch_size: int, mesh: Mesh
) -> Any:
    """The `results` of all batches, concatenated: a pytree of NumPy arrays.

    Raises:
      NoRows: there is no chunk.
    """
    parts = list(results(function, chunks, batch_size, mesh))
    if not parts:
        raise NoRows
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)
