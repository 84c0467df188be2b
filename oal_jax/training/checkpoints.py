"""Checkpoints of a training state: Orbax behind one small class, asynchronous and atomic.

All processes share the directory. Each writes its shards and reads those that it needs. Orbax's
chunks carry no checksum, so each checkpoint holds the digests of its files.
"""

import functools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax

from oal_jax.errors import UserError
from oal_jax.runtime import artifacts, distributed, preemption, processes

_DIGESTS = "digests.json"
_LOGGER = logging.getLogger("absl")


class _Damaged(Exception):
    """A checkpoint can't be read. The message is the reason in one line."""


class Checkpoints:
    """States of one training in a directory of their own."""

    def __init__(self, directory: Path, keep: int = 2):
        """Open or create `directory`, and delete what an interrupted save left.

        The newest `keep` checkpoints stay; 0 for all.
        """
        import orbax.checkpoint as ocp  # slow to import, and loading a detector needs none

        self.directory = directory.absolute()
        _silence_cut_off_threads()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None,
            create=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: Any) -> None:
        """Start to write the state under its step."""
        import orbax.checkpoint as ocp

        # Orbax may swallow an interruption, and the training would go on.
        with preemption.interrupt_after():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def latest(self) -> int | None:
        """Step of the newest checkpoint; None without one."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, the oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Any) -> Any | None:
        """The newest state that can be read, placed and sharded as `like`; None without one.

        Damaged checkpoints after it are deleted with a warning.

        Raises:
          UserError: there are checkpoints, and none can be read.
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
            for later in damaged:  # training reaches these steps again and saves there
                self._manager.delete(later)
            return state
        if steps:
            raise UserError(
                f"no checkpoint under {self.directory} can be read; delete the directory to"
                " train this stage from its start"
            )
        return None

    def _read(self, step: int, like: Any) -> Any:
        import orbax.checkpoint as ocp

        target, reason = jax.tree.map(ocp.utils.to_shape_dtype_struct, like), ""
        try:
            _check_digests(self.directory / str(step))
            state = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        if not distributed.all_processes(not reason):
            raise _Damaged(reason or "another process can't read its part")
        return state

    def _write_digests(self) -> None:
        """Write the digests of the save under way, before Orbax gives it its final name.

        Runs in Orbax's thread, once all processes have written their shards.
        """
        if processes.is_main():
            for step in self.directory.iterdir():
                if step.is_dir() and not (step / _DIGESTS).exists():
                    digests = {name: artifacts.sha256(path) for name, path in _data_files(step)}
                    (step / _DIGESTS).write_text(json.dumps(digests))

    def close(self) -> None:
        """Wait for writes under way, then close the directory."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()


def _data_files(step: Path) -> list[tuple[str, Path]]:
    """Names and paths of the files that hold a state. Orbax changes the others after a save."""
    below = sorted(step.glob("*/**/*"))
    return [(path.relative_to(step).as_posix(), path) for path in below if path.is_file()]


def _check_digests(step: Path) -> None:
    """Raise `_Damaged` if this process's part of the files differs from the digests."""
    try:
        digests = dict(json.loads((step / _DIGESTS).read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        raise _Damaged(f"{step / _DIGESTS} is missing or damaged") from None
    present = dict(_data_files(step))
    if missing := sorted(digests.keys() - present.keys()):
        raise _Damaged(f"{step / missing[0]} is missing")
    # The processes share the reading.
    for name in sorted(present)[processes.index() :: processes.count()]:
        if digests.get(name) != artifacts.sha256(present[name]):
            raise _Damaged(f"{present[name]} has another sha256 than {_DIGESTS} says")


@functools.cache
def _silence_cut_off_threads() -> None:
    """Leave only the exception of a read or write that failed; once, for the whole process.

    Orbax's threads print it again with tracebacks, and later complain of a closed event loop: pages
    that would hide the command's one line.
    """
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    _LOGGER.addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
