"""An image set on disk: encoded images and labels by number, decoded in parts or as a whole."""

import abc
import dataclasses
import io
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8

from oal_jax.data import image_files
from oal_jax.data.image_files import Decoding, Unreadable
from oal_jax.data.leave_out import relabelled
from oal_jax.errors import UserError
from oal_jax.runtime import processes

SOURCES = ("bundled", "tfds", "imglist", "folder", "own", "generated")
MAX_BYTES = 16 * 2**30
_TASK = 64  # images a task of a thread


@dataclasses.dataclass(frozen=True)
class SetSpec:
    """Which split of which image set, and how to read it.

    Attributes:
      source: "bundled" (inside the package), "tfds" (`oal_jax.data.tfds`), "imglist"
        (`oal_jax.data.openood`), "folder" (`oal_jax.data.folders`), "own" (`oal_jax.data.own`) or
        "generated" (`oal_jax.data.generated`).
      name: the set; for "tfds" also NAME/CONFIG, NAME:VERSION, NAME@SPLIT; for "bundled" also a
        corrupted copy (`oal_jax.data.corruptions`); an OOD set of `oal_jax.data.made`.
      split: "train", "validation" or "test"; the bundled ID set has "extra" too.
      root: directory of all sets; empty or None: the package's, or TFDS's default.
      limit: number of images, 0 for all. The first ones of "bundled" and "tfds". Image files lie
        class by class: as many of each class, or evenly spaced ones of an OOD set.
      id_set: the ID set that this set is used with; empty: the set is the ID set.
      id_splits: for "tfds": names of the train, validation and test splits of the ID set; empty:
        these names.
      labelled: labels are classes of the ID set, as those of covariate-shifted sets are too.
        Otherwise all are 0, of the class "ood". Bundled sets always have their own labels.
      leave_out: classes to leave out of a labelled set (`oal_jax.data.leave_out`).
      left_out: read the classes of `leave_out`, as an OOD set, and not the others.
      image_size: side of the images in pixels; 0: the default of the source. Not of "bundled".
      channels: 1 (gray) or 3 (RGB); 0: 3 for image files, those of the ID set for "tfds".
      on_corrupt: "error", or "skip" to leave damaged images out and say how many.

    Raises:
      UserError: an unknown source or value of `on_corrupt`, a negative limit.
    """

    source: str
    name: str
    split: str
    root: str | None = None
    limit: int = 0
    id_set: str = ""
    id_splits: tuple[str, ...] = ()
    labelled: bool = True
    leave_out: tuple[str, ...] = ()
    left_out: bool = False
    image_size: int = 0
    channels: int = 0
    on_corrupt: str = "error"

    def __post_init__(self):
        object.__setattr__(self, "id_set", self.id_set or self.name)
        object.__setattr__(self, "root", self.root or "")
        object.__setattr__(self, "leave_out", tuple(self.leave_out))
        if self.source not in SOURCES:
            raise UserError(
                f"unknown image source {self.source!r}: choose one of {', '.join(SOURCES)}"
            )
        if self.limit < 0:
            raise UserError(
                f"limit for image set {self.name!r} is {self.limit}: give 0 (all) or more"
            )
        if self.on_corrupt not in ("error", "skip"):
            raise UserError(f"config data.on_corrupt='{self.on_corrupt}' is not one of error, skip")

    @property
    def where(self) -> str:
        """ "SET/SPLIT", for messages."""
        return f"{self.name}/{self.split}"


class Source(abc.ABC):
    """One split of an image set on disk: encoded images and labels by number.

    Picklable, so that worker processes can read too.

    Args:
      name: "SET/SPLIT", for messages.
      class_names: what each label means.
      decoding: how its images are decoded.
      on_corrupt: as in `SetSpec`.
      remarks: what of its files is not read, for messages; None: a set that needs none.
      size: (height, width) that the set itself states for its decoded images; None: nothing.
    """

    def __init__(
        self,
        name: str,
        class_names: tuple[str, ...],
        decoding: Decoding,
        on_corrupt: str,
        remarks: str | None = None,
        size: tuple[int, int] | None = None,
    ):
        self.size = size
        self.name, self.class_names = name, class_names
        self.decoding, self.on_corrupt, self.remarks = decoding, on_corrupt, remarks

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images, damaged ones included."""

    @abc.abstractmethod
    def fetch(self, indices: Sequence[int]) -> list[tuple[bytes, int]]:
        """Encoded images and their labels.

        Raises:
          UserError: an image can't be read. Whether its bytes are an image is not looked at.
        """

    @abc.abstractmethod
    def labels(self, indices: Sequence[int] | None = None) -> Int32[np.ndarray, " n"]:
        """Labels of these images, or of all. May read records but decodes no image."""

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """The file of an image, for messages."""

    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images; reads one header at most.

        That is the header of the first image, or of the first sound one if damaged ones are
        skipped.

        Raises:
          UserError: the image can't be decoded, or all are.
        """
        if self.decoding.crop is not None:
            return *self.decoding.crop, self.decoding.channels
        for index in range(len(self)):
            ((data, _),) = self.fetch([index])
            try:
                with image_files.opened(io.BytesIO(data)) as image:
                    return image_files.upright_shape(image, self.decoding.channels)
            except Unreadable as error:
                if self.on_corrupt == "error":
                    raise self.damaged(index, error) from None
        raise self.all_damaged()

    def damaged(self, index: int, reason: Unreadable) -> UserError:
        """The error for an image that can't be decoded."""
        return UserError(
            f"{self.where(index)} can't be decoded ({reason}): replace it, or set"
            " data.on_corrupt=skip"
        )

    def all_damaged(self) -> UserError:
        """The error for a set of which no image can be decoded."""
        return UserError(
            f"none of the {len(self)} images of {self.name} can be decoded: replace them"
        )

    def say(self, *parts: str) -> None:
        """Prints these parts of a line about the set, if there are any, on the first process."""
        if any(parts) and processes.is_main():
            line = "; ".join(filter(None, parts))
            _print_once(self.where(0), f"oal_jax: {self.name}: {line}")

    def skipped(self, count: int, reasons: Sequence[str] = ()) -> str:
        """Part of a line: how many damaged images were left out, and some reasons."""
        why = f" ({image_files.some(reasons, count)})" if reasons else ""
        return f"skipped {count} of {len(self)} images{why}" if count else ""


@cache
def _print_once(first_file: str, line: str) -> None:
    """Print a line about a set; a run opens the same set several times."""
    print(line, file=sys.stderr, flush=True)


class Subset(Source):
    """Some images of a source, with other labels where a table is given.

    Args:
      source: the whole set.
      rows: numbers of the images in `source`.
      class_names: what the new labels mean.
      table: new label of each class; None: labels stay. Labels out of range stay too, for the
        reader of the image to report.
    """

    def __init__(
        self,
        source: Source,
        rows: Int[np.ndarray, " n"],
        class_names: tuple[str, ...],
        table: Int32[np.ndarray, " k"] | None = None,
    ):
        more = source.on_corrupt, source.remarks, source.size
        super().__init__(source.name, class_names, source.decoding, *more)
        self._source, self._rows, self._table = source, rows, table

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, indices: Sequence[int]) -> list[tuple[bytes, int]]:
        """Encoded images and their new labels."""
        images = self._source.fetch(self._rows[list(indices)].tolist())
        labels = _new_labels(self._table, np.array([label for _, label in images]))
        return [(data, label) for (data, _), label in zip(images, labels.tolist(), strict=True)]

    def labels(self, indices: Sequence[int] | None = None) -> Int32[np.ndarray, " n"]:
        """New labels of these images, or of all."""
        rows = self._rows if indices is None else self._rows[list(indices)]
        return _new_labels(self._table, self._source.labels(rows.tolist()))

    def where(self, index: int) -> str:
        """The file of an image."""
        return self._source.where(int(self._rows[index]))


def _new_labels(table, labels):
    if table is None:
        return labels
    known = (labels >= 0) & (labels < len(table))
    return np.where(known, table[np.where(known, labels, 0)], labels).astype(np.int32)


def select(source: Source, spec: SetSpec) -> Source:
    """The images of a source that `limit`, `leave_out` and `left_out` select.

    Raises:
      UserError: as `relabelled`; no image is selected.
    """
    rows, names, table = np.arange(len(source)), source.class_names, None
    if spec.leave_out:
        table, names = relabelled(names, spec.leave_out, spec.left_out)
        labels = source.labels()
        out = np.isin(labels, np.flatnonzero(table < 0))
        rows = rows[~out]
        if not len(rows):
            raise UserError(
                f"{source.name} has no image of the classes that config data.leave_out="
                f"{','.join(spec.leave_out)} {'names' if spec.left_out else 'leaves'}"
            )
    if 0 < spec.limit < len(rows):
        if spec.source not in ("imglist", "folder", "own"):
            rows = rows[: spec.limit]
        elif spec.labelled:
            labels = _new_labels(table, source.labels(rows.tolist()))
            rows = rows[first_of_each(labels, spec.limit)]
        else:
            rows = rows[np.arange(spec.limit) * len(rows) // spec.limit]
    if table is None and len(rows) == len(source):
        return source
    return Subset(source, rows, names, table)


def first_of_each(labels: Int[np.ndarray, " n"], count: int) -> list[int]:
    """Places of `count` images, in order: the first of every class, then the second ones, ..."""
    seen: dict[int, int] = {}
    ranks = []
    for label in labels.tolist():
        ranks.append(seen.get(label, 0))
        seen[label] = ranks[-1] + 1
    return sorted(sorted(range(len(ranks)), key=ranks.__getitem__)[:count])


class Decoded(NamedTuple):
    """An image of a set.

    Attributes:
      pixels: None for a damaged image that is skipped.
      label: of the image.
      notes: as of `image_files.decode_with_notes`; of a damaged image, the reason.
    """

    pixels: UInt8[np.ndarray, "h w c"] | None
    label: int
    notes: list[str]


def read(source: Source, indices: Sequence[int]) -> list[Decoded]:
    """Images by number.

    Raises:
      UserError: an image can't be read, can't be decoded and is not to be skipped, or has a label
        that is out of range. The message names it.
    """
    encoded, classes, images = source.fetch(indices), len(source.class_names), []
    with image_files.in_turn_if_small([len(data) for data, _ in encoded]):
        for index, (data, label) in zip(indices, encoded, strict=True):
            if not 0 <= label < classes:
                raise UserError(
                    f"label {label} of image {index} of {source.name} is out of range: its"
                    f" {classes} classes need labels 0 to {classes - 1}"
                )
            try:
                pixels, notes = image_files.decode_with_notes(data, source.decoding)
                if source.size not in (None, pixels.shape[:2]):
                    raise Unreadable(f"its shape is {pixels.shape[:2]}, the set's {source.size}")
            except Unreadable as error:
                if source.on_corrupt == "error":
                    raise source.damaged(index, error) from None
                pixels, notes = None, [str(error)]
            images.append(Decoded(pixels, label, notes))
    return images


def check_shape(source: Source, index: int, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raise `UserError` if an image has another shape than the first one of its set."""
    if tuple(shape) != tuple(expected):
        raise UserError(
            f"{source.where(index)} is {shape[1]} x {shape[0]} pixels, the first image of"
            f" {source.name} is {expected[1]} x {expected[0]}: set data.image_size"
        )


def read_all(source: Source) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]:
    """Images and labels of a whole set, in order, without the damaged ones. Decodes in threads.

    Raises:
      UserError: as `read`; images of several sizes, all damaged, or too large for memory.
    """
    image_files.formats()  # loads PIL's plugins before there are threads
    count, images, labels = len(source), None, []
    notes, damaged = Counter[str](), []
    tasks = [range(i, min(i + _TASK, count)) for i in range(0, count, _TASK)]
    with image_files.quiet(), ThreadPoolExecutor() as threads:
        for task, rows in zip(tasks, threads.map(partial(read, source), tasks), strict=True):
            for index, (pixels, label, remarks) in zip(task, rows, strict=True):
                if pixels is None:
                    damaged.append(f"{source.where(index)}: {remarks[0]}")
                    continue
                notes.update(remarks)
                if images is None:
                    _check_bytes(source, pixels.nbytes)
                    images = np.empty((count, *pixels.shape), np.uint8)
                check_shape(source, index, pixels.shape, images.shape[1:])
                images[len(labels)] = pixels
                labels.append(label)
    if images is None:
        raise source.all_damaged()
    parts = [source.skipped(len(damaged), damaged)]
    if source.remarks is not None:
        converted = [f"{number} {note}" for note, number in notes.items()]
        parts = [f"{len(labels)} images", *parts, *converted, source.remarks]
    source.say(*parts)
    return images[: len(labels)], np.array(labels, np.int32)


def _check_bytes(source: Source, image_bytes: int) -> None:
    size = len(source) * image_bytes
    if size > MAX_BYTES:
        raise UserError(
            f"the {len(source)} images of {source.name} take {size / 2**30:.1f} GiB, and sets are"
            f" held in memory up to {MAX_BYTES / 2**30:.0f} GiB: set data.stream=True, or lower"
            " data.train_images or data.image_size"
        )
