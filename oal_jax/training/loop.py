"""The one training loop, of student, teacher and generator alike."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from oal_jax.errors import Preempted, TrainingFailed, UserError
from oal_jax.runtime import distributed, preemption
from oal_jax.runtime.keys import at_step
from oal_jax.runtime.progress import Bar
from oal_jax.training.checkpoints import Checkpoints
from oal_jax.training.log import MetricsLog
from oal_jax.training.state import compiler_options

Arrays = Mapping[str, Any]
MakeBatch = Callable[[Arrays, Int[Array, " b"], Int[Array, ""], Int[Array, ""]], dict[str, Array]]
Rows = Callable[[int], AbstractContextManager[Iterator[Mapping[str, np.ndarray]]]]


class Call(NamedTuple):
    """One call of a compiled step."""

    epoch: int
    steps: int  # how many it takes
    step: int  # number of steps after it
    logged: bool
    ends_epoch: bool


class Plan(NamedTuple):
    """How long a training is and how often it logs and saves."""

    examples: int
    batch_size: int
    epochs: int
    log_every: int = 20  # steps, counted from the start of each epoch; its last step is logged too
    checkpoint_every: int = 1  # epochs; the state is evaluated then, too

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch; the rest of the shuffled examples is left out."""
        return self.examples // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.steps_per_epoch * self.epochs

    def calls(self, step: int, per_call: int) -> Iterator[Call]:
        """The calls after `step`, of `per_call` steps each, none across a logged step.

        Logged steps are counted from the start of the epoch, so calls have at most two lengths to
        compile: the usual one and that of an epoch's last.
        """
        while step < self.steps:
            epoch, row = divmod(step, self.steps_per_epoch)
            steps = min(per_call, self.steps_per_epoch - row, self.log_every - row % self.log_every)
            step, row = step + steps, row + steps
            ends_epoch = row == self.steps_per_epoch
            yield Call(epoch, steps, step, ends_epoch or row % self.log_every == 0, ends_epoch)


def compile_step(
    train_step: Callable,
    make_batch: MakeBatch,
    plan: Plan,
    mesh: Mesh,
    steps_per_call: int = 1,
    *,
    shardings: Any = None,
    streamed: bool = False,
) -> Callable[[Any, Arrays, Any], tuple[Any, dict[str, Array]]]:
    """`(state, arrays, order) -> (state, metrics)`: draw batches and take steps. Donates the state.

    Metrics have a leading axis of steps. Several steps a call run in one `lax.scan`: for
    accelerators. On CPU the gradient of a convolution is about a hundred times slower inside a
    scan, so there a call is one step.

    Args:
      train_step: `(state, batch) -> (state, metrics)`.
      make_batch: `(arrays, indices, epoch, step) -> batch`.
      plan: of the training.
      mesh: batches are split over its axis "data".
      steps_per_call: steps of one call.
      shardings: of the returned state; default: a copy on every device.
      streamed: take the rows of the batch, a dict with "index", in place of `order`, (s, b) int32.
    """

    def one(state, arrays, source):
        epoch, row = state.step // plan.steps_per_epoch, state.step % plan.steps_per_epoch
        if streamed:
            arrays, indices = dict(arrays) | {"rows": source}, source["index"]
        else:
            indices = source[row]
        batch = make_batch(arrays, indices, epoch, state.step)
        return train_step(state, distributed.shard_batch(batch, mesh))

    def call(state, arrays, source):
        if steps_per_call == 1:
            state, metrics = one(state, arrays, source)
            return state, jax.tree.map(lambda m: m[None], metrics)
        return jax.lax.scan(lambda s, _: one(s, arrays, source), state, length=steps_per_call)

    copies = distributed.replicated(mesh)
    out_shardings = (copies if shardings is None else shardings, copies)
    options = compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(call, donate_argnums=0, out_shardings=out_shardings, compiler_options=options)


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
    rows: Rows | None = None,
) -> Any:
    """Train from `state.step` to the end of the plan; the last state.

    Epochs are permuted by `fold_in(key, epoch)`, so the step number alone says where to resume.
    Lines of the log are on disk before the checkpoint after them, so a resumed run leaves the same
    lines as one that was never stopped. All processes of a run call this alike.

    Args:
      train_step: `(state, batch) -> (state, metrics)`, metrics a dict of scalars.
      state: pytree with an int32 scalar `step`; donated; equal on all processes.
      arrays: put on the devices and kept there; equal on all processes.
      make_batch: `(arrays, indices, epoch, step) -> batch`, traced.
      plan: how long, and how often to log and save.
      key: of the permutations.
      mesh: batches are split over its axis "data".
      name: of the training, in messages and the progress bar.
      log: where the metrics of logged steps go.
      checkpoints: where states go.
      evaluate: called with the state every `plan.checkpoint_every` epochs and at the end; its
        values are logged with those of the epoch's last step.
      steps_per_call: default: 1 on CPU, else `plan.log_every`.
      rows: streams images that do not fit on the devices. `rows(step)` is a context manager of an
        iterator over this process's part of the batches of `step`, `step + 1`, ...: dicts {"index":
        int32 (b,), "image": uint8 (b, H, W, c), "label": int32 (b,)}, b = batch_size / processes.
        `make_batch` gets the whole batch, split over the devices, as `arrays["rows"]`. A call is
        one step, and the host reads the next batch while the devices work on this one.

    Raises:
      TrainingFailed: a metric or the state is not finite. Earlier checkpoints stay.
      Preempted: SIGTERM arrived on any process; the state was saved first. Several processes stop
        at the same step, up to two logged ones after it.
      UserError: an epoch has no whole batch; streamed batches end early or have other sizes.
    """
    if not plan.steps_per_epoch:
        raise UserError(
            f"{name}: batch_size={plan.batch_size} is more than the {plan.examples} training images"
        )
    per_call = steps_per_call or (1 if jax.default_backend() == "cpu" else plan.log_every)
    per_call = 1 if rows else per_call
    shardings = distributed.shardings(state, mesh)
    state = distributed.place(state, shardings)
    arrays = distributed.replicate(dict(arrays), mesh)
    first = int(state.step)
    saved = checkpoints.latest() if checkpoints else None
    options = {"shardings": shardings, "streamed": rows is not None}

    @functools.cache
    def compiled(steps: int) -> Callable:
        return compile_step(train_step, make_batch, plan, mesh, steps, **options)

    def failed(reason: str) -> TrainingFailed:
        kept = "no checkpoint was saved yet" if saved is None else f"that of step {saved} is kept"
        return TrainingFailed(f"{name}: {reason}; checkpoint: {kept}")

    with (
        preemption.stop_requested(mesh) as stop,
        _streamed(rows, first, plan, mesh, name) as batches,
        Bar(plan.steps, name, "step", initial=first) as bar,
    ):
        metrics, order, epoch = _Metrics(log, bar, failed), None, None
        sizes: set[int] = set()  # of the calls whose programs are compiled
        for call in plan.calls(first, per_call):
            if rows is None and call.epoch != epoch:
                epoch = call.epoch
                order = distributed.replicate(epoch_order(key, epoch, plan), mesh)
            source = order if rows is None else next(batches)
            if call.steps not in sizes:
                bar.compiling()
                sizes.add(call.steps)
            with jax.transfer_guard("disallow"):
                state, values = compiled(call.steps)(state, arrays, source)
            bar.update(call.steps)
            metrics.add(call, values)
            if rows is not None:
                metrics.wait()
            if call.logged:
                stop.vote()
            if call.step == plan.steps:
                stop.settle()
            if not call.ends_epoch and not stop():
                continue
            # Nothing that is not finite may reach a checkpoint.
            metrics.check()
            if not distributed.is_finite(state):
                raise failed(f"the state is not finite after step {call.step}")
            at_epoch = call.ends_epoch and (call.epoch + 1) % plan.checkpoint_every == 0
            at_epoch |= call.step == plan.steps
            metrics.write(evaluate(state) if evaluate and at_epoch else {})
            stopping = stop()
            if checkpoints and (at_epoch or stopping):
                if log:
                    log.sync()
                checkpoints.save(state)
                saved = call.step
            if stopping or (call.step == plan.steps and stop()):
                kept = "which was saved" if checkpoints else "without a checkpoint"
                raise Preempted(f"{name}: stopped by SIGTERM at step {call.step}, {kept}")
    return state


class _Metrics:
    """Metrics of calls that the devices may still be working on.

    Those up to a logged step are read and written when the next logged step was dispatched, so the
    host does not wait for the devices.
    """

    def __init__(self, log: MetricsLog | None, bar: Bar, failed: Callable[[str], Exception]):
        self._log, self._bar, self._failed = log, bar, failed
        self._due: list[tuple[int, dict]] = []  # (step, metrics) of the calls to the last logged
        self._calls: list[tuple[int, dict]] = []  # of those since

    def add(self, call: Call, metrics: dict[str, Array]) -> None:
        self._calls.append((call.step, metrics))
        if call.logged:
            self.write({})
            self._due, self._calls = self._calls, []

    def wait(self) -> None:
        """Wait for the last call but one, so that two batches at most are on the devices."""
        if len(self._calls) > 1:
            jax.block_until_ready(self._calls[-2][1])

    def check(self) -> None:
        """Raise where a metric of any call is not finite."""
        self._read(self._due)
        self._read(self._calls)

    def write(self, more: Mapping[str, float]) -> None:
        """Write what is due, and `more` with it."""
        if not self._due:
            return
        values = self._read(self._due) | dict(more)
        if self._log:
            self._log.write(self._due[-1][0], values)
        if "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.3f}")
        self._due = []

    def _read(self, calls: list[tuple[int, dict]]) -> dict[str, float]:
        """The metrics of the last step of some calls."""
        metrics: dict = {}
        for last, metrics in jax.device_get(calls):
            table = np.stack(list(metrics.values()), axis=1)
            bad = np.argwhere(~np.isfinite(table))
            if bad.size:
                row, column = bad[0]
                step = last - len(table) + 1 + row
                metric = list(metrics)[column]
                raise self._failed(f"{metric} is {table[row, column]} at step {step}")
        return {k: float(v[-1]) for k, v in metrics.items()}


@functools.partial(jax.jit, static_argnames="plan")
def epoch_order(key: Key[Array, ""], epoch: int, plan: Plan) -> Int[Array, "s b"]:
    """Which examples each step of an epoch draws."""
    order = jax.random.permutation(at_step(key, "order", epoch), plan.examples)
    used = plan.steps_per_epoch * plan.batch_size
    return order[:used].reshape(plan.steps_per_epoch, plan.batch_size)


@contextmanager
def _streamed(
    rows: Rows | None, step: int, plan: Plan, mesh: Mesh, name: str
) -> Iterator[Iterator[dict[str, Array]]]:
    """The whole batches from `step` on as global arrays; none without a stream."""
    if rows is None:
        yield iter(())
        return
    count = jax.process_count()
    if plan.batch_size % count:
        raise UserError(
            f"{name}: batch_size={plan.batch_size} is not divisible by the {count} processes, which"
            " stream a part of it each"
        )

    def whole(batches) -> Iterator[dict[str, Array]]:
        for batch in batches:
            sizes = {k: len(v) for k, v in batch.items()}
            if set(sizes.values()) != {plan.batch_size // count}:
                raise UserError(f"{name}: a streamed batch of {plan.batch_size} has parts {sizes}")
            yield distributed.from_processes(batch, mesh)
        raise UserError(f"{name}: the stream of training images ended before step {plan.steps}")

    with rows(step) as batches:
        yield whole(batches)
