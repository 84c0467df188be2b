"""The one training loop: student, teacher and generator all pass through it."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key
from tqdm import tqdm

from oal_jax.errors import Preempted, TrainingFailed, UserError
from oal_jax.runtime import distributed, processes
from oal_jax.runtime.keys import at_step
from oal_jax.training.checkpoints import Checkpoints
from oal_jax.training.log import MetricsLog
from oal_jax.training.state import compiler_options

Arrays = Mapping[str, Any]
MakeBatch = Callable[[Arrays, Int[Array, " b"], Int[Array, ""], Int[Array, ""]], dict[str, Array]]
Rows = Callable[[int], AbstractContextManager[Iterator[Mapping[str, np.ndarray]]]]


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
    train_step: Callable,
    make_batch: MakeBatch,
    plan: Plan,
    mesh: Mesh,
    steps_per_call: int = 1,
    *,
    shardings: Any = None,
    streamed: bool = False,
) -> Callable[[Any, Arrays, Any], tuple[Any, dict[str, Array]]]:
    """`(state, arrays, order) -> (state, metrics)`: draw the batch, take the step; state donated.

    Metrics have a leading axis: one entry a step. With `steps_per_call` > 1 that many steps run in
    one `lax.scan`: for accelerators. On CPU the gradient of a convolution inside a scan is about a
    hundred times slower than outside, so there a call is one step.

    `shardings` are those that the state keeps; None: a copy on every device. In place of `order`,
    (s, b) int32, a `streamed` step takes the batch's own rows, a dict with their "index".
    """

    def one(state, arrays, source):
        epoch, row = state.step // plan.steps_per_epoch, state.step % plan.steps_per_epoch
        if streamed:
            arrays, indices = dict(arrays) | {"rows": source}, source["index"]
        else:
            indices = source[row]
        batch = make_batch(arrays, indices, epoch, state.step)
        return train_step(state, distributed.shard_batch(batch, mesh))

    def call(state, arrays, order):
        if steps_per_call == 1:
            state, metrics = one(state, arrays, order)
            return state, jax.tree.map(lambda m: m[None], metrics)
        return jax.lax.scan(lambda s, _: one(s, arrays, order), state, length=steps_per_call)

    copies = distributed.replicated(mesh)
    kept = copies if shardings is None else shardings
    options = compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(call, donate_argnums=0, out_shardings=(kept, copies), compiler_options=options)


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
    """Train from `state.step` to the end of the plan and return the last state.

    `state` is any pytree with an int32 scalar `step` (it is donated); `arrays` stay on the
    devices; `make_batch(arrays, indices, epoch, step)` runs inside jit. Epochs are permuted by
    `fold_in(key, epoch)`, so the step number alone says where to resume. `evaluate(state)` runs
    after every epoch, and its values are logged with those of the epoch's last step.

    Images that do not fit on the devices are streamed: `rows(step)` is a context manager that
    opens an iterator over this process's part of the batches of `step`, `step + 1`, ...: each a
    dict {"index": int32 (b,), "image": uint8 (b, H, W, c), "label": int32 (b,)} with b =
    batch_size / number of processes. `make_batch` then gets the whole batch, split over the
    devices, as `arrays["rows"]`, and its "index" as `indices`; a call is one step. The host reads
    the next batch while the devices work on this one.

    Of several processes all call this alike; the state and `arrays` are equal on all of them.

    What a checkpoint's step and those before it log is on disk before the checkpoint is, so a
    resumed run leaves the same lines as one that was never stopped.

    Raises:
      TrainingFailed: a metric or the state is not finite; what was saved before stays.
      Preempted: SIGTERM arrived, on any process; the state was saved first. Several processes
        agree on the step at the logged ones, so they stop up to two of `plan.log_every` later.
      UserError: an epoch has not even one batch; streamed batches end early or have other sizes.
    """
    if not plan.steps_per_epoch:
        raise UserError(
            f"{name}: batch_size={plan.batch_size} is more than the {plan.examples} training images"
        )
    per_call = steps_per_call or (1 if jax.default_backend() == "cpu" else plan.log_every)
    per_call = 1 if rows else per_call
    compiled: dict[int, Callable] = {}
    shardings = distributed.shardings(state, mesh)
    state = distributed.place(state, shardings)
    arrays = distributed.replicate(dict(arrays), mesh)
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

    def compile(count: int) -> Callable:
        options = {"shardings": shardings, "streamed": rows is not None}
        return compile_step(train_step, make_batch, plan, mesh, count, **options)

    with (
        _sigterm() as asked,
        _streamed(rows, step, plan, mesh, name) as following,
        tqdm(total=plan.steps, initial=step, desc=name, unit="step", mininterval=1.0) as bar,
    ):
        stop = _Stop(asked, mesh)
        while step < plan.steps:
            epoch = step // plan.steps_per_epoch
            start, end = epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch
            if rows is None:
                source = distributed.replicate(epoch_order(key, epoch, plan), mesh)
            calls: list = []  # since the last logged step: (step after the call, metrics)
            due: list = []  # those up to the last logged step
            while step < end and not stop():
                # Up to the next logged step. Counted from the start of the epoch, so that there are
                # at most two lengths of a call to compile: the usual one and an epoch's last.
                count = min(per_call, end - step, plan.log_every - (step - start) % plan.log_every)
                if count not in compiled:
                    compiled[count] = compile(count)
                if rows is not None:
                    if len(calls) > 1:
                        jax.block_until_ready(calls[-2][1])  # two batches wait on the devices
                    source = next(following)
                with jax.transfer_guard("disallow"):
                    state, metrics = compiled[count](state, arrays, source)
                step += count
                bar.update(count)
                calls.append((step, metrics))
                if step == end or (step - start) % plan.log_every == 0:
                    # What was logged before is read now, after this call was dispatched.
                    if due:
                        write(due)
                    due, calls = calls, []
                    stop.vote()
            if step == plan.steps:
                stop.settle()
            ended, stopping = step == end, stop()
            # Nothing that is not finite may reach a checkpoint.
            for unread in (due, calls):
                if unread:
                    read(unread)
            if not distributed.is_finite(state):
                fail(f"the state is not finite after step {step}")
            if due:
                write(due, evaluate(state) if evaluate and ended else None)
            at_epoch = ended and (epoch + 1) % plan.checkpoint_every == 0
            if checkpoints and step != saved and (at_epoch or stopping or step == plan.steps):
                if log:
                    log.sync()
                with _interrupted_later():
                    checkpoints.save(state)
                saved = step
            if stopping or (stop() and step == plan.steps):
                kept = "which was saved" if checkpoints else "without a checkpoint"
                raise Preempted(f"{name}: stopped by SIGTERM at step {step}, {kept}")
    return state


@partial(jax.jit, static_argnames="plan")
def epoch_order(key: Key[Array, ""], epoch: int, plan: Plan) -> Int[Array, "s b"]:
    """Which examples each step of an epoch draws."""
    order = jax.random.permutation(at_step(key, "order", epoch), plan.examples)
    used = plan.steps_per_epoch * plan.batch_size
    return order[:used].reshape(plan.steps_per_epoch, plan.batch_size)


@contextmanager
def _streamed(
    rows: Rows | None, step: int, plan: Plan, mesh: Mesh, name: str
) -> Iterator[Iterator[dict[str, Array]]]:
    """The whole batches of `step` and on, as global arrays; nothing where there is no stream."""
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


class _Stop:
    """Whether to stop: one process as soon as it is asked, several when all know of it.

    Several vote at the same steps, and read at each what they had voted at the one before: that has
    been counted meanwhile, so no device and no process waits for it.
    """

    def __init__(self, asked: Callable[[], bool], mesh: Mesh):
        self._asked, self._mesh = asked, mesh
        self._cast: Array | None = None
        self._agreed = False

    def __call__(self) -> bool:
        return self._agreed if processes.several() else self._asked()

    def vote(self) -> None:
        if processes.several():
            self._agreed = self._agreed or (self._cast is not None and bool(self._cast))
            self._cast = distributed.any_process(self._asked(), self._mesh)

    def settle(self) -> None:
        """Count what was asked up to now; for the end, when nothing else is under way."""
        self.vote()
        self.vote()


@contextmanager
def _flagged(number: int) -> Iterator[list[int]]:
    """While inside, a signal only leaves its number in the list; off the main thread it acts."""
    seen: list[int] = []
    try:
        before = signal.signal(number, lambda number, _: seen.append(number))
    except ValueError:  # not the main thread
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(number, before)


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """While inside, Ctrl-C waits: Orbax, cut off in a save, may swallow it and training goes on."""
    with _flagged(signal.SIGINT) as seen:
        yield
    if seen:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """While inside, SIGTERM only raises a flag."""
    with _flagged(signal.SIGTERM) as seen:
        yield lambda: bool(seen)
    if seen and processes.several():  # after the last vote: nobody knows of it yet
        signal.raise_signal(signal.SIGTERM)
