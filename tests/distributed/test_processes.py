"""Several processes: how they join, stop, go on and stream, each a real one with two devices.

Run as a program, this file is one of them: `test_processes.py ACTION DIRECTORY COUNT INDEX PORT`.
"""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

CONFIG = str(Path(__file__).parents[2] / "configs" / "fashion.py")
EPOCHS, EVERY = 60, 10  # of the toy training: 7 steps each
HEARTBEAT = 10


def toy_plan(epochs=EPOCHS):
    import toy_training

    return toy_training.PLAN._replace(epochs=epochs, checkpoint_every=EVERY)


@contextlib.contextmanager
def toy_stream(step):
    """This process's rows of the batches that the toy training draws in memory, in their order."""
    import jax
    import toy_training

    from oal_jax.training import loop

    plan, arrays = toy_plan(), toy_training.arrays()
    part = plan.batch_size // jax.process_count()
    mine = slice(jax.process_index() * part, (jax.process_index() + 1) * part)

    def batches(step):
        while True:
            order = loop.epoch_order(toy_training.KEY, step // plan.steps_per_epoch, plan)
            index = np.asarray(order)[step % plan.steps_per_epoch, mine]
            yield {"index": index, "x": arrays["x"][index], "y": arrays["y"][index]}
            step += 1

    yield batches(step)


def streamed_batch(arrays, indices, epoch, step):
    del epoch, step
    rows = arrays["rows"]
    return {"x": rows["x"], "y": rows["y"], "index": indices}


def toy(directory: Path, epochs=EPOCHS, streamed=False, train_step=None):
    """Train the regression of `toy_training` on all devices of all processes; its last state."""
    import toy_training

    from oal_jax.runtime import distributed
    from oal_jax.training import session

    return session.train(
        train_step or toy_training.train_step,
        toy_training.fresh(),
        {} if streamed else toy_training.arrays(),
        streamed_batch if streamed else toy_training.make_batch,
        toy_plan(epochs),
        workdir=directory,
        directory=directory / "checkpoints",
        name="train",
        evaluate=toy_training.evaluate,
        key=toy_training.KEY,
        mesh=distributed.make_mesh(),
        rows=toy_stream if streamed else None,
    )


def act(action: str, directory: Path, count: int, index: int, port: int) -> None:
    """What a process of these tests does."""
    from oal_jax.errors import UserError
    from oal_jax.runtime import artifacts, distributed, processes

    distributed.initialize(f"127.0.0.1:{port}", count, index, heartbeat_timeout=HEARTBEAT)
    import jax

    assert (jax.process_count(), jax.process_index()) == (count, index)
    if action == "collectives":
        collectives(directory)
        return
    if action == "mistake":
        if index == 1:
            raise UserError("only here")
        processes.on_main(lambda: time.sleep(3600))
    if action == "bug":
        if index == 0:
            raise ValueError("of process 0")
        processes.wait_for_all()
    directory.mkdir(exist_ok=True)
    state = toy(directory, streamed=action == "stream")
    tensors = {k: np.asarray(v) for k, v in state.params.items()}
    artifacts.write_tensors(directory / "params.safetensors", tensors)


def collectives(directory: Path) -> None:
    """Everything that one process leaves to another, or to all."""
    import jax

    from oal_jax.runtime import artifacts, distributed, preemption, processes

    mesh, index = distributed.make_mesh(), jax.process_index()
    assert dict(mesh.shape) == {"data": 4, "model": 1}
    assert all(len({d.process_index for d in row}) == 1 for row in distributed.make_mesh(2).devices)
    assert processes.on_main(lambda: {"from": jax.process_index()}) == {"from": 0}
    # A read after a write finds the file on every process.
    artifacts.write_json(directory / "one.json", {"written": index})
    assert artifacts.read_json(directory / "one.json") == {"written": 0}
    processes.on_main(lambda: artifacts.write_json(directory / "two.json", 2))
    assert artifacts.read_json(directory / "two.json") == 2
    processes.wait_for_all()
    # Arrays: equal on all hosts; of rows of each; made in place.
    table = np.arange(24.0).reshape(8, 3)
    placed = distributed.place(table, distributed.over_data(mesh))
    assert placed.dtype == np.float32 and not placed.is_fully_addressable
    np.testing.assert_array_equal(distributed.to_host(placed), table)
    mine = np.full((2, 3), index, np.float32)
    rows = distributed.from_processes({"x": mine}, mesh)["x"]
    np.testing.assert_array_equal(distributed.to_host(rows)[:, 0], [0, 0, 1, 1])
    again = distributed.place(placed, distributed.replicated(mesh))
    np.testing.assert_array_equal(np.asarray(again), table)
    assert bool(preemption.any_process(index == 1, mesh))
    assert not bool(preemption.any_process(False, mesh))
    assert distributed.all_processes(True) and not distributed.all_processes(index == 0)
    table[7, 1] = np.nan  # on the second process alone
    assert distributed.is_finite(distributed.place(table, placed.sharding)) == (index == 0)


# The tests.


def environment(devices=2):
    helpers = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return {**os.environ, **settings, "PYTHONPATH": helpers}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Group:
    """Processes of one run, each writing to OUT.N and ERR.N of a directory."""

    def __init__(self, scratch: Path, commands, env=None):
        self.scratch, self.children = scratch, []
        scratch.mkdir(exist_ok=True)
        for i, command in enumerate(commands):
            with (scratch / f"out.{i}").open("w") as out, (scratch / f"err.{i}").open("w") as err:
                self.children.append(
                    subprocess.Popen(command, env=env or environment(), stdout=out, stderr=err)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.kill()
            child.wait()

    def wait(self, seconds=240) -> list[int]:
        """Exit codes; all must end in time."""
        deadline = time.monotonic() + seconds
        codes = [c.wait(max(0.1, deadline - time.monotonic())) for c in self.children]
        return [code if code >= 0 else 128 - code for code in codes]

    def err(self, i: int) -> str:
        return (self.scratch / f"err.{i}").read_text()

    def lines(self, i: int) -> list[str]:
        """The program's own lines on stderr."""
        lines = self.err(i).replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith("oal_jax:")]


def toys(scratch: Path, action: str, directory: Path, count=2, devices=2) -> Group:
    port = free_port()
    arguments = [[action, str(directory), str(count), str(i), str(port)] for i in range(count)]
    commands = [[sys.executable, __file__, *more] for more in arguments]
    return Group(scratch, commands, environment(devices))


def logged(directory: Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(group: Group, directory: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in logged(directory)):
        assert time.monotonic() < deadline, [group.err(i) for i in range(len(group.children))]
        assert all(c.poll() is None for c in group.children), [group.err(0), group.err(1)]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a toy training on this process's four devices; it has every epoch."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    directory.mkdir()
    state = toy(directory)
    return directory, {k: np.asarray(v) for k, v in state.params.items()}


def assert_same_training(directory: Path, whole) -> None:
    """The same lines (draws to the bit, floats to tolerance) and the same parameters."""
    from safetensors.numpy import load_file

    rows, expected = logged(directory), logged(whole[0])
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["drawn"] for row in rows] == [row["drawn"] for row in expected]
    for name in ("loss", "val"):
        values = [[r[name] for r in table if name in r] for table in (rows, expected)]
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)
    params = load_file(directory / "params.safetensors")
    for name, value in whole[1].items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-6)


def refused(*flags) -> list[str]:
    command = [sys.executable, "-m", "oal_jax.main", "--config", CONFIG, *flags]
    child = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert child.returncode == 2, child.stderr
    return child.stderr.splitlines()


def test_who_does_not_join_in_time_is_told_in_one_line(tmp_path):
    port, common = free_port(), ["--num-processes=2", "--join-timeout=2"]
    where = [f"--coordinator=127.0.0.1:{port}", f"--workdir={tmp_path / 'run'}", *common]
    [line] = refused(*where, "--process-id=1")
    assert f"no coordinator at 127.0.0.1:{port} (Connection refused)" in line
    assert "gave up after 2 s (--join-timeout)" in line
    [line] = refused(*where, "--process-id=0")
    assert f"the 2 processes of this run did not all join at 127.0.0.1:{port}" in line
    assert not (tmp_path / "run").exists()


def test_without_a_cluster_there_is_nothing_to_detect():
    [line] = refused("--distributed")
    assert "--distributed finds no cluster here" in line and "give --coordinator" in line


def test_what_one_process_does_for_all(tmp_path):
    with toys(tmp_path / "logs", "collectives", tmp_path) as group:
        assert group.wait() == [0, 0], [group.err(0), group.err(1)]


@pytest.mark.parametrize(
    ("action", "code"), [("mistake", 2), pytest.param("bug", 1, marks=pytest.mark.slow)]
)
def test_an_error_on_one_process_ends_all_with_its_code(tmp_path, action, code):
    start = time.monotonic()
    with toys(tmp_path / "logs", action, tmp_path / "run") as group:
        assert group.wait(120) == [code, code]
        assert time.monotonic() - start < 90
        failed = 1 if action == "mistake" else 0
        message = "only here" if action == "mistake" else "ValueError: of process 0"
        assert group.lines(failed) == [f"oal_jax: {message}"]
        assert group.lines(1 - failed) == [f"oal_jax: process {failed}: {message}"]
        assert ("Traceback" in group.err(failed)) == (action == "bug")


def test_sigterm_on_one_process_saves_on_all_and_fewer_devices_go_on(tmp_path, whole):
    run = tmp_path / "run"
    with toys(tmp_path / "first", "train", run) as group:
        wait_for_step(group, run, 20)
        group.children[1].send_signal(signal.SIGTERM)
        assert group.wait() == [143, 143], [group.err(0), group.err(1)]
        lines = [group.lines(0), group.lines(1)]
        assert lines[0] == lines[1] and len(lines[0]) == 1, lines
    step = int(lines[0][0].split("stopped by SIGTERM at step ")[1].split(",")[0])
    assert step == logged(run)[-1]["step"] and (run / "checkpoints" / str(step)).is_dir()
    # From two processes to one with a single device.
    with toys(tmp_path / "second", "train", run, count=1, devices=1) as group:
        assert group.wait() == [0], group.err(0)
    assert_same_training(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_who_loses_another_process_stops_in_time_and_all_go_on(tmp_path, whole, killed):
    run = tmp_path / "run"
    with toys(tmp_path / "first", "train", run) as group:
        wait_for_step(group, run, 7 * EVERY + 3)  # past the first checkpoint
        group.children[killed].kill()
        start = time.monotonic()
        codes = group.wait(6 * HEARTBEAT)
        assert codes[killed] == 137 and codes[1 - killed] == 1, group.err(1 - killed)
        assert time.monotonic() - start < 4 * HEARTBEAT
        assert group.lines(1 - killed)
    with toys(tmp_path / "second", "train", run) as group:
        assert group.wait() == [0, 0], [group.err(0), group.err(1)]
    assert_same_training(run, whole)


@pytest.mark.slow
def test_two_processes_go_on_where_one_with_four_devices_stopped(tmp_path, whole):
    run = tmp_path / "run"
    run.mkdir()
    toy(run, epochs=2 * EVERY)
    with toys(tmp_path / "logs", "train", run) as group:
        assert group.wait() == [0, 0], [group.err(0), group.err(1)]
    assert_same_training(run, whole)


@pytest.mark.slow
def test_streams_of_two_processes_are_the_batches_of_one(tmp_path, whole):
    run = tmp_path / "run"
    with toys(tmp_path / "first", "stream", run) as group:
        wait_for_step(group, run, 20)
        group.children[0].send_signal(signal.SIGTERM)
        assert group.wait() == [143, 143], [group.err(0), group.err(1)]
    with toys(tmp_path / "second", "stream", run) as group:
        assert group.wait() == [0, 0], [group.err(0), group.err(1)]
    assert_same_training(run, whole)


def commands(workdir: Path, count: int, *flags: str, of=None) -> list[list[str]]:
    """The command of each process; `of` has more flags for some of them."""
    port = free_port()
    common = [sys.executable, "-m", "oal_jax.main", "--config", CONFIG, f"--workdir={workdir}"]
    joined = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"] if count > 1 else []
    each = [[*joined, f"--process-id={i}"] if count > 1 else [] for i in range(count)]
    return [[*common, *flags, *more, *(of or {}).get(i, [])] for i, more in enumerate(each)]


# Small rates: at the usual ones rounding alone parts two trainings within a few steps.
RATES = [
    f"--config.{key}=1e-3"
    for key in (
        "train.learning_rate",
        "method.kd.projector_rate",
        "method.oal.latent_projector_rate",
        "method.oal.energy_rate",
    )
]
SMOKE = ["--config.smoke", *RATES]


def table(workdir: Path) -> dict[tuple[str, str], list[float]]:
    with (workdir / "report" / "ood.csv").open() as file:
        return {
            (row["score"], row["dataset"]): [float(v) for v in list(row.values())[3:]]
            for row in csv.DictReader(file)
        }


@pytest.mark.slow
def test_two_processes_run_the_whole_pipeline_as_one_does(tmp_path):
    from safetensors.numpy import load_file

    one, two = tmp_path / "one", tmp_path / "two"
    env = environment() | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    with Group(
        tmp_path / "logs1", commands(one, 1, *SMOKE), env | {"JAX_NUM_CPU_DEVICES": "4"}
    ) as group:
        assert group.wait(900) == [0], group.err(0)
    with Group(tmp_path / "logs2", commands(two, 2, *SMOKE), env) as group:
        assert group.wait(900) == [0, 0], [group.err(0), group.err(1)]
    # What comes before the training has no sum over a batch: the same to the last digits.
    prepared = [
        path.relative_to(one)
        for stage in ("features", "outliers", "latents")
        for path in (one / stage).glob("*.safetensors")
    ]
    assert prepared
    for name in prepared:
        pair = [load_file(directory / name) for directory in (one, two)]
        assert pair[0].keys() == pair[1].keys()
        for key, value in pair[0].items():
            np.testing.assert_allclose(pair[1][key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    tables = [table(one), table(two)]
    assert tables[0].keys() == tables[1].keys()
    for key, values in tables[0].items():
        np.testing.assert_allclose(tables[1][key], values, atol=1.0, err_msg=str(key))
    means = [np.mean(list(t.values()), axis=0) for t in tables]
    np.testing.assert_allclose(*means, atol=0.2)
    # One set of files and one log, by process 0.
    files = [sorted(p.relative_to(d) for p in d.glob("*/*.*")) for d in (one, two)]
    without_events = [[p for p in found if p.parts[0] != "tensorboard"] for found in files]
    assert without_events[0] == without_events[1]
    assert [r["step"] for r in logged(two)] == [r["step"] for r in logged(one)]
    assert len(list((two / "tensorboard" / "train").iterdir())) == 1
    # A second start of both does nothing.
    with Group(tmp_path / "logs3", commands(two, 2, *SMOKE), env) as group:
        assert group.wait(200) == [0, 0], [group.err(0), group.err(1)]
        out = (group.scratch / "out.0").read_text()
        assert out.count("done already, skipped") == len(list(two.glob("*/manifest.json")))
        assert "skipped" not in (group.scratch / "out.1").read_text()


def write_inputs(root: Path) -> list[str]:
    """Image sets on disk, a teacher's weights and a Stable Diffusion; the flags to train on them.

    The images are streamed, and the teacher runs in every step.
    """
    from PIL import Image
    from small_stable_diffusion import write_small
    from teacher_files import vit_file

    rng, sizes = np.random.default_rng(0), {"train": 20, "validation": 6, "test": 6}
    sets = {f"mine/{s}/{c}": n for s, n in sizes.items() for c in ("cat", "pickup_truck")}
    for name, count in (sets | {"near/test": 9, "far/test": 9}).items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            levels = rng.integers(0, 128, (16, 16, 3)) + 128 * name.endswith("cat")
            Image.fromarray(levels.astype(np.uint8)).save(root / name / f"{i}.png")
    teacher = vit_file(root / "teacher.safetensors", classes=2, width=32)
    values = {
        "data": {"source": "folder", "root": root, "id_set": "mine", "near": "near", "far": "far"},
        "teacher": {"weights": teacher, "views": 0},
        "generator": {"directory": write_small(root / "generator")},
        "method": {"name": "oal"},
        "outliers": {"source": "diffusion"},
        "outliers.knn": {
            "features_per_class": 16,
            "neighbour": 8,
            "boundary_points": 4,
            "anchors": 4,
        },
        "latents": {"per_class": 4, "steps": 2, "chunk": 32},
        "student": {"architecture": "wide_resnet", "depth": 10, "width": 1},
        "train": {"epochs": 1, "batch_size": 8, "log_every": 1},
        "evaluation": {"batch_size": 8, "scores": "energy,mahalanobis"},
    }
    values["data"] |= {"image_size": 16, "stream": True}
    values["outliers.knn"] |= {"noise_rows": 16, "repeats": 1}
    flags = [f"--config.{part}.{k}={v}" for part, keys in values.items() for k, v in keys.items()]
    return [*flags, *RATES]


@pytest.mark.slow
def test_two_processes_stream_and_use_given_networks_as_one_does(tmp_path):
    from safetensors.numpy import load_file

    one, two, flags = tmp_path / "one", tmp_path / "two", write_inputs(tmp_path / "given")
    env = environment() | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    with Group(
        tmp_path / "logs1", commands(one, 1, *flags), env | {"JAX_NUM_CPU_DEVICES": "4"}
    ) as group:
        assert group.wait(600) == [0], group.err(0)
    with Group(tmp_path / "logs2", commands(two, 2, *flags), env) as group:
        assert group.wait(600) == [0, 0], [group.err(0), group.err(1)]
    read = lambda name: [load_file(d / f"{name}.safetensors") for d in (one, two)]
    for name, atol in (
        ("teacher/teacher", 0),
        ("features/features", 0),
        ("outliers/outliers", 0),  # the classes are shared out, a class a device
        ("latents/latents", 1e-5),
        ("train/student", 1e-4),
    ):
        a, b = read(name)
        assert a.keys() == b.keys() and a
        for key, value in a.items():
            np.testing.assert_allclose(b[key], value, rtol=atol, atol=atol, err_msg=key)
    drawn = [[row["step"] for row in logged(d)] for d in (one, two)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5
    losses = [[row["loss"] for row in logged(d)] for d in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    tables = [table(one), table(two)]
    assert tables[0].keys() == tables[1].keys() and len(tables[0]) == 2 * 4
    for key, values in tables[0].items():
        np.testing.assert_allclose(tables[1][key], values, atol=1e-3, err_msg=str(key))


@pytest.mark.slow
def test_processes_of_different_configs_are_refused(tmp_path):
    flags = ["--config.smoke", "--config.method.name=ce"]
    of = {1: ["--config.seed=1"]}
    with Group(tmp_path / "logs", commands(tmp_path / "run", 2, *flags, of=of)) as group:
        assert group.wait(120) == [2, 2], [group.err(0), group.err(1)]
        [line] = group.lines(1)
        assert "config seed is 1 in process 1 and 0 in process 0; give all" in line
        assert group.lines(0) == [line.replace("oal_jax:", "oal_jax: process 1:")]


if __name__ == "__main__":
    from oal_jax import main

    name, directory, *numbers = sys.argv[1:]
    sys.exit(main.guard(lambda _: act(name, Path(directory), *map(int, numbers)), []))
