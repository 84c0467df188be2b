"""Checkpoints of a training state: Orbax behind one small class, asynchronous and atomic.

Every process writes its shards, and reads what it needs, of a directory that all of them share.
"""

import gc
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from oal_jax.errors import UserError
from oal_jax.runtime import distributed, preemption

_LOGGER = logging.getLogger("absl")


class _Damaged(Exception):
    """A checkpoint cannot be read; the message is the reason, one line."""


class Checkpoints:
    """The last few states of one run, or all, in a directory of their own."""

    def __init__(self, directory: Path, keep: int = 2):
        """Open (and create) `directory`; leftovers of an interrupted save are deleted.

        Of the checkpoints the newest `keep` stay, 0 for all.
        """
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, create=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._until_closed = ExitStack()
        self._until_closed.enter_context(_no_stray_tracebacks())

    def save(self, state: Any) -> None:
        """Write the state under its step; returns before the bytes are on disk."""
        # Orbax may swallow an interruption, and the training would go on.
        with preemption.interrupt_after():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def latest(self) -> int | None:
        """Step of the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, the oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Any) -> Any | None:
        """The newest state that can be read whole, placed and sharded as `like`; None if none is.

        A damaged newest checkpoint is deleted, with a warning, for the one before it.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        steps = self.steps()
        damaged = []
        for step in reversed(steps):
            try:
                state = self._read(step, like)
            except _Damaged as reason:
                _LOGGER.warning("checkpoint %d is damaged, trying the one before: %s", step, reason)
                damaged.append(step)
                continue
            for later in damaged:  # in the way of the save that is due at that step again
                self._manager.delete(later)
            return state
        if steps:
            raise UserError(
                f"no checkpoint under {self.directory} can be read; delete the directory to"
                " train this stage from its start"
            )
        return None

    def restore_step(self, step: int, like: Any) -> Any:
        """The state of one step, placed and sharded as `like`.

        Raises:
          UserError: there is no checkpoint of that step, or it cannot be read.
        """
        steps = self.steps()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has: {there}")
        try:
            return self._read(step, like)
        except _Damaged as reason:
            raise UserError(
                f"checkpoint {self.directory / str(step)} is damaged ({reason}); delete the"
                " directory of its stage to train it from its start"
            ) from None

    def _read(self, step: int, like: Any) -> Any:
        target, reason = jax.tree.map(ocp.utils.to_shape_dtype_struct, like), ""
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        if not distributed.all_processes(not reason):
            raise _Damaged(reason or "another process can't read its part")
        return state

    def close(self) -> None:
        """Wait for writes that are under way, then let go of the directory."""
        with self._until_closed:
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()


@contextmanager
def _no_stray_tracebacks() -> Iterator[None]:
    """Leave only the exception itself of a read or write that failed.

    Orbax also logs it with a traceback from its thread, and abandons its other reads and writes,
    which then complain of a closed event loop: pages that would hide the one line to be read.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    def hook(unraisable) -> None:
        frames = traceback.extract_tb(unraisable.exc_traceback)
        if not any("orbax" in f.filename or "asyncio" in f.filename for f in frames):
            before(unraisable)

    before = sys.unraisablehook
    sys.unraisablehook = hook
    _LOGGER.addFilter(wanted)
    try:
        yield
    finally:
        time.sleep(0.1)  # until the threads of what was abandoned have said it
        gc.collect()
        sys.unraisablehook = before
        _LOGGER.removeFilter(wanted)
