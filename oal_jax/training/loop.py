"""The one training loop: student, teacher and generator all pass through it."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key
from tqdm import tqdm

from oal_jax import distributed
from oal_jax.keys import at_step
from oal_jax.training.checkpoints import Checkpoints
from oal_jax.training.log import MetricsLog

Arrays = Mapping[str, Any]
MakeBatch = Callable[[Arrays, Int[Array, " b"], Int[Array, ""], Int[Array, ""]], dict[str, Array]]


class TrainingFailed(Exception):
    """The loss or the parameters stopped being finite, or the model collapsed."""


class Preempted(Exception):
    """SIGTERM arrived; the state was saved."""


class Plan(NamedTuple):
    """How long and how often, in whole numbers."""

    examples: int
    batch_size: int
    epochs: int
    log_every: int = 20
    checkpoint_every: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches an epoch; the rest of the shuffled examples waits for another epoch."""
        return self.examples // self.batch_size

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.steps_per_epoch * self.epochs


def compile_step(
    train_step: Callable, make_batch: MakeBatch, plan: Plan, mesh: Mesh, steps_per_call: int = 1
) -> Callable[[Any, Arrays, Int[Array, "s b"]], tuple[Any, dict[str, Array]]]:
    """`(state, arrays, order) -> (state, metrics)`: draw the batch, take the step; state donated.

    With `steps_per_call` > 1 that many steps run in one `lax.scan` and the metrics are those of
    the last: for accelerators. On CPU the gradient of a convolution inside a scan is about a
    hundred times slower than outside, so there a call is one step.
    """

    def one(state, arrays, order):
        epoch, row = state.step // plan.steps_per_epoch, state.step % plan.steps_per_epoch
        batch = make_batch(arrays, order[row], epoch, state.step)
        return train_step(state, distributed.shard_batch(batch, mesh))

    def several(state, arrays, order):
        state, metrics = jax.lax.scan(
            lambda s, _: one(s, arrays, order), state, length=steps_per_call
        )
        return state, jax.tree.map(lambda m: m[-1], metrics)

    return jax.jit(one if steps_per_call == 1 else several, donate_argnums=0)


def fit(
    train_step: Callable,
    state: Any,
    arrays: Arrays,
    make_batch: MakeBatch,
    plan: Plan,
    *,
    key: Key[Array, ""],
    mesh: Mesh,
    name: str,
    log: MetricsLog | None = None,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    steps_per_call: int | None = None,
) -> Any:
    """Train from `state.step` to the end of the plan and return the last state.

    `state` is any pytree with an int32 scalar `step` (it is donated); `arrays` stay on the
    devices; `make_batch(arrays, indices, epoch, step)` runs inside jit. Epochs are permuted by
    `fold_in(key, epoch)`, so the step number alone says where to resume. `evaluate(state)` runs
    after every epoch.

    Raises:
      TrainingFailed: a metric is not finite; what was saved before stays.
      Preempted: SIGTERM arrived; the state was saved first.
    """
    per_call = steps_per_call or (1 if jax.default_backend() == "cpu" else plan.log_every)
    step_fns: dict[int, Callable] = {}
    draw = jax.jit(
        lambda epoch: jax.random.permutation(at_step(key, "order", epoch), plan.examples)[
            : plan.steps_per_epoch * plan.batch_size
        ].reshape(plan.steps_per_epoch, plan.batch_size)
    )
    state, arrays = distributed.replicate((state, dict(arrays)), mesh)
    step = int(state.step)
    saved = checkpoints.latest() if checkpoints else None
    pending: tuple[int, dict[str, Array]] | None = None

    def report(entry):
        at, metrics = entry
        values = {k: float(v) for k, v in metrics.items()}
        bad = [k for k, v in values.items() if not np.isfinite(v)]
        if bad:
            kept = f"checkpoint of step {saved} is kept" if saved else "no checkpoint was saved yet"
            raise TrainingFailed(f"{name}: {bad[0]} is {values[bad[0]]} at step {at}; {kept}")
        if log:
            log.write(at, values)
        bar.set_postfix(loss=f"{values['loss']:.3f}")

    with (
        _sigterm() as stop,
        tqdm(total=plan.steps, initial=step, desc=name, unit="step", mininterval=1.0) as bar,
    ):
        while step < plan.steps:
            epoch = step // plan.steps_per_epoch
            end = (epoch + 1) * plan.steps_per_epoch
            order, metrics = draw(epoch), None
            while step < end and not stop():
                # Up to the next logged step or the end of the epoch, so that the metrics of a
                # call are those of the step they are logged under.
                count = min(per_call, end - step, plan.log_every - step % plan.log_every)
                if count not in step_fns:
                    step_fns[count] = compile_step(train_step, make_batch, plan, mesh, count)
                state, metrics = step_fns[count](state, arrays, order)
                step += count
                bar.update(count)
                if step % plan.log_every == 0:
                    # The previous logged step is read now, after this one was dispatched.
                    if pending:
                        report(pending)
                    pending = (step, metrics)
            if pending:
                report(pending)
                pending = None
            if metrics and step % plan.log_every:
                report((step, metrics))  # nothing that is not finite may reach a checkpoint
            epoch_ends = step == end and (epoch + 1) % plan.checkpoint_every == 0
            if checkpoints and step != saved and (stop() or epoch_ends or step == plan.steps):
                checkpoints.save(state)
                saved = step
            if stop():
                raise Preempted(f"{name}: stopped by SIGTERM at step {step}, which was saved")
            if evaluate:
                values = dict(evaluate(state))
                if log:
                    log.write(step, values)
    return state


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """While inside, SIGTERM only raises a flag."""
    seen: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    except ValueError:  # not the main thread: the default behaviour stays
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)
