"""One training from start to end: resume where a checkpoint is, log, and let go of both."""

from collections.abc import Callable, Mapping
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
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    **options: Any,
) -> Any:
    """`loop.fit` with checkpoints below `directory` and the log of `workdir`; the last state.

    Order of resumption: this run's own newest checkpoint that can be read, else `fresh`.
    A checkpoint of any number of devices and processes is resumed: it is read as `mesh` wants it.
    The newest `keep` checkpoints stay, 0 for all. `options` go to `loop.fit`.
    """
    try:
        with closing(Checkpoints(directory, keep)) as checkpoints:
            fresh = distributed.place_parameters(fresh, mesh)
            state = checkpoints.restore(fresh)
            state = fresh if state is None else state
            first = int(state.step)
            writes = processes.is_main()
            with closing(MetricsLog(workdir, name, first)) if writes else nullcontext() as log:
                return loop.fit(
                    train_step,
                    state,
                    arrays,
                    make_batch,
                    plan,
                    name=name,
                    log=log,
                    mesh=mesh,
                    checkpoints=checkpoints,
                    evaluate=evaluate,
                    **options,
                )
    except Preempted:
        processes.wait_for_all()  # none may go before all have saved
        raise
