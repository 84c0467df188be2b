"""Image files: listed, decoded and made to fit a model, a bounded number ahead of the reader.

Every file is untrusted: one that can't be read is reported by name, and the others are still read.
"""

import collections
import contextlib
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from oal_jax.errors import UserError

# Formats that are read, whatever a file's ending says. Not EPS: PIL starts Ghostscript for it.
_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"),
    *("MPO", "DIB", "ICO", "PCX", "TGA"),
)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112  # tag of EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TASK = 32  # images a task of a thread
# Threads that decode small files hinder each other: the interpreter's lock changes hands several
# times a file. Two threads were half as fast as one, four a third. So these take turns.
_SMALL = 16 << 10  # bytes a file
_IN_TURN = threading.Lock()


class Listing(NamedTuple):
    """The files below a folder.

    Attributes:
      names: files with the ending of an image, relative, with forward slashes, sorted.
      others: number of other files, and of hidden ones.
    """

    names: list[str]
    others: int


class FileBatch(NamedTuple):
    """Images of some files.

    Attributes:
      names: files that could be read, in order.
      images: theirs.
      converted: number of images that had other channels or another depth than the model takes.
      unreadable: names of the other files, and reasons.
    """

    names: list[str]
    images: UInt8[np.ndarray, "n h w c"]
    converted: int
    unreadable: list[tuple[str, str]]


class Unreadable(Exception):
    """An image file that can't be decoded, or has pixels of unknown meaning."""


@cache
def formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """PIL's names of the formats that are read, and the endings of their files."""
    Image.init()
    known = tuple(name for name in _FORMATS if name in Image.OPEN)
    endings = Image.registered_extensions().items()
    return known, frozenset(ending for ending, name in endings if name in known)


@contextlib.contextmanager
def opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """The image of a file, which is read when its pixels are.

    Raises:
      Unreadable: whatever fails inside, with the reason in a few words.
    """
    try:
        with Image.open(file, formats=formats()[0]) as image:
            yield image
    except Unreadable:
        raise
    except Exception as error:  # a damaged file makes PIL's decoders raise almost anything
        raise Unreadable(_reason(error)) from None


@contextlib.contextmanager
def in_turn_if_small(sizes: Sequence[int]) -> Iterator[None]:
    """Inside, this thread decodes files of these sizes (bytes): small ones alone."""
    with _IN_TURN if sum(sizes) < _SMALL * len(sizes) else contextlib.nullcontext():
        yield


def find(folder: Path) -> Listing:
    """All images below a folder, by the endings of their names, without hidden ones.

    Raises:
      UserError: no such folder, or one that can't be read.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"folder {folder} {what}; give one with images")
    endings, names, others = formats()[1], [], 0

    def refuse(error: OSError):
        raise UserError(f"folder {error.filename} can't be read ({error.strerror})")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder).as_posix()
        prefix = "" if relative == "." else relative + "/"
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings:
                names.append(prefix + name)
            else:
                others += 1
    return Listing(sorted(names), others)


def stream(
    folder: Path, names: Sequence[str], image_shape: Sequence[int], workers: int | None = None
) -> Iterator[FileBatch]:
    """Decodes images in threads, in order, at most a few batches ahead of the reader.

    Memory does not grow with the number of images.

    Args:
      folder: folder that the names are relative to.
      names: from `find`.
      image_shape: (height, width, channels) of the resulting images.
      workers: threads; None: one a core, at least 2 and at most 8.

    Raises:
      UserError: no image type has this number of channels.
    """
    if image_shape[2] not in _MODES:
        raise UserError(f"the model takes {image_shape[2]} channels; image files have 1, 3 or 4")
    formats()  # loads PIL's plugins before there are threads
    workers = workers or min(max(os.cpu_count() or 2, 2), 8)
    read = partial(_read, folder, tuple(image_shape))
    waiting: collections.deque[Future] = collections.deque()
    with quiet(), ThreadPoolExecutor(workers, "decode") as pool:
        try:
            for start in range(0, len(names), _TASK):
                waiting.append(pool.submit(read, names[start : start + _TASK]))
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


def _read(folder: Path, image_shape: tuple[int, int, int], names: Sequence[str]) -> FileBatch:
    readable, images, converted, unreadable = [], [], 0, []
    with in_turn_if_small([_size(folder / name) for name in names]):
        for name in names:
            try:
                pixels, was_converted = decode(folder / name, image_shape)
            except Unreadable as error:
                unreadable.append((name, str(error)))
                continue
            readable.append(name)
            images.append(pixels)
            converted += was_converted
    stacked = np.stack(images) if images else np.zeros((0, *image_shape), np.uint8)
    return FileBatch(readable, stacked, converted, unreadable)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def decode(
    path: Path, image_shape: tuple[int, int, int]
) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """The pixels of an image file, upright, in the shape that a model takes.

    Reads the first of several frames. Resizes the shorter side and keeps the centre; an image of
    the right size keeps its pixels. Blends transparency with black; makes 16-bit gray levels 8-bit.

    Returns:
      The pixels, and whether channels or depth were converted.

    Raises:
      Unreadable: damaged, truncated, too large to be safe, or of floats without a known range.
    """
    if not path.is_file():  # reading a pipe would never end
        raise Unreadable("not a file")
    height, width, channels = image_shape
    mode = _MODES[channels]
    with opened(path) as image:
        # JPEG alone is decoded at a fraction of its size, at least twice the final one.
        image.draft(None, (2 * max(height, width),) * 2)
        image.load()
        upright = _upright(image)
        converted = upright if upright.mode == mode else convert(upright, mode)
        return _fit(converted, height, width, channels), image.mode != mode


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are sound where only the EXIF data is not
        return image
    return image if turn is None else image.transpose(turn)


def convert(image: Image.Image, mode: str) -> Image.Image:
    """The image in another mode. Blends transparency with black; makes 16-bit levels 8-bit.

    Raises:
      Unreadable: its pixels are floats, which have no known range.
    """
    if image.mode == "F":
        raise Unreadable("its pixels are floats, whose range is not known")
    if image.mode.startswith("I"):
        # 16 bits. PIL's own conversion would cut off what is above 255.
        levels = np.asarray(image).astype(np.int64) // 257
        image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(mode)


def _fit(image: Image.Image, height: int, width: int, channels: int) -> UInt8[np.ndarray, "h w c"]:
    if image.size != (width, height):
        # The part of the image to keep, in its own pixels.
        scale = min(image.width / width, image.height / height)
        left = (image.width - scale * width) / 2
        top = (image.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
    return np.asarray(image).reshape(height, width, channels)
