"""Checkpoints of a training state: Orbax behind one small class, asynchronous and atomic."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from oal_jax.errors import UserError


class Checkpoints:
    """The last few states of one run in a directory of their own."""

    def __init__(self, directory: Path, keep: int = 2):
        """Open (and create) `directory`; leftovers of an interrupted save are ignored."""
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: Any) -> None:
        """Write the state under its step; returns before the bytes are on disk."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def latest(self) -> int | None:
        """Step of the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Any | None:
        """The newest state that can be read whole, placed and sharded as `like`; None if none is.

        A damaged newest checkpoint is passed over, with a warning, for the one before it.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for step in steps:
            try:
                return self._manager.restore(step, args=ocp.args.StandardRestore(target))
            except Exception as error:  # noqa: BLE001 - Orbax and TensorStore raise many kinds
                reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
                logging.warning("checkpoint %d is damaged, trying the one before: %s", step, reason)
        if steps:
            raise UserError(
                f"no checkpoint under {self.directory} can be read; delete the directory to"
                " train this stage from its start"
            )
        return None

    def close(self) -> None:
        """Wait for writes that are under way, then let go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()
