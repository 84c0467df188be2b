"""One training from start to end: resume where a checkpoint is, log, and let go of both."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

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
    keep: int = 2,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    **options: Any,
) -> Any:
    """`loop.fit` with checkpoints below `directory` and the log of `workdir`; the last state.

    Order of resumption: this run's own newest checkpoint that can be read, else `fresh`.
    The newest `keep` checkpoints stay, 0 for all. `options` go to `loop.fit`.
    """
    with closing(Checkpoints(directory, keep)) as checkpoints:
        state = checkpoints.restore(fresh)
        state = fresh if state is None else state
        with closing(MetricsLog(workdir, name, int(state.step))) as log:
            return loop.fit(
                train_step,
                state,
                arrays,
                make_batch,
                plan,
                name=name,
                log=log,
                checkpoints=checkpoints,
                evaluate=evaluate,
                **options,
            )
