"""Image files: listed, decoded to the pixels that a model takes, and streamed in order.

Every file is untrusted: one that can't be read is reported by name, and the others are still read.
"""

import collections
import contextlib
import itertools
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from oal_jax.data.decoding import (
    CONVERTED,
    SEVERAL,
    Decoding,
    Unreadable,
    decode,
    decode_with_notes,
    formats,
    is_gray,
    opened,
    upright_shape,
)
from oal_jax.errors import UserError

__all__ = [
    "CONVERTED",
    "SEVERAL",
    "Decoding",
    "FileBatch",
    "ImageFile",
    "Listing",
    "Unreadable",
    "counted",
    "decode",
    "decode_with_notes",
    "find",
    "formats",
    "in_turn_if_small",
    "is_gray",
    "is_hidden",
    "is_image_name",
    "opened",
    "quiet",
    "silence",
    "some",
    "stream",
    "upright_shape",
]

ImageFile = str | os.PathLike | bytes | BinaryIO
_TASK = 32  # images a task of a thread
# Threads that decode small files hinder each other: the interpreter's lock changes hands several
# times a file. Two threads were half as fast as one, four a third. So these take turns.
_SMALL = 16 << 10  # bytes a file
_IN_TURN = threading.Lock()


class Listing(NamedTuple):
    """The files below a folder, relative to it, with forward slashes, sorted.

    Attributes:
      names: files with the ending of an image.
      others: other files and hidden ones; hidden and empty folders, which end in a slash.
      repeats: links to folders that are listed already, or that lead in a circle.
    """

    names: list[str]
    others: list[str]
    repeats: list[str]

    def left_out(self, below: str = "") -> str:
        """What is not listed, for messages: of all, or of a folder below. Empty: nothing."""
        others, repeats = ([n for n in names if n.startswith(below)] for names in self[1:])
        parts = (
            counted(others, "other", "others"),
            counted(repeats, "repeated link", "repeated links"),
        )
        return f"left out {', '.join(filter(None, parts))}" if any(parts) else ""


class FileBatch(NamedTuple):
    """Images of some files.

    Attributes:
      files: as they were given.
      reasons: why a file can't be read; None for each that was.
      notes: of each file, which of `CONVERTED` and `SEVERAL` hold for it.
      images: of the files that were read, in order.
    """

    files: list[ImageFile]
    reasons: list[str | None]
    notes: list[list[str]]
    images: UInt8[np.ndarray, "n h w c"]


@contextlib.contextmanager
def in_turn_if_small(sizes: Sequence[int]) -> Iterator[None]:
    """Inside, this thread decodes files of these sizes (bytes): small ones alone."""
    with _IN_TURN if sum(sizes) < _SMALL * len(sizes) else contextlib.nullcontext():
        yield


def is_hidden(name: str) -> bool:
    """Whether a name is a system's own: ".name", or "__MACOSX" of unpacked archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_image_name(name: str) -> bool:
    """Whether a file that is not hidden has the ending of an image."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in formats()[1]


def find(folder: Path) -> Listing:
    """All images below a folder, by the endings of their names. Follows links, each folder once.

    Does not look into hidden folders.

    Raises:
      UserError: no such folder, or one that can't be read.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"folder {folder} {what}; give one with images")
    listing = Listing([], [], [])
    seen = {os.path.realpath(folder)}

    def refuse(error: OSError):
        raise UserError(f"folder {error.filename} can't be read ({error.strerror})")

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        relative = Path(parent).relative_to(folder).as_posix()
        prefix = "" if relative == "." else relative + "/"
        below = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if is_hidden(name):
                listing.others.append(f"{prefix}{name}/")
            elif real in seen:
                listing.repeats.append(prefix + name)
            else:
                seen.add(real)
                below.append(name)
        folders[:] = below
        if prefix and not (below or files):
            listing.others.append(prefix)
        for name in files:
            (listing.names if is_image_name(name) else listing.others).append(prefix + name)
    return Listing(*(sorted(names) for names in listing))


def some(names: Sequence[str], count: int | None = None) -> str:
    """The first of many names, for messages: "a.txt, b.txt, c.txt, ..."."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:3]]
    more = ", ..." if (len(names) if count is None else count) > len(shown) else ""
    return ", ".join(shown) + more


def counted(names: Sequence[str], one: str, many: str) -> str:
    """Number, kind and first names, for messages: "2 links (a, b)"; empty: there are none."""
    return f"{len(names)} {one if len(names) == 1 else many} ({some(names)})" if names else ""


def stream(
    files: Iterable[ImageFile],
    decoding: Decoding,
    folder: Path = Path(),
    workers: int | None = None,
) -> Iterator[FileBatch]:
    """Decodes files in threads, in order, at most a few batches ahead of the reader.

    Memory does not grow with the number of images.

    Args:
      files: paths, relative to `folder`, bytes of files, or open files; read as they are needed.
      decoding: has a crop, so that all images have one shape.
      folder: where relative paths start.
      workers: threads; None: one a core, at least 2 and at most 8.
    """
    formats()  # loads PIL's plugins before there are threads
    workers = workers or min(max(os.cpu_count() or 2, 2), 8)
    files, waiting = iter(files), collections.deque[Future]()
    tasks = iter(lambda: list(itertools.islice(files, _TASK)), [])
    with quiet(), ThreadPoolExecutor(workers, "decode") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(partial(_read, folder, decoding), task))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for task in waiting:
                task.cancel()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides PIL's warnings about single files; makes a decompression bomb an error."""
    with warnings.catch_warnings():
        silence()
        yield


def silence() -> None:
    """As `quiet`, for good: for processes that only read images."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _read(folder: Path, decoding: Decoding, files: Sequence[ImageFile]) -> FileBatch:
    images = []
    batch = FileBatch(
        list(files), [], [], np.zeros((0, *decoding.crop, decoding.channels), np.uint8)
    )
    placed = [folder / file if isinstance(file, str | os.PathLike) else file for file in files]
    with in_turn_if_small([_size(file) for file in placed]):
        for file in placed:
            try:
                pixels, notes = decode_with_notes(file, decoding)
            except Unreadable as error:
                reason, notes = str(error), []
            else:
                images.append(pixels)
                reason = None
            batch.reasons.append(reason)
            batch.notes.append(notes)
    return batch._replace(images=np.stack(images)) if images else batch


def _size(file: ImageFile) -> int:
    if isinstance(file, bytes):
        return len(file)
    try:
        return os.stat(file if isinstance(file, Path) else file.fileno()).st_size
    except (OSError, AttributeError):  # no file on disk
        return 0
