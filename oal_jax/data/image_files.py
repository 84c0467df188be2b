"""Images in a folder of any files: found, decoded, made to fit a model; a bounded number ahead.

Every file is untrusted: one that can't be read is reported by name, and the rest goes on.
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
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from oal_jax.errors import UserError

# What is opened, whatever the file's ending says. Not EPS, for which PIL starts Ghostscript.
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
_TASK = 32  # images a task of a worker
# Threads that decode small files hinder each other: the interpreter's lock is passed on several
# times a file (two threads were half as fast as one, four a third). So these take turns.
_SMALL = 16 << 10  # bytes a file
_IN_TURN = threading.Lock()


class Found(NamedTuple):
    """The files below a folder."""

    names: list[str]  # of images by their ending, relative, with forward slashes, sorted
    others: int  # files that are not images by their ending, and hidden ones


class Chunk(NamedTuple):
    """Some images in the order of their names, and those that could not be read."""

    names: list[str]
    images: UInt8[np.ndarray, "n h w c"]
    converted: int  # images whose channels or depth were other than the model's
    unreadable: list[tuple[str, str]]  # names and reasons


class Unreadable(Exception):
    """An image file that can't be decoded, or has pixels of unknown meaning."""


@cache
def formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """PIL's names of the formats that are read here, and the endings of their files."""
    Image.init()
    known = tuple(name for name in _FORMATS if name in Image.OPEN)
    endings = Image.registered_extensions().items()
    return known, frozenset(ending for ending, name in endings if name in known)


def find(folder: Path) -> Found:
    """All images below a folder, by the endings of their names; hidden ones are left out.

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
    return Found(sorted(names), others)


def stream(
    folder: Path, names: Sequence[str], image_shape: Sequence[int], workers: int | None = None
) -> Iterator[Chunk]:
    """Decodes images in threads, in order, at most a few chunks ahead of the reader.

    Memory does not grow with the number of images.

    Args:
      folder: what the names are relative to.
      names: from `find`.
      image_shape: (height, width, channels) of the images to give.
      workers: threads; None for one a core, at least 2 and at most 8.

    Raises:
      UserError: no image type has so many channels.
    """
    if image_shape[2] not in _MODES:
        raise UserError(f"the model takes {image_shape[2]} channels; image files have 1, 3 or 4")
    formats()  # PIL's plugins, before there are threads
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
    """Inside, PIL's remarks about single files are not shown, and what it suspects is an error."""
    with warnings.catch_warnings():
        silence()
        yield


def silence() -> None:
    """From now on the same: for processes that do nothing but read images."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _read(folder: Path, image_shape: tuple[int, int, int], names: Sequence[str]) -> Chunk:
    kept, images, converted = [], [], 0
    unreadable = []
    small = sum(_size(folder / name) for name in names) < _SMALL * len(names)
    with _IN_TURN if small else contextlib.nullcontext():
        for name in names:
            try:
                pixels, was_converted = decode(folder / name, image_shape)
            except Unreadable as error:
                unreadable.append((name, str(error)))
                continue
            kept.append(name)
            images.append(pixels)
            converted += was_converted
    stacked = np.stack(images) if images else np.zeros((0, *image_shape), np.uint8)
    return Chunk(kept, stacked, converted, unreadable)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def decode(
    path: Path, image_shape: tuple[int, int, int]
) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """One image file, upright, as a model of this image shape takes it.

    The first frame of several. The shorter side is resized and the centre kept; an image of the
    right size stays as it is. Transparency is blended with black; 16-bit gray levels become 8-bit.

    Returns:
      The pixels, and whether channels or depth had to be converted.

    Raises:
      Unreadable: damaged, truncated, too large to be safe, or of floats without a known range.
    """
    if not path.is_file():  # a pipe would be waited for, for ever
        raise Unreadable("not a file")
    try:
        with Image.open(path, formats=formats()[0]) as image:
            height, width, channels = image_shape
            mode = _MODES[channels]
            # JPEG alone: decoded at a fraction of the size, at least twice what is wanted.
            image.draft(None, (2 * max(height, width),) * 2)
            image.load()
            upright = _upright(image)
            converted = upright if upright.mode == mode else convert(upright, mode)
            return _fit(converted, height, width, channels), image.mode != mode
    except Unreadable:
        raise
    except Exception as error:  # a damaged file makes PIL's decoders raise almost anything
        raise Unreadable(reason(error)) from None


def reason(error: Exception) -> str:
    """What PIL's exception says about a file, in a few words."""
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
    """The image in another mode: transparency blended with black, 16-bit levels made 8-bit.

    Raises:
      Unreadable: its pixels are floats without a known range.
    """
    if image.mode == "F":
        raise Unreadable("its pixels are floats, whose range is not known")
    if image.mode.startswith("I"):
        # 16 bits; `convert` would cut off what is above 255.
        levels = np.asarray(image).astype(np.int64) // 257
        image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(mode)


def _fit(image: Image.Image, height: int, width: int, channels: int) -> UInt8[np.ndarray, "h w c"]:
    if image.size != (width, height):
        # The part of the image that stays, in its own pixels.
        scale = min(image.width / width, image.height / height)
        left = (image.width - scale * width) / 2
        top = (image.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
    return np.asarray(image).reshape(height, width, channels)
