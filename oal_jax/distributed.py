"""Devices and processes: the only file that knows how many of them there are."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oal_jax.errors import UserError


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of a run; does nothing when none of the three is given."""
    given = [v is not None for v in (coordinator, num_processes, process_id)]
    if not any(given):
        return
    if not all(given):
        raise UserError("--coordinator, --num-processes and --process-id go together: give all")
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise UserError(f"--coordinator '{coordinator}' must be HOST:PORT")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id {process_id} must lie in 0..{num_processes - 1}")
    jax.distributed.initialize(coordinator, num_processes, process_id)


def make_mesh() -> Mesh:
    """All devices of all processes along one axis named "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def is_main_process() -> bool:
    """Whether this process writes the reports and the files that exist once."""
    return jax.process_index() == 0


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raise `UserError` when a batch can't be split evenly over the devices."""
    devices = mesh.shape["data"]
    if batch_size % devices:
        near = max(1, batch_size // devices) * devices
        raise UserError(
            f"config {name}={batch_size} is not divisible by the {devices} devices;"
            f" use for example {near}"
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every array of a pytree on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Inside jit: split the leading axis of every array over the devices."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec("data")))


def to_host(array: jax.Array) -> np.ndarray:
    """A whole array as numpy, also when its shards lie on several processes."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
