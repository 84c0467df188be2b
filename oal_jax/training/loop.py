"""The one training loop: student, teacher and generator all pass through it."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key
from tqdm import tqdm

from oal_jax import distributed
from oal_jax.errors import UserError
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
    log_every: int = 20  # steps, counted from the start of each epoch; its last is logged too
    checkpoint_every: int = 1  # epochs

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

    Metrics have a leading axis: one entry a step. With `steps_per_call` > 1 that many steps run in
    one `lax.scan`: for accelerators. On CPU the gradient of a convolution inside a scan is about a
    hundred times slower than outside, so there a call is one step.
    """

    def one(state, arrays, order):
        epoch, row = state.step // plan.steps_per_epoch, state.step % plan.steps_per_epoch
        batch = make_batch(arrays, order[row], epoch, state.step)
        return train_step(state, distributed.shard_batch(batch, mesh))

    def call(state, arrays, order):
        if steps_per_call == 1:
            state, metrics = one(state, arrays, order)
            return state, jax.tree.map(lambda m: m[None], metrics)
        return jax.lax.scan(lambda s, _: one(s, arrays, order), state, length=steps_per_call)

    return jax.jit(call, donate_argnums=0)


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
    after every epoch, and its values are logged with those of the epoch's last step.

    What a checkpoint's step and those before it log is on disk before the checkpoint is, so a
    resumed run leaves the same lines as one that was never stopped.

    Raises:
      TrainingFailed: a metric or the state is not finite; what was saved before stays.
      Preempted: SIGTERM arrived; the state was saved first.
      UserError: an epoch has not even one batch.
    """
    if not plan.steps_per_epoch:
        raise UserError(
            f"{name}: batch_size={plan.batch_size} is more than the {plan.examples} training images"
        )
    per_call = steps_per_call or (1 if jax.default_backend() == "cpu" else plan.log_every)
    compiled: dict[int, Callable] = {}
    state, arrays = distributed.replicate((state, dict(arrays)), mesh)
    step = int(state.step)
    saved = checkpoints.latest() if checkpoints else None

    def fail(what: str):
        kept = "no checkpoint was saved yet" if saved is None else f"that of step {saved} is kept"
        raise TrainingFailed(f"{name}: {what}; checkpoint: {kept}")

    def read(calls) -> dict[str, float]:
        """The metrics of the last step of these calls; every step of them must be finite."""
        for last, metrics in jax.device_get(calls):
            names = list(metrics)
            table = np.stack([metrics[name] for name in names], axis=1)
            wrong = np.argwhere(~np.isfinite(table))
            if wrong.size:
                row, column = wrong[0]
                at = last - len(table) + 1 + row
                fail(f"{names[column]} is {table[row, column]} at step {at}")
        return {k: float(v[-1]) for k, v in metrics.items()}

    def write(calls, more: Mapping[str, float] | None = None):
        values = read(calls) | dict(more or {})
        if log:
            log.write(calls[-1][0], values)
        if "loss" in values:
            bar.set_postfix(loss=f"{values['loss']:.3f}")

    with (
        _sigterm() as stop,
        tqdm(total=plan.steps, initial=step, desc=name, unit="step", mininterval=1.0) as bar,
    ):
        while step < plan.steps:
            epoch = step // plan.steps_per_epoch
            start, end = epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch
            order = distributed.replicate(_order(key, epoch, plan), mesh)
            calls: list = []  # since the last logged step: (step after the call, metrics)
            due: list = []  # those up to the last logged step
            while step < end and not stop():
                # Up to the next logged step. Counted from the start of the epoch, so that there are
                # at most two lengths of a call to compile: the usual one and an epoch's last.
                count = min(per_call, end - step, plan.log_every - (step - start) % plan.log_every)
                if count not in compiled:
                    compiled[count] = compile_step(train_step, make_batch, plan, mesh, count)
                with jax.transfer_guard("disallow"):
                    state, metrics = compiled[count](state, arrays, order)
                step += count
                bar.update(count)
                calls.append((step, metrics))
                if step == end or (step - start) % plan.log_every == 0:
                    # What was logged before is read now, after this call was dispatched.
                    if due:
                        write(due)
                    due, calls = calls, []
            ended, stopping = step == end, stop()
            # Nothing that is not finite may reach a checkpoint.
            for unread in (due, calls):
                if unread:
                    read(unread)
            if not _all_finite(state):
                fail(f"the state is not finite after step {step}")
            if due:
                write(due, evaluate(state) if evaluate and ended else None)
            at_epoch = ended and (epoch + 1) % plan.checkpoint_every == 0
            if checkpoints and step != saved and (at_epoch or stopping or step == plan.steps):
                if log:
                    log.sync()
                checkpoints.save(state)
                saved = step
            if stopping or (stop() and step == plan.steps):
                kept = "which was saved" if checkpoints else "without a checkpoint"
                raise Preempted(f"{name}: stopped by SIGTERM at step {step}, {kept}")
    return state


@partial(jax.jit, static_argnames="plan")
def _order(key: Key[Array, ""], epoch: int, plan: Plan) -> Int[Array, "s b"]:
    """Which examples each step of an epoch draws."""
    order = jax.random.permutation(at_step(key, "order", epoch), plan.examples)
    used = plan.steps_per_epoch * plan.batch_size
    return order[:used].reshape(plan.steps_per_epoch, plan.batch_size)


def _all_finite(state: Any) -> bool:
    # On the host, where a checkpoint goes next anyway: nothing to compile.
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return all(np.isfinite(distributed.to_host(x)).all() for x in leaves)


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
