"""Streamed image sets: the same batches as of sets in memory, workers, damage, bounded memory."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tfds_sets import a_class, an_image, png, write

from oal_jax.data import manifest, sources, stream
from oal_jax.data.stored import SetSpec
from oal_jax.errors import UserError
from oal_jax.runtime import distributed
from oal_jax.training import loop

KEY = jax.random.key(3)
PLAN = loop.Plan(examples=22, batch_size=4, epochs=4, log_every=2)  # 5 steps an epoch
SIDE = 10


def pixels(count: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def in_folder(root: Path, count: int) -> dict:
    for i, image in enumerate(pixels(count, width=SIDE + 3)):
        path = root / f"mine/train/{('cat', 'dog')[i % 2]}/{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return {"source": "folder", "name": "mine", "image_size": SIDE}


def in_list(root: Path, count: int) -> dict:
    lines = []
    for i, image in enumerate(pixels(count, height=SIDE + 5)):
        path = root / f"images_classic/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        lines.append(f"{i}.png {i % 10}")
    listed = root / "benchmark_imglist/cifar10/train_cifar10.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("\n".join(lines))
    return {"source": "imglist", "name": "cifar10", "image_size": SIDE}


def in_records(root: Path, count: int) -> dict:
    examples = [{"image": png(image), "label": i % 3} for i, image in enumerate(pixels(count))]
    features = {"image": an_image((SIDE, SIDE, 3)), "label": a_class(3)}
    write(root, "pets", {"train": examples}, features, shards=2)
    return {"source": "tfds", "name": "pets"}


KINDS = {"folder": in_folder, "imglist": in_list, "tfds": in_records}


@pytest.fixture(params=KINDS)
def any_set(request, tmp_path):
    return KINDS[request.param](tmp_path, PLAN.examples) | {"root": str(tmp_path)}


@pytest.fixture
def mine(tmp_path):
    return in_folder(tmp_path, PLAN.examples) | {"root": str(tmp_path)}


def opened(any_set: dict, workers: int = 0, **more) -> stream.Streamed:
    return stream.open_stream(
        sources.open_source(SetSpec(split="train", **any_set, **more)), workers
    )


def order(epoch: int) -> np.ndarray:
    """What the loop draws of a set in memory."""
    return jax.device_get(loop.epoch_order(KEY, epoch, PLAN))


def rows(data: stream.Streamed, step: int = 0, **processes) -> list[dict]:
    open_rows = stream.rows(data, order, PLAN.steps_per_epoch, PLAN.steps, **processes)
    with open_rows(step) as batches:
        return list(batches)


def same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys() == {"index", "image", "label"}
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_those_of_a_set_in_memory(any_set):
    held, streamed = sources.load(split="train", **any_set), rows(opened(any_set))
    assert len(streamed) == PLAN.steps
    for step, row in enumerate(streamed):
        expected = order(step // PLAN.steps_per_epoch)[step % PLAN.steps_per_epoch]
        np.testing.assert_array_equal(row["index"], expected)
        np.testing.assert_array_equal(row["image"], held.images[expected])
        np.testing.assert_array_equal(row["label"], held.labels[expected])
        assert (row["image"].dtype, row["label"].dtype) == (np.uint8, np.int32)
    assert {int(i) for row in streamed[:5] for i in row["index"]} <= set(range(PLAN.examples))
    assert len({row["index"].tobytes() for row in streamed}) == PLAN.steps


def test_a_step_number_is_enough_to_go_on(mine):
    whole = rows(opened(mine))
    for step in (1, 5, 7, PLAN.steps):  # in an epoch, at its start, at the end of the training
        same(rows(opened(mine), step), whole[step:])


def test_processes_have_parts_of_the_same_batches(mine):
    whole = rows(opened(mine))
    for count, step in ((2, 0), (2, 7), (4, 13)):  # also where another number of them began
        parts = [
            rows(opened(mine), step, process_index=i, process_count=count) for i in range(count)
        ]
        joined = [
            {name: np.concatenate([part[name] for part in of_step]) for name in of_step[0]}
            for of_step in zip(*parts, strict=True)
        ]
        same(joined, whole[step:])


@flax.struct.dataclass
class State:
    step: jax.Array
    weights: jax.Array


def train(arrays: dict, start: State | None = None, **options) -> State:
    """A few steps whose result depends on every pixel, and on the order of the batches."""

    def make_batch(arrays, indices, epoch, step):
        del epoch, step
        examples = arrays.get("rows") or {name: a[indices] for name, a in arrays.items()}
        return {"x": examples["image"].reshape(len(indices), -1) / 255.0, "y": examples["label"]}

    def train_step(state, batch):
        error = batch["x"] @ state.weights - batch["y"]
        weights = state.weights - 1e-3 * jnp.mean(error[:, None] * batch["x"], axis=0)
        return State(state.step + 1, weights), {"loss": jnp.mean(error**2)}

    fresh = State(jnp.zeros((), jnp.int32), jnp.zeros(SIDE * SIDE * 3))
    return loop.fit(
        train_step,
        fresh if start is None else start,
        arrays,
        make_batch,
        PLAN,
        key=KEY,
        mesh=distributed.make_mesh(),
        name="toy",
        **options,
    )


def test_streamed_training_equals_training_in_memory(mine):
    held = sources.load(split="train", **mine)
    in_memory = train({"image": held.images, "label": held.labels})
    open_rows = stream.rows(opened(mine), order, PLAN.steps_per_epoch, PLAN.steps)
    streamed = train({}, rows=open_rows)
    assert int(streamed.step) == PLAN.steps and float(jnp.abs(streamed.weights).max()) > 0
    np.testing.assert_array_equal(streamed.weights, in_memory.weights)


def script(body: str) -> str:
    """A program whose main module other processes can import."""
    return (
        "import multiprocessing, sys, time\n"
        "from pathlib import Path\n"
        "import jax\n"
        "import numpy as np\n"
        "from oal_jax.data import sources, stream\n"
        "from oal_jax.data.stored import SetSpec\n"
        "from oal_jax.training import arrays, loop\n"
        "KEY, PLAN = jax.random.key(3), loop.Plan(examples=22, batch_size=4, epochs=3)\n"
        "def order(epoch):\n"
        "    return jax.device_get(loop.epoch_order(jax.random.key(3), epoch, PLAN))\n"
        "def opened(workers, **more):\n"
        "    spec = SetSpec('folder', 'mine', 'train', root=sys.argv[1],"
        f" image_size={SIDE}, **more)\n"
        "    return stream.open_stream(sources.open_source(spec), workers)\n"
        f"def main():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "if __name__ == '__main__':\n    main()\n"
    )


def program(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(script(body))
    return [sys.executable, "-W", "error", str(path), str(tmp_path)]


@pytest.mark.slow
def test_worker_processes_give_the_same_and_end(mine, tmp_path):
    body = """
        with stream.rows(opened(0), order, 5, 15)(0) as batches:
            whole = list(batches)
        with arrays.rows(opened(2), KEY, PLAN)(3) as batches:  # as the stages open it
            streamed = [next(batches)]
            children = multiprocessing.active_children()
            assert len(children) == 2
            streamed += batches
        assert len(streamed) == 12
        assert not multiprocessing.active_children()
        last = int(whole[4]['index'][0])
        opened(0).source.path(last).write_bytes(b'nothing')
        with stream.rows(opened(1), order, 5, 15)(3) as batches:
            try:
                for row in batches:
                    streamed.append(row)
            except Exception as error:
                print(type(error).__name__, error)
        assert len(streamed) == 13
        for a, b in zip(streamed, [*whole[3:], whole[3]], strict=True):
            for name in a:
                assert type(a[name]) is np.ndarray and a[name].dtype == b[name].dtype
                np.testing.assert_array_equal(a[name], b[name])
        print(multiprocessing.active_children())
    """
    run = subprocess.run(program(tmp_path, body), capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "oal_jax: mine/train: 22 images\n")
    message, left = run.stdout.splitlines()
    assert message.startswith(f"UserError {tmp_path}/mine/train/") and left == "[]"
    assert (
        ".png can't be decoded (not an image): replace it, or set data.on_corrupt=skip" in message
    )


@pytest.mark.slow
def test_a_killed_training_leaves_no_workers(mine, tmp_path):
    body = """
        with stream.rows(opened(2), order, 5, 10**6)(0) as batches:
            next(batches)
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(program(tmp_path, body), stdout=subprocess.PIPE, text=True) as process:
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert len(children) == 2
        for child in children:
            os.kill(child, signal.SIGTERM)  # for the training, which lets them end in its own time
        time.sleep(0.5)
        assert all(alive(child) for child in children)
        process.kill()
    deadline = time.monotonic() + 20
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(child) for child in children)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_leaving_early_ends_the_threads(mine):
    before = threading.active_count()
    open_rows = stream.rows(opened(mine), order, PLAN.steps_per_epoch, PLAN.steps)
    with open_rows(2) as batches:
        next(batches)
    with pytest.raises(ZeroDivisionError), open_rows(2) as batches:
        next(batches)
        raise ZeroDivisionError
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def damage(mine: dict, *numbers: int) -> list[str]:
    source = sources.open_source(SetSpec(split="train", **mine))
    paths = [source.path(number) for number in numbers]
    for path in paths:
        path.write_bytes(b"nothing")
    return [str(path) for path in paths]


def test_damaged_images_are_named(mine):
    (name,) = damage(mine, 4)
    for read in (rows, lambda data: list(data.chunks(3))):
        with pytest.raises(
            UserError, match=f"{name} can't be decoded .not an image.: replace"
        ) as error:
            read(opened(mine))
        assert "\n" not in str(error.value)


def test_damaged_images_are_replaced_and_counted_once_when_asked(mine, capsys):
    held = sources.load(split="train", **mine)
    damage(mine, 0, 4, 5)
    data = opened(mine, on_corrupt="skip")
    assert capsys.readouterr().err.endswith("oal_jax: mine/train: 22 images\n")
    streamed = rows(data)
    assert capsys.readouterr().err == "oal_jax: mine/train: skipped 3 of 22 images\n"
    instead = {0: 1, 4: 6, 5: 6}
    for step, row in enumerate(streamed):
        expected = order(step // PLAN.steps_per_epoch)[step % PLAN.steps_per_epoch]
        sound_ones = [instead.get(int(i), int(i)) for i in expected]
        assert row["index"].tolist() == sound_ones
        np.testing.assert_array_equal(row["image"], held.images[sound_ones])
        np.testing.assert_array_equal(row["label"], held.labels[sound_ones])
    chunks = list(data.chunks(2))
    assert capsys.readouterr().err == ""  # once a process
    sound = np.delete(np.arange(22), [0, 4, 5])
    np.testing.assert_array_equal(np.concatenate([c.images for c in chunks]), held.images[sound])
    np.testing.assert_array_equal(np.concatenate([c.labels for c in chunks]), held.labels[sound])
    damage(mine, *range(22))
    for read in (rows, lambda data: list(data.chunks(3))):
        with pytest.raises(UserError, match="none of the 22 images of mine/train can"):
            read(opened(mine, on_corrupt="skip"))


def test_chunks_are_the_set_in_order(any_set):
    held, data = sources.load(split="train", **any_set), opened(any_set)
    assert data.image_shape == held.image_shape == (SIDE, SIDE, 3)
    assert (data.examples, data.name) == (held.examples, held.name)
    assert data.class_names == held.class_names
    np.testing.assert_array_equal(data.labels, held.labels)
    for rows_ in (None, np.array([20, 3, 3, 0, 8])):
        for size in (4, 22, 50):
            a, b = list(held.chunks(size, rows_)), list(data.chunks(size, rows_))
            assert [len(c.labels) for c in a] == [len(c.labels) for c in b]
            for one, other in zip(a, b, strict=True):
                np.testing.assert_array_equal(one.images, other.images)
                np.testing.assert_array_equal(one.labels, other.labels)


def test_faults_while_streaming_are_named(mine, tmp_path):
    manifest.write(tmp_path)
    data = opened(mine)
    held = data.source
    Image.fromarray(pixels(1)[0]).save(held.path(3))
    with pytest.raises(UserError, match=rf"{held.path(3)} differs from its sha256 in .*SHA256SUMS"):
        rows(data)
    (tmp_path / "SHA256SUMS").unlink()
    data = opened(mine)
    held.path(3).unlink()
    with pytest.raises(UserError, match="cannot be read .No such file.*mend the folder"):
        rows(data)
    as_stored = opened(mine | {"image_size": 0}, limit=3)
    Image.fromarray(pixels(1)[0]).save(held.path(2))
    with pytest.raises(
        UserError, match="10 x 10 pixels, the first .* 13 x 10: set data.image_size"
    ):
        list(as_stored.chunks(4))


def in_order_of(count: int, epoch: int) -> np.ndarray:
    return np.arange(count).reshape(-1, 8)


def test_memory_does_not_grow_with_the_set(tmp_path):
    side, peaks = 64, []
    for count in (64, 512):
        image = pixels(1, side, side)[0]
        first = tmp_path / f"{count}/mine/train/cat/0.png"
        first.parent.mkdir(parents=True)
        Image.fromarray(image).save(first, compress_level=1)
        for i in range(1, count):
            os.link(first, first.with_name(f"{i}.png"))
        data = opened({"source": "folder", "name": "mine", "root": str(tmp_path / str(count))})
        in_order = functools.partial(in_order_of, count)
        open_rows = stream.rows(data, in_order, count // 8, count // 8)
        seen = 0
        tracemalloc.start()
        with open_rows(0) as batches:
            seen += sum(len(row["image"]) for row in batches)
        seen += sum(len(chunk.images) for chunk in data.chunks(8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert seen == 2 * count
    assert peaks[1] < 1.3 * peaks[0] + 200_000 < count * image.nbytes / 2
