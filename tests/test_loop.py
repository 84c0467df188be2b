"""The training loop: exact resumption, what stops it, what it logs, devices, compilation."""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import (
    KEY,
    PLAN,
    arrays,
    assert_same,
    fit,
    fresh,
    latest,
    rows,
    train_step,
)

from oal_jax import main
from oal_jax.errors import UserError
from oal_jax.stages.train import _check_collapse
from oal_jax.training import log, loop
from oal_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(state, logged rows) of a run that nothing stopped."""
    directory = tmp_path_factory.mktemp("straight")
    state = fit(directory)
    return state, rows(directory)


def log_that(action, at):
    """A MetricsLog that calls `action` once, when step `at` has been logged."""

    class Log(log.MetricsLog):
        done = False

        def write(self, step, metrics):
            super().write(step, metrics)
            if step >= at and not Log.done:
                Log.done = True
                action()

    return Log


def test_rows_are_logged_every_so_often_and_at_the_end_of_an_epoch(straight):
    steps = [row["step"] for row in straight[1]]
    assert steps == [7 * epoch + s for epoch in range(4) for s in (3, 6, 7)]
    assert [row["step"] for row in straight[1] if "val" in row] == [7, 14, 21, 28]
    assert all(row["stage"] == "train" and np.isfinite(row["loss"]) for row in straight[1])


def test_every_epoch_draws_other_examples_each_once(tmp_path):
    fit(tmp_path, plan=PLAN._replace(log_every=1, epochs=3))
    codes = np.array([row["drawn"] for row in rows(tmp_path)], int)[:, None]
    epochs = (codes // 32 ** np.arange(4) % 32).reshape(3, 28)
    assert all(len(np.unique(epoch)) == 28 for epoch in epochs)
    assert len(np.unique(epochs, axis=0)) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [10, 28])
def test_a_signal_stops_and_the_same_command_goes_on_to_the_same_bits(
    tmp_path, straight, capsys, number, code, at
):
    before = signal.getsignal(number)
    send = lambda: signal.raise_signal(number)
    assert main.guard(lambda _: fit(tmp_path, metrics_log=log_that(send, at)), []) == code
    assert signal.getsignal(number) == before
    if number == signal.SIGTERM:  # the state was saved when it arrived
        step = int(re.search(r"tiny: stopped by SIGTERM at step (\d+)", capsys.readouterr().err)[1])
        assert at <= step <= min(at + PLAN.log_every, 28)
        assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert_same(tmp_path, fit(tmp_path), straight)


def test_what_a_killed_process_leaves_is_gone_on_from_to_the_same_bits(tmp_path, straight):
    """The files of a run in mid-epoch, a line of the log and a save among them cut short."""
    run, killed = tmp_path / "run", tmp_path / "killed"

    def copy():
        while not (run / "checkpoints" / "7").exists():  # it is written in the background
            time.sleep(0.01)
        shutil.copytree(run, killed, ignore=shutil.ignore_patterns("*tmp*"))
        half = killed / "checkpoints" / "14.orbax-checkpoint-tmp"
        shutil.copytree(killed / "checkpoints" / "7", half)
        largest = max((half / "default" / "d").iterdir(), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        with (killed / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "train", "st')

    run.mkdir()
    fit(run, metrics_log=log_that(copy, 13))
    assert_same(killed, fit(killed), straight)
    assert latest(killed) == 28 and not list((killed / "checkpoints").glob("*tmp*"))


def test_sigterm_amid_a_log_interval_leaves_no_line_of_its_own(tmp_path, straight):
    # The only call from Python in the middle of an interval is that of the progress bar.
    class Bar(loop.Bar):
        def update(self, n=1):
            super().update(n)
            if self.n == 12:
                signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(loop.Preempted, match="step 12,"):
        patch.setattr(loop, "Bar", Bar)
        fit(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 7, 10]
    assert_same(tmp_path, fit(tmp_path), straight)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_loop
print("ready", flush=True)
while True:
    directory = Path(sys.argv[1])
    test_loop.fit(directory, plan=test_loop.PLAN._replace(epochs=40))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_then_the_same_to_the_bit(tmp_path):
    plan = PLAN._replace(epochs=40)  # one checkpoint after another: most kills hit a save
    rng = random.Random(0)
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / "killed"), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            child.stdout.readline()
            newest = latest(tmp_path / "killed")
            deadline = time.monotonic() + 60
            while latest(tmp_path / "killed") < newest + 14:
                assert time.monotonic() < deadline and child.poll() is None
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.15))
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
    assert 14 <= latest(tmp_path / "killed") < plan.steps
    state = fit(tmp_path / "killed", plan=plan)
    whole = fit(tmp_path / "whole", plan=plan)
    assert_same(tmp_path / "killed", state, (whole, rows(tmp_path / "whole")))
    leftovers = [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert sorted(leftovers, key=int) == ["273", "280"]


def turns_bad_at(bad, what):
    """`train_step`, but something is not finite from step `bad` on (the loss: in that step)."""

    def step(state, batch):
        sound = state.replace(params=jax.tree.map(jnp.nan_to_num, state.params))
        state, metrics = train_step(sound, batch)
        poison = jnp.where(state.step >= bad, jnp.nan, 0.0)
        if what == "loss":
            metrics["loss"] += jnp.where(state.step == bad, jnp.inf, 0)
        elif what == "parameter_norm":
            # The loss is of the parameters before the update: still finite.
            state = state.replace(params=jax.tree.map(lambda p: p + poison, state.params))
            metrics[what] = jnp.linalg.norm(state.params["w"])
        else:
            tree = jax.tree.map(lambda x: x + poison, getattr(state, what))
            state, metrics = state.replace(**{what: tree}), {"loss": jnp.zeros(())}
        return state, metrics

    return step


@pytest.mark.parametrize(
    ("bad", "kept", "what", "steps_per_call"),
    [
        # Step 2 is not a logged one; 14 ends an epoch.
        (2, None, "loss", 1),
        (14, 7, "parameter_norm", 3),
    ],
)
def test_a_metric_that_is_not_finite_stops_with_its_step(tmp_path, bad, kept, what, steps_per_call):
    with pytest.raises(loop.TrainingFailed) as failed:
        fit(tmp_path, step=turns_bad_at(bad, what), steps_per_call=steps_per_call)
    value = "inf" if what == "loss" else "nan"
    assert f"{what} is {value} at step {bad}" in str(failed.value)
    assert latest(tmp_path) == (kept or 0)
    assert all(np.isfinite(row["loss"]) and row["step"] < bad for row in rows(tmp_path))


@pytest.mark.parametrize("what", ["model_state", "opt_state"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, what):
    with pytest.raises(loop.TrainingFailed, match="state .* step 14"):
        fit(tmp_path, step=turns_bad_at(12, what))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = checkpoints.restore(fresh())
    checkpoints.close()
    assert int(state.step) == 7
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))


def test_a_collapse_stops_before_it_is_saved(tmp_path):
    def collapsed(state):
        if int(state.step) == 14:
            raise loop.TrainingFailed("collapsed")
        return {}

    with pytest.raises(loop.TrainingFailed, match="collapsed"):
        fit(tmp_path, evaluate=collapsed)
    assert latest(tmp_path) == 7


def test_the_collapse_check_gives_a_sound_run_time():
    plan = loop.Plan(12_000, 100, 8)  # 960 steps, 320 of them a third
    labels = np.arange(40) % 8
    constant, sound = np.eye(8)[np.zeros(40, int)], np.eye(8)[labels]
    _check_collapse(constant, labels, 320, plan)
    _check_collapse(sound, labels, 960, plan)
    with pytest.raises(
        loop.TrainingFailed, match=r"collapsed, validation accuracy 12.5% at step 321"
    ):
        _check_collapse(constant, labels, 321, plan)
    _check_collapse(constant, labels, 100, loop.Plan(100, 10, 10))
    # Two classes, one of them rare; a set too small to tell.
    rare = (np.arange(40) == 0).astype(int)
    _check_collapse(constant[:, :2], rare, 960, plan)
    _check_collapse(constant[:8], labels[:8], 960, plan)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(UserError, match="batch_size=31 .* 30"):
        fit(plan=PLAN._replace(batch_size=31))


def test_a_call_of_several_steps_is_the_same_training(straight):
    several = fit(steps_per_call=5)  # 3 at most: as far as the next logged step
    chex.assert_trees_all_close(several, straight[0], rtol=1e-5)


class Stream:
    """As `rows` of the loop: the batches that it draws in memory; counts what it is asked for."""

    def __init__(self, end=None, change=lambda batch: batch):
        self.opened, self.closed, self.given = [], 0, 0
        self.end, self.change = end, change

    @contextlib.contextmanager
    def __call__(self, step):
        self.opened.append(step)
        try:
            epochs = [
                np.asarray(loop.epoch_order(KEY, epoch, PLAN)) for epoch in range(PLAN.epochs)
            ]
            yield self.batches(step, np.concatenate(epochs))
        finally:
            self.closed += 1

    def batches(self, step, order):
        for index in order[step : self.end]:
            self.given += 1
            yield self.change({"index": index} | {k: v[index] for k, v in arrays().items()})


def streamed_batch(arrays, indices, epoch, step):
    del epoch, step
    rows = arrays["rows"]
    # What lies on the devices is there beside the rows.
    return {"x": rows["x"] + arrays["offset"], "y": rows["y"], "index": indices}


def fit_streamed(directory, stream, **more):
    held = {"offset": np.float32(0)}
    return fit(directory, held=held, draw=streamed_batch, rows=stream, **more)


def test_streamed_batches_train_as_those_in_memory(tmp_path, straight):
    stream = Stream()
    state = fit_streamed(tmp_path, stream, steps_per_call=5)
    assert (stream.opened, stream.closed, stream.given) == ([0], 1, PLAN.steps)
    chex.assert_trees_all_close(jax.device_get(state), jax.device_get(straight[0]), rtol=1e-5)
    assert [r["drawn"] for r in rows(tmp_path)] == [r["drawn"] for r in straight[1]]


def test_a_stream_goes_on_at_exactly_the_next_batch(tmp_path):
    whole, stream = fit_streamed(tmp_path / "whole", Stream()), Stream()
    terminate = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(loop.Preempted) as stopped:
        fit_streamed(tmp_path / "run", stream, metrics_log=log_that(terminate, 10))
    step = int(str(stopped.value).split("step ")[1].split(",")[0])
    assert (stream.given, stream.closed) == (step, 1)  # none was taken and not trained on
    state = fit_streamed(tmp_path / "run", stream)
    assert_same(tmp_path / "run", state, (whole, rows(tmp_path / "whole")))
    assert stream.opened == [0, step] and stream.given == PLAN.steps


def test_a_stream_that_ends_early_or_has_other_sizes_is_told(tmp_path):
    with pytest.raises(UserError, match="ended before step 28"):
        fit_streamed(tmp_path / "short", Stream(end=9))
    cut = lambda batch: {name: value[:3] for name, value in batch.items()}
    with pytest.raises(UserError, match="batch of 4 .*'index': 3"):
        fit_streamed(tmp_path / "small", Stream(change=cut))


def test_the_host_reads_the_next_batch_while_the_device_works(tmp_path, monkeypatch):
    compiled, dispatched, under_way = loop.compile_step, [], []

    def compile_step(*arguments, **options):
        call = compiled(*arguments, **options)

        def noted(*inputs):
            state, metrics = call(*inputs)
            dispatched.append(metrics["loss"])
            return state, metrics

        return noted

    def note(batch):
        under_way.append(bool(dispatched) and not dispatched[-1].is_ready())
        return batch

    def slow(state, batch):  # some tenths of a second
        x = jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), jnp.ones((600, 600)))
        state, metrics = train_step(state, batch)
        return state, metrics | {"loss": metrics["loss"] + 0 * x[0, 0]}

    monkeypatch.setattr(loop, "compile_step", compile_step)
    plan = PLAN._replace(epochs=1)
    fit_streamed(tmp_path, Stream(change=note), step=slow, plan=plan)
    assert len(under_way) == plan.steps and not under_way[0]
    # All others, but where another program took the processor between two lines of Python.
    assert sum(under_way) >= plan.steps - 2


@pytest.mark.parametrize(("per_call", "lengths"), [(1, 1), (3, 2)])
def test_the_step_is_compiled_once_a_length_of_call(per_call, lengths):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(train_step, n=lengths)  # 7 steps: 3 + 3 + 1
    fit(step=counted, steps_per_call=per_call)
    chex.clear_trace_counter()


def test_a_hidden_transfer_raises(monkeypatch):
    monkeypatch.setattr(loop.distributed, "replicate", lambda tree, mesh: tree)  # left on the host
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        fit()


def test_other_stages_keep_their_lines(tmp_path):
    first = log.MetricsLog(tmp_path, "teacher")
    first.write(5, {"loss": 1.0})
    first.close()
    fit(tmp_path, plan=PLAN._replace(epochs=1))
    again = log.MetricsLog(tmp_path, "train", 3)
    again.write(6, {"loss": 2.0})
    again.close()
    kept = [(row["stage"], row["step"]) for row in rows(tmp_path)]
    assert kept == [("teacher", 5), ("train", 3), ("train", 6)]
    assert log.read(tmp_path / "metrics.jsonl", "teacher") == rows(tmp_path)[:1]
    assert log.read(tmp_path / "nothing.jsonl", "teacher") == []


def test_lines_cut_short_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"stage": "train", "step": 1, "loss": 1.0}\n'
    path.write_text(good + "\0\0\0\n" + '"text"\n' + '{"stage": "train", "st')
    assert [row["step"] for row in log.read(path, "train")] == [1]
    writer = log.MetricsLog(tmp_path, "train", 1)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = log.MetricsLog(tmp_path, "train", 10)
    writer.write(11, {"loss": 1.5, "accuracy": 0.25})
    writer.sync()
    [path] = (tmp_path / "tensorboard" / "train").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    writer.close()
    version, start, logged = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (11, 1)
    assert logged.step == 11
    assert {v.tag: v.simple_value for v in logged.summary.value} == {"loss": 1.5, "accuracy": 0.25}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KB, where the tests may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_disk_that_fills_up_during_a_save_ends_with_one_line(small_disk, monkeypatch, capsys):
    real = Checkpoints.save

    def save(self, state):
        if int(state.step) == 14:
            self._manager.wait_until_finished()  # with the save before, which has room yet
            free = os.statvfs(small_disk)
            room = max(0, free.f_bavail * free.f_frsize - 8192)
            (small_disk / "filler").write_bytes(bytes(room))
        real(self, state)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert main.guard(lambda _: fit(small_disk), []) == 2
    err = capsys.readouterr().err
    told = [line for line in re.split(r"[\r\n]", err) if line and "tiny:" not in line]
    assert len(told) == 1 and told[0].startswith("oal_jax: the disk is full")
    assert latest(small_disk) == 7
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    assert int(fit(small_disk).step) == 28


def test_a_full_disk_is_known_whatever_wraps_its_number(capsys):
    def storage(_):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [ENOSPC]")

    def chained(_):
        try:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        except OSError as error:
            raise RuntimeError("failed") from error

    for command in (storage, chained):
        assert main.guard(command, []) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="other"):
        main.guard(lambda _: (_ for _ in ()).throw(ValueError("other")), [])


def test_an_event_file_on_a_full_disk_does_not_hang(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    writer = log.MetricsLog(tmp_path, "train")
    with open("/dev/full", "wb") as full:
        writer._board._py_recordio_writer._writer, kept = (
            full,
            writer._board._py_recordio_writer._writer,
        )
        with pytest.raises(OSError, match="No space"):
            for step in range(100):
                writer.write(step, {"loss": 1.0})
                writer.sync()
        full.raw.close()
    kept.close()
    writer._file.close()
