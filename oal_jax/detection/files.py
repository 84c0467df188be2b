"""Image files through a detector, in order, a bounded number at a time."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oal_jax.data import image_files
from oal_jax.data.decoding import Decoding
from oal_jax.data.image_files import ImageFile
from oal_jax.detection.parts import Result


class FileResult(NamedTuple):
    """What a detector says of one file.

    Attributes:
      path: the file, as it was given; None for bytes and open files.
      result: of scalars; None for a file that can't be read.
      reason: why it can't be read; None for a file that was.
      notes: what decoding changed, such as the number of channels.
    """

    path: str | None
    result: Result | None
    reason: str | None
    notes: tuple[str, ...] = ()


def of_folder(
    detect: Callable[[np.ndarray], Result], decoding: Decoding, folder: Path, batch_size: int
) -> Iterator[FileResult]:
    """`score` of all images below a folder; then a row for each file that is none by its name.

    Raises:
      UserError: no such folder.
    """
    listing = image_files.find(folder)
    yield from score(detect, decoding, [folder / name for name in listing.names], batch_size)
    for name in listing.others:
        yield FileResult(str(folder / name), None, "hidden, or no image by its name")


def score(
    detect: Callable[[np.ndarray], Result],
    decoding: Decoding,
    files: Iterable[ImageFile],
    batch_size: int,
) -> Iterator[FileResult]:
    """A row for each file, in order. Reads ahead at most a few batches.

    Args:
      detect: images to verdicts.
      decoding: how files become images.
      files: paths, bytes of encoded images, or open files; an iterator is read as it is needed.
      batch_size: images of a call of `detect`.
    """
    waiting: list[FileResult] = []
    images: list[np.ndarray] = []
    with contextlib.closing(image_files.stream(files, decoding)) as chunks:
        for chunk in chunks:
            for file, reason, notes in zip(chunk.files, chunk.reasons, chunk.notes, strict=True):
                path = os.fspath(file) if isinstance(file, str | os.PathLike) else None
                waiting.append(FileResult(path, None, reason, tuple(notes)))
            images.extend(chunk.images)
            while len(images) >= batch_size:
                yield from _rows(detect, waiting, images[:batch_size])
                images = images[batch_size:]
    yield from _rows(detect, waiting, images)
    yield from waiting


def _rows(
    detect: Callable[[np.ndarray], Result], waiting: list[FileResult], images: list[np.ndarray]
) -> Iterator[FileResult]:
    """Rows of as many readable files as there are images; takes them from `waiting`."""
    if not images:
        return
    result = detect(np.stack(images))
    count = used = 0
    for row in waiting:
        if row.reason is None and count == len(images):
            break
        used += 1
        if row.reason is None:
            one = Result(*(None if x is None else x[count] for x in result))
            row, count = row._replace(result=one), count + 1
        yield row
    del waiting[:used]
