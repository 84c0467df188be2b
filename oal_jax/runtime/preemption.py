"""Signals that stop a training: SIGTERM as a flag that all processes agree on, Ctrl-C later.

Not JAX's preemption service (`multihost_utils.reached_preemption_sync_point`): it takes SIGTERM for
the whole process, so a stage that takes no steps would not end by it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from oal_jax.runtime import processes


@contextmanager
def deferred(number: int) -> Iterator[list[int]]:
    """Collect the signals of a number in a list instead of acting on them.

    Outside of the main thread Python handles no signals, and nothing changes.
    """
    received: list[int] = []
    try:
        before = signal.signal(number, lambda number, _: received.append(number))
    except ValueError:
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(number, before)


@contextmanager
def interrupt_after() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block."""
    with deferred(signal.SIGINT) as received:
        yield
    if received:
        signal.raise_signal(signal.SIGINT)


class Stop:
    """Whether to stop: one process when SIGTERM arrived, several when all know that it did.

    Several processes vote at the same steps and read each result at the next vote. It is computed
    by then, so no device and no process waits for it.
    """

    def __init__(self, received: list[int], mesh: Mesh):
        self._received, self._mesh = received, mesh
        self._result: Bool[Array, ""] | None = None
        self._agreed = False

    def __call__(self) -> bool:
        """Whether to stop now."""
        return self._agreed if processes.several() else bool(self._received)

    def vote(self) -> None:
        """Read the result of the last vote, and start another. All processes call this."""
        if processes.several():
            self._agreed = self._agreed or (self._result is not None and bool(self._result))
            self._result = any_process(bool(self._received), self._mesh)

    def settle(self) -> None:
        """Vote and wait for the result."""
        self.vote()
        self.vote()


@contextmanager
def stop_requested(mesh: Mesh) -> Iterator[Stop]:
    """Take SIGTERM as a request to stop, which the block polls."""
    with deferred(signal.SIGTERM) as received:
        yield Stop(received, mesh)
    if received and processes.several():  # it came after the last vote
        signal.raise_signal(signal.SIGTERM)


def any_process(flag: bool, mesh: Mesh) -> Bool[Array, ""]:
    """Whether the flag is set on some process, as a value that is not computed yet."""
    flags = np.full(jax.local_device_count(), flag)
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return _any(jax.make_array_from_process_local_data(everywhere, flags))


@jax.jit
def _any(flags):
    return jnp.any(flags)
