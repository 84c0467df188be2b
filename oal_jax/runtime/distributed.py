"""Devices and processes: the only file that knows how many of them there are."""

import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from oal_jax.errors import UserError
from oal_jax.runtime import processes

JOIN_TIMEOUT = 120  # seconds for all processes of a run to find one another
HEARTBEAT_TIMEOUT = 60  # seconds of silence after which a process counts as dead

# Parameters of fewer elements are replicated: splitting them saves nothing.
_SPLIT_FROM = 2**16


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    detect: bool = False,
    join_timeout: int | None = None,
    heartbeat_timeout: int | None = None,
) -> None:
    """Join the other processes of a run. Without arguments, does nothing.

    When they can't be joined in time, the process ends with one line and exit code 2: the thread
    that waits for them can't be interrupted.

    Args:
      coordinator: HOST:PORT where process 0 listens; needs the next two.
      num_processes: number of processes of the run.
      process_id: number of this process, from 0.
      detect: read all three from the cluster: a TPU pod, SLURM, Open MPI, Kubernetes.
      join_timeout: seconds in which all processes must join; default `JOIN_TIMEOUT`.
      heartbeat_timeout: seconds of silence after which another process counts as dead and this one
        ends with exit code 1; default `HEARTBEAT_TIMEOUT`.

    Raises:
      UserError: some of the three are missing or impossible, or no cluster is detected.
    """
    join_timeout = JOIN_TIMEOUT if join_timeout is None else join_timeout
    heartbeat_timeout = HEARTBEAT_TIMEOUT if heartbeat_timeout is None else heartbeat_timeout
    for name, seconds in (("join", join_timeout), ("heartbeat", heartbeat_timeout)):
        if seconds < 1:
            raise UserError(f"--{name}-timeout {seconds} must be at least 1 second")
    address = (coordinator, num_processes, process_id)
    if address != (None, None, None):
        if None in address:
            raise UserError("--coordinator, --num-processes and --process-id go together: give all")
        _check_address(coordinator, num_processes, process_id)
    elif not detect:
        return
    # It would take SIGTERM for the whole process: see `runtime.preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    too_late = threading.Timer(join_timeout, _give_up, (*address, join_timeout))
    too_late.daemon = True
    too_late.start()
    processes.explain_aborts()
    try:
        jax.distributed.initialize(
            *address,
            # JAX ends its own wait with an abort and a page of addresses; `_give_up` comes first.
            initialization_timeout=10 * join_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(_join_error(error, coordinator)) from None
    finally:
        too_late.cancel()
    processes.watch()
    counts = [sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise UserError(f"the processes have different numbers of devices: {counts}; give each one")


def _check_address(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator '{coordinator}' must be HOST:PORT, such as 10.0.0.1:1234")
    if num_processes < 1:
        raise UserError(f"--num-processes {num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id {process_id} must lie in 0..{num_processes - 1}")


def _give_up(
    coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: int
) -> None:
    """End the process, from a thread beside the one that waits, with the reason."""
    if coordinator is None:
        reason = "the processes of this run did not find one another"
    elif process_id and (error := _connection_error(coordinator)):
        reason = f"no coordinator at {coordinator} ({error}); process 0 has to run there"
    else:
        reason = f"the {num_processes} processes of this run did not all join at {coordinator}"
    processes.exit_now(2, f"{reason}; gave up after {seconds} s (--join-timeout)")


def _connection_error(coordinator: str) -> str:
    """Why nothing can connect to HOST:PORT; empty where something listens."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _join_error(error: Exception, coordinator: str | None) -> str:
    reason = str(error).splitlines()[0]
    if coordinator is None:
        return (
            f"--distributed finds no cluster here ({reason}); give --coordinator, --num-processes"
            " and --process-id"
        )
    return f"can't join the processes at {coordinator}: {reason}"


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of all devices: axis "data" for batches, axis "model" for large parameters.

    Args:
      model: size of the axis "model". Its devices belong to one process, so that every process has
        batches of its own.
      devices: default: all devices of all processes.

    Raises:
      UserError: `model` does not divide the devices of a process.
    """
    devices = jax.devices() if devices is None else devices
    local = sum(d.process_index == devices[0].process_index for d in devices)
    if model < 1 or local % model:
        raise UserError(
            f"config mesh.model={model} must divide the {local} devices of a process; use for"
            f" example {max(m for m in range(1, min(max(model, 1), local) + 1) if not local % m)}"
        )
    shape, axes = (len(devices) // model, model), ("data", "model")
    types = (AxisType.Auto, AxisType.Auto)
    # In the order of the network.
    mesh = jax.make_mesh(shape, axes, axis_types=types, devices=devices)
    if any(len({d.process_index for d in row}) > 1 for row in mesh.devices):
        ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
        mesh = Mesh(np.array(ordered).reshape(shape), axes, axis_types=types)
    return mesh


def is_main_process() -> bool:
    """Whether this is process 0, which writes the files that exist once."""
    return processes.is_main()


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raise `UserError` when a batch can't be split evenly over the devices."""
    devices = mesh.shape["data"]
    if batch_size % devices:
        near = max(1, batch_size // devices) * devices
        raise UserError(
            f"config {name}={batch_size} is not divisible by the {devices} devices;"
            f" use for example {near}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
    """Sharding that splits the leading axis over the devices of "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shardings(shapes: Any, mesh: Mesh) -> Any:
    """Shardings of parameters or of a state, from their shapes alone.

    Large tensors are split over the mesh axis "model", along their longest axis that it divides
    (the last of equals). All others have a copy on every device.
    """
    parts = mesh.shape.get("model", 1)

    def one(leaf) -> NamedSharding:
        divisible = [i for i, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or np.prod(leaf.shape) < _SPLIT_FROM or not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda i: (leaf.shape[i], i))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))

    return jax.tree.map(one, shapes)


def place(tree: Any, sharding: Any) -> Any:
    """Put the arrays of a pytree on the devices, by one sharding or a tree of them.

    Arrays on the host, or on this process's devices alone, must be equal on all processes.
    """
    if not processes.several():
        return jax.device_put(tree, sharding)
    return jax.tree.map(_place, tree, jax.tree.broadcast(sharding, tree))


def _place(array: Any, sharding: NamedSharding) -> Array:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.device_put(array, sharding)
    # `device_put` would compare the whole array with that of every other process.
    host = np.asarray(array)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every array of a pytree on every device."""
    return place(tree, replicated(mesh))


def place_parameters(tree: Any, mesh: Mesh) -> Any:
    """Put parameters on the devices, large tensors split over the axis "model"."""
    return place(tree, shardings(tree, mesh))


def init_parameters(init: Callable, key: Key[Array, ""], mesh: Mesh, **options: Any) -> Any:
    """`init(key)`, jitted with `options`. Every device makes only its part by `shardings`."""
    out_shardings = shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=out_shardings, **options)(key)


def from_processes(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Global arrays of a batch whose rows the processes hold, in the order of processes."""
    sharding = over_data(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Inside jit: split the leading axis of every array over the devices."""
    return jax.lax.with_sharding_constraint(tree, over_data(mesh))


def all_processes(flag: bool) -> bool:
    """Whether the flag is set on all processes. They wait for one another."""
    if not processes.several():
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def is_finite(tree: Any) -> bool:
    """Whether this process's part of every float array is finite. Waits for the arrays."""
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            parts = {str(shard.index): shard.data for shard in leaf.addressable_shards}
            if not all(np.isfinite(part).all() for part in parts.values()):
                return False
    return True


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array as numpy, also when its shards lie on several processes."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
