"""Runs `loop.fit` with checkpoints and the log of a run."""

from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from oal_jax.errors import Preempted
from oal_jax.runtime import distributed, processes
from oal_jax.training import loop
from oal_jax.training.checkpoints import Checkpoints
from oal_jax.training.log import MetricsLog


def train(
    train_step: Callable,
    fresh: Any,
    arrays: loop.Arrays,
    make_batch: loop.MakeBatch,
    plan: loop.Plan,
    *,
    workdir: Path,
    directory: Path,
    name: str,
    mesh: Mesh,
    keep: int = 2,
    **options: Any,
) -> Any:
    """Train to the end of the plan; the last state.

    Resumes from the newest checkpoint that can be read, of any number of devices and processes;
    without one, starts from `fresh`.

    Args:
      train_step: as for `loop.fit`, like `arrays`, `make_batch` and `plan`.
      fresh: the state of step 0.
      workdir: directory of the log.
      directory: directory of the checkpoints.
      name: of the training, in the log and in messages.
      mesh: the devices.
      keep: how many of the newest checkpoints stay; 0 for all.
      **options: further arguments of `loop.fit`.
    """
    try:
        with closing(Checkpoints(directory, keep)) as checkpoints:
            fresh = distributed.place_parameters(fresh, mesh)
            state = checkpoints.restore(fresh)
            state = fresh if state is None else state
            first = int(state.step)
            writes = processes.is_main()
            with closing(MetricsLog(workdir, name, first)) if writes else nullcontext() as log:
                options |= {"mesh": mesh, "name": name, "log": log, "checkpoints": checkpoints}
                return loop.fit(train_step, state, arrays, make_batch, plan, **options)
    except Preempted:
        processes.wait_for_all()  # all must have saved before one exits
        raise
