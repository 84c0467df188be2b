"""Image sets that do not fit in memory, read from disk by Grain: for training, and in order.

Grain reads, decodes and resizes a batch at a time, in `workers` processes or in threads of this
one, a few batches ahead of the reader. A batch is a function of its number alone: step s of a
training draws the examples of row s of the permuted epochs, whatever the number of workers and
processes. So no iterator state is saved beside a checkpoint: its step says where the stream goes
on, even with another number of processes.
"""

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Int, Int32

from oal_jax.data import image_files, stored
from oal_jax.data.sources import Chunk
from oal_jax.data.stored import Source

_WORKER_BUFFER = 2  # finished batches that a worker process keeps
_ORDER_LOCK = threading.Lock()  # one thread computes the order of an epoch, the others wait for it

Order = Callable[[int], Int[np.ndarray, "s b"]]


class Streamed(NamedTuple):
    """One split of an image set, read from disk whenever its images are used.

    Attributes:
      source: the set on disk.
      image_shape: (height, width, channels) of every image.
      workers: processes that decode; 0: threads of this one.
    """

    source: Source
    image_shape: tuple[int, int, int]
    workers: int

    @property
    def name(self) -> str:
        """ "SET/SPLIT", for messages."""
        return self.source.name

    @property
    def examples(self) -> int:
        """Number of images, damaged ones included."""
        return len(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What each label means."""
        return self.source.class_names

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """Labels of all images. Reads all records of a TFDS set."""
        return self.source.labels()

    def chunks(self, size: int, rows: Int[np.ndarray, " m"] | None = None) -> Iterator[Chunk]:
        """All images in order, or those of `rows`, `size` at a time, without the damaged ones.

        A chunk may be smaller.

        Raises:
          UserError: an image that can't be read, or all are damaged.
        """
        indices = range(self.examples) if rows is None else rows
        numbers = range(math.ceil(len(indices) / size))
        # A few chunks are read sooner than a worker starts.
        workers, count = min(self.workers, len(numbers) // 8), 0
        with _read_ahead(partial(_in_order, self, indices, size), numbers, workers) as chunks:
            for chunk in chunks:
                count += len(chunk.labels)
                if len(chunk.labels):
                    yield chunk
        if len(indices) and not count:
            raise self.source.all_damaged()
        self.source.say(self.source.skipped(len(indices) - count))


def open_stream(source: Source, workers: int = 0) -> Streamed:
    """The set as a stream.

    Raises:
      UserError: the header of its first image is damaged, or all are.
    """
    if source.remarks is not None:
        source.say(f"{len(source)} images", source.remarks)
    return Streamed(source, source.image_shape(), workers)


def rows(
    data: Streamed,
    order: Order,
    steps_per_epoch: int,
    steps: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], contextlib.AbstractContextManager[Iterator[dict[str, np.ndarray]]]]:
    """The batches of a training, for the training loop.

    A damaged image is replaced by the next sound one of the set, if `on_corrupt` is "skip".

    Args:
      data: the training images.
      order: the examples of every step of an epoch, (steps_per_epoch, batch size) of all processes,
        from the number of the epoch. Every worker calls it: picklable by cloudpickle, and a pure
        function. In a worker JAX computes on the CPU.
      steps_per_epoch: whole batches an epoch.
      steps: number of steps of the whole training.
      process_index: this process gets the `process_index`-th of `process_count` equal parts of a
        batch, in the order of the batch.
      process_count: number of processes; it divides the batch size.

    Returns:
      `open_rows(step)`, a context manager of an iterator over the steps from `step` on: dicts of
      `index` (b,) int32, `image` (b, h, w, c) uint8 and `label` (b,) int32, with b the batch size
      of this process. Leaving the context ends the workers. The iterator raises the errors of the
      workers, such as the UserError that names a damaged file.
    """

    @contextlib.contextmanager
    def open_rows(step: int) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        replaced: set[int] = set()

        def batches(results) -> Iterator[dict[str, np.ndarray]]:
            for batch, examples in results:
                replaced.update(examples[examples != batch["index"]].tolist())
                yield batch

        part = process_index, process_count
        read = partial(_permuted, data, order, steps_per_epoch, *part)
        with _read_ahead(read, range(step, steps), data.workers) as results:
            yield batches(results)
        data.source.say(data.source.skipped(len(replaced)))

    return open_rows


def _in_order(data: Streamed, indices: Sequence[int], size: int, number: int) -> Chunk:
    """A chunk of the images, without the damaged ones."""
    part = indices[number * size : (number + 1) * size]
    batch = _batch(data, [int(index) for index in part], replace=False)
    return Chunk(batch["image"], batch["label"])


def _permuted(
    data: Streamed, order: Order, steps_per_epoch: int, index: int, count: int, step: int
) -> tuple[dict[str, np.ndarray], Int32[np.ndarray, " b"]]:
    """The batch of a step, and its examples before damaged ones are replaced."""
    epoch, row = divmod(step, steps_per_epoch)
    with _ORDER_LOCK:
        whole = _order_of(order, epoch)[row]
    size = len(whole) // count
    examples = whole[index * size : (index + 1) * size].astype(np.int32)
    return _batch(data, examples.tolist(), replace=True), examples


@functools.lru_cache(maxsize=2)
def _order_of(order: Order, epoch: int) -> Int[np.ndarray, "s b"]:
    return order(epoch)


def _batch(data: Streamed, indices: Sequence[int], replace: bool) -> dict[str, np.ndarray]:
    """Images, labels and numbers; the next sound image in place of a damaged one, or none."""
    source, images, labels, numbers = data.source, [], [], []
    for first, (pixels, label, _) in zip(indices, stored.read(source, indices), strict=True):
        index = first
        while pixels is None and replace:
            index = (index + 1) % len(source)
            if index == first:
                raise source.all_damaged()
            ((pixels, label, _),) = stored.read(source, [index])
        if pixels is not None:
            stored.check_shape(source, index, pixels.shape, data.image_shape)
            images.append(pixels)
            labels.append(label)
            numbers.append(index)
    return {
        "index": np.array(numbers, np.int32),
        "image": np.array(images, np.uint8).reshape(-1, *data.image_shape),
        "label": np.array(labels, np.int32),
    }


@contextlib.contextmanager
def _read_ahead(read: Callable[[int], Any], numbers: range, workers: int) -> Iterator[Iterator]:
    """`map(read, numbers)`, computed ahead in threads or processes that end with the context."""
    import grain

    if not numbers:
        yield iter(())
        return
    image_files.formats()  # loads PIL's plugins before there are threads
    threads = 1 if workers else min(max(os.cpu_count() or 2, 2), 8)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    data = grain.MapDataset.range(numbers.start, numbers.stop).map(read).to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own; they keep their defaults
        # Batches come through pipes, for 5 % more work. Containers often have 64 MiB of shared
        # memory, and a program that ends soon after its stream leaves some behind.
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        data = grain.experimental.WithOptionsIterDataset(data, through_pipes)
        spread = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=_WORKER_BUFFER
        )
        data = data.mp_prefetch(spread, worker_init_fn=_start_worker)
    with image_files.quiet():
        results = iter(data)
        try:
            yield _from_workers(results) if workers else results
        finally:
            results.close()


def _from_workers(results: Iterator) -> Iterator:
    """The results. Workers, which start with the first one, never get SIGINT and SIGTERM.

    Those are for this process alone, which then ends its workers. The signals are blocked here
    while workers start, because they inherit the mask; a handler of theirs would be set too late.
    """
    resource_tracker.ensure_running()  # starting it later would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        first = list(itertools.islice(results, 1))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from first
    yield from results


def _start_worker(index: int, count: int) -> None:
    """Prepares a worker process before it reads."""
    del index, count
    import jax

    jax.config.update("jax_platforms", "cpu")  # the accelerator belongs to the training
    image_files.silence()
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Ends this worker when the training was killed."""
    parent.join()
    os._exit(1)
