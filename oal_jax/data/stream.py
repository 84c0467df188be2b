"""Image sets that do not fit in memory, streamed from disk by Grain: for training, and in order.

Images are read, decoded and resized a batch at a time, in `workers` processes, or in threads of
this one, a few batches ahead of the reader. What a batch holds is a function of its number alone:
of step s of a training the examples are those of row s of the permuted epochs, whatever the number
of workers and processes. So there is no iterator state to be saved beside a checkpoint: the step in
it says where the stream goes on, and another number of processes may go on with it.

The permutations are JAX's, computed once an epoch in this process and handed to the workers in a
file: no worker starts JAX on a device.
"""

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Int, Int32, UInt8

from oal_jax.data import image_files, stored
from oal_jax.data.sources import Chunk
from oal_jax.data.stored import Damaged, Stored

_WORKER_BUFFER = 2  # finished batches that a worker process keeps
_POLL = 0.01  # seconds between two looks for the order of an epoch
# For the main process alone, which ends its workers in its own time.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Order = Callable[[int], Int[np.ndarray, "s b"]]


class Streamed(NamedTuple):
    """One split of an image set, read anew whenever its images are asked for.

    Attributes:
      stored: the set on disk.
      image_shape: (height, width, channels) of every image.
      workers: processes that decode; 0: threads of this one.
    """

    stored: Stored
    image_shape: tuple[int, int, int]
    workers: int

    @property
    def name(self) -> str:
        """ "SET/SPLIT", for messages."""
        return self.stored.name

    @property
    def examples(self) -> int:
        """Number of images, damaged ones among them."""
        return self.stored.examples

    @property
    def class_names(self) -> tuple[str, ...]:
        """What each label means."""
        return self.stored.class_names

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """Of all images; of records they have to be read."""
        return self.stored.encodings.labels()

    def chunks(self, size: int, rows: Int[np.ndarray, " m"] | None = None) -> Iterator[Chunk]:
        """All images in order, or those of `rows`, `size` at a time, without the damaged ones.

        A chunk may be smaller.

        Raises:
          UserError: an image that can't be read, or all are damaged.
        """
        wanted = range(self.examples) if rows is None else rows
        numbers = range(math.ceil(len(wanted) / size))
        workers = min(self.workers, len(numbers) // 8)  # few chunks are read before one starts
        read, kept = _InOrder(self, wanted, size), 0
        with _running(read, numbers, workers) as batches:
            for images, labels in batches:
                kept += len(labels)
                if len(labels):
                    yield Chunk(images, labels)
        if len(wanted) and not kept:
            raise stored.all_damaged(self.stored)
        stored.say_skipped(self.stored, len(wanted) - kept)


def open_stream(of: Stored, workers: int = 0) -> Streamed:
    """The set as a stream; its first sound image is decoded for the shape.

    Raises:
      UserError: that image can't be read, or all are damaged.
    """
    for index in range(of.examples):
        ((pixels, _),) = stored.read(of, [index])
        if not isinstance(pixels, Damaged):
            return Streamed(of, pixels.shape, workers)
    raise stored.all_damaged(of)


def rows(
    data: Streamed,
    order: Order,
    steps_per_epoch: int,
    steps: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], contextlib.AbstractContextManager[Iterator[dict[str, np.ndarray]]]]:
    """What the training loop draws its batches from.

    A damaged image is replaced by the next sound one of the set, where `on_corrupt` is "skip".

    Args:
      data: the training images.
      order: the examples of every step of an epoch, (steps_per_epoch, batch size) of all processes;
        called in this process, with the number of the epoch.
      steps_per_epoch: whole batches an epoch.
      steps: of the whole training.
      process_index: this process has the `process_index`-th of `process_count` equal parts of a
        batch, in the order of the batch.
      process_count: processes of the run; the batch size is a multiple of it.

    Returns:
      `open_rows(step)`, a context manager that gives an iterator over the steps from `step` on: a
      dict each of `index` (b,) int32, `image` (b, h, w, c) uint8 and `label` (b,) int32, with b the
      batch size of this process. Leaving the context ends the workers. Errors of the workers, such
      as the UserError that names a damaged file, are raised by the iterator.
    """

    def own(epoch: int) -> Int32[np.ndarray, "s b"]:
        whole = order(epoch)
        size = whole.shape[1] // process_count
        return whole[:, process_index * size : (process_index + 1) * size].astype(np.int32)

    @contextlib.contextmanager
    def open_rows(step: int) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        numbers, skipped = range(step, steps), set()
        if not numbers:
            yield iter(())
            return
        epoch = step // steps_per_epoch
        known = {epoch: own(epoch)}
        with contextlib.ExitStack() as stack:
            path = Path(tempfile.mkdtemp(prefix="oal_jax_order_"))
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            _write_order(path, epoch, known[epoch])
            read = _Permuted(data, path, steps_per_epoch)
            batches = stack.enter_context(_running(read, numbers, data.workers))
            # The folder goes first: workers that wait for an order stop waiting.
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            yield _published(batches, own, path, numbers, steps_per_epoch, known, skipped)
        stored.say_skipped(data.stored, len(skipped))

    return open_rows


def _published(
    batches: Iterator[tuple[np.ndarray, ...]],
    order: Order,
    path: Path,
    numbers: range,
    steps_per_epoch: int,
    known: dict[int, Int32[np.ndarray, "s b"]],
    skipped: set[int],
) -> Iterator[dict[str, np.ndarray]]:
    """The batches, with the order of this epoch and of the next one laid out for the workers."""
    for number in numbers:
        epoch, row = divmod(number, steps_per_epoch)
        for due in (epoch, epoch + 1):
            if due not in known and due * steps_per_epoch < numbers.stop:
                known[due] = order(due)
                _write_order(path, due, known[due])
        for old in [e for e in known if e < epoch]:
            del known[old]
            with contextlib.suppress(OSError):  # some systems keep what is mapped
                _order_file(path, old).unlink()
        images, labels, indices = next(batches)
        wanted = known[epoch][row]
        skipped.update(wanted[wanted != indices].tolist())
        yield {"index": indices, "image": images, "label": labels}


class _InOrder:
    """`number -> (images, labels)` of a chunk of images, the damaged ones left out."""

    def __init__(self, data: Streamed, wanted: Sequence[int], size: int):
        self._stored, self._shape = data.stored, data.image_shape
        self._wanted, self._size = wanted, size

    def __call__(self, number: int) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
        part = self._wanted[number * self._size : (number + 1) * self._size]
        indices = [int(index) for index in part]
        images, labels = np.empty((len(indices), *self._shape), np.uint8), []
        for index, (pixels, label) in zip(indices, stored.read(self._stored, indices), strict=True):
            if not isinstance(pixels, Damaged):
                stored.check_shape(self._stored, index, pixels.shape, self._shape)
                images[len(labels)] = pixels
                labels.append(label)
        return images[: len(labels)], np.array(labels, np.int32)


class _Permuted:
    """`step -> (images, labels, indices)`, in the order that is laid out in a folder."""

    def __init__(self, data: Streamed, path: Path, steps_per_epoch: int):
        self._stored, self._shape, self._path = data.stored, data.image_shape, path
        self._steps_per_epoch = steps_per_epoch

    def __call__(self, step: int) -> tuple[np.ndarray, ...]:
        epoch, row = divmod(step, self._steps_per_epoch)
        indices = np.array(_read_order(self._path, epoch)[row])
        images = np.empty((len(indices), *self._shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        found = stored.read(self._stored, indices.tolist())
        for i, (pixels, label) in enumerate(found):
            if isinstance(pixels, Damaged):
                indices[i], pixels, label = self._next_sound(int(indices[i]))
            stored.check_shape(self._stored, int(indices[i]), pixels.shape, self._shape)
            images[i], labels[i] = pixels, label
        return images, labels, indices

    def _next_sound(self, index: int) -> tuple[int, UInt8[np.ndarray, "h w c"], int]:
        for distance in range(1, self._stored.examples):
            other = (index + distance) % self._stored.examples
            ((pixels, label),) = stored.read(self._stored, [other])
            if not isinstance(pixels, Damaged):
                return other, pixels, label
        raise stored.all_damaged(self._stored)


def _order_file(path: Path, epoch: int) -> Path:
    return path / f"{epoch}.npy"


def _write_order(path: Path, epoch: int, order: Int32[np.ndarray, "s b"]) -> None:
    draft = path / "draft.npy"
    np.save(draft, order)
    draft.replace(_order_file(path, epoch))  # it is there whole, or not at all


@functools.lru_cache(maxsize=4)
def _read_order(path: Path, epoch: int) -> Int32[np.ndarray, "s b"]:
    """The order of an epoch, mapped: it is in memory once for all workers. Waits for it."""
    file = _order_file(path, epoch)
    while not file.exists():
        if not path.exists():
            raise RuntimeError("the stream was closed")
        time.sleep(_POLL)
    return np.load(file, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def _running(read: Callable[[int], Any], numbers: range, workers: int) -> Iterator[Iterator[Any]]:
    """`map(read, numbers)`, computed ahead in threads or processes, which end with the context."""
    import grain

    image_files.formats()  # PIL's plugins, before there are threads
    threads = 1 if workers else min(max(os.cpu_count() or 2, 2), 8)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    data = grain.MapDataset.range(numbers.start, numbers.stop).map(read).to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own; they keep their defaults
        # Batches come through pipes, for 5 % more work: of shared memory containers often have
        # 64 MiB, and a program that ends soon after its stream leaves some behind.
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        data = grain.experimental.WithOptionsIterDataset(data, through_pipes)
        spread = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=_WORKER_BUFFER
        )
        data = data.mp_prefetch(spread, worker_init_fn=_start_worker)
    with image_files.quiet():
        batches = iter(data)
        try:
            yield _from_workers(batches) if workers else batches
        finally:
            batches.close()


def _from_workers(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; the workers, which the first one starts, never hear of `_SIGNALS`.

    They inherit what is blocked here: one that comes while a worker starts would end it.
    """
    resource_tracker.ensure_running()  # whoever starts it later unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        first = list(itertools.islice(batches, 1))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from first
    yield from batches


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker process."""
    del index, count
    import jax

    # Grain imports JAX; should anything use it here, it is not the accelerator of the training.
    jax.config.update("jax_platforms", "cpu")
    image_files.silence()
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A killed training leaves no workers behind."""
    parent.join()
    os._exit(1)
