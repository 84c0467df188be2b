"""An image set on disk: its encoded images by number, decoded one by one or whole into memory."""

import contextlib
import io
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from oal_jax.data import image_files
from oal_jax.errors import UserError

MAX_BYTES = 16 * 2**30
ON_CORRUPT = ("error", "skip")
_LOGGER = logging.getLogger("absl")
_TASK = 64  # images a task of a thread
# Threads that decode small images hinder each other (see `image_files`): they take turns.
_SMALL = 16 << 10  # bytes an image
_IN_TURN = threading.Lock()


class Encoded(NamedTuple):
    """An image as it is stored, and its label."""

    data: bytes
    label: int


class Encodings(Protocol):
    """Random access to encoded images; picklable, so that other processes can read too."""

    def __len__(self) -> int:
        """How many there are."""

    def fetch(self, indices: Sequence[int]) -> list[Encoded]:
        """Those of these numbers; a UserError where one can't be read, its bytes apart."""

    def labels(self) -> Int32[np.ndarray, " n"]:
        """Of all images; records are read for it, as they are, without decoding an image."""

    def where(self, index: int) -> str:
        """The file of an image, for messages."""


class Fit(NamedTuple):
    """What decoded images are made.

    Attributes:
      mode: of PIL: "L" or "RGB", ...
      resize: length of the shorter side, and side of the central square that is kept; None: images
        stay as large as they are.
      size: (height, width) that images are said to have; one of another size is damaged.
    """

    mode: str
    resize: tuple[int, int] | None
    size: tuple[int, int] | None = None


class Stored(NamedTuple):
    """One split of an image set that is read when its images are asked for.

    Attributes:
      name: "SET/SPLIT", for messages.
      encodings: its images and labels.
      class_names: what each label means.
      fit: what images are made.
      on_corrupt: of `ON_CORRUPT`: what is done about an image that can't be decoded.
    """

    name: str
    encodings: Encodings
    class_names: tuple[str, ...]
    fit: Fit
    on_corrupt: str

    @property
    def examples(self) -> int:
        """Images, damaged ones among them."""
        return len(self.encodings)


class Arrays(NamedTuple):
    """Images and labels as `oal_jax.data.sources.validated` takes them."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]


class Damaged(NamedTuple):
    """Why an image can't be decoded."""

    reason: str


def check_on_corrupt(value: str) -> None:
    """Raise `UserError` for what is not one of `ON_CORRUPT`."""
    if value not in ON_CORRUPT:
        raise UserError(f"config data.on_corrupt='{value}' is not one of {', '.join(ON_CORRUPT)}")


def decode(data: bytes, fit: Fit) -> UInt8[np.ndarray, "h w c"] | Damaged:
    """The pixels of an encoded image, or what is wrong with it."""
    try:
        with Image.open(io.BytesIO(data), formats=image_files.formats()[0]) as opened:
            image: Image.Image = opened
            if image.mode[0] in "IF":  # `convert` would cut off what is above 255
                image = image_files.convert(image, fit.mode)
            elif image.mode != fit.mode:
                image = image.convert(fit.mode)
            pixels = np.asarray(
                image if fit.resize is None else resize_and_crop(image, *fit.resize)
            )
    except Exception as error:  # a damaged file makes PIL's decoders raise almost anything
        return Damaged(image_files.reason(error))
    if fit.size not in (None, pixels.shape[:2]):
        return Damaged(f"its shape is {pixels.shape[:2]}, the set's {fit.size}")
    return pixels if pixels.ndim == 3 else pixels[..., None]


def resize_and_crop(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """Reduces or enlarges the shorter side to `resize` pixels, then cuts the central square out.

    The sizes and offsets are rounded as torchvision's Resize and CenterCrop do on Pillow images;
    `crop` is at most `resize`.
    """
    short, long = sorted(image.size)
    other = int(resize * long / short)
    size = (resize, other) if image.width <= image.height else (other, resize)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - crop) / 2) for side in image.size)
    return image.crop((left, top, left + crop, top + crop))


def image_shape(stored: Stored) -> tuple[int, int, int]:
    """(height, width, channels) of the images; reads at most the header of the first sound one.

    Raises:
      UserError: that image is damaged and is not to be skipped, or all are.
    """
    fit, channels = stored.fit, {"L": 1, "RGB": 3, "RGBA": 4}[stored.fit.mode]
    if fit.resize is not None:
        return fit.resize[1], fit.resize[1], channels
    if fit.size is not None:
        return *fit.size, channels
    for index in range(stored.examples):
        (encoded,) = stored.encodings.fetch([index])
        try:
            with Image.open(io.BytesIO(encoded.data), formats=image_files.formats()[0]) as image:
                return image.height, image.width, channels
        except Exception as error:  # a damaged file makes PIL raise almost anything
            if stored.on_corrupt == "error":
                raise _damaged(stored, index, image_files.reason(error)) from None
    raise all_damaged(stored)


def read(
    stored: Stored, indices: Sequence[int]
) -> list[tuple[UInt8[np.ndarray, "h w c"] | Damaged, int]]:
    """(pixels, label) of each of these images; `Damaged` in place of pixels where they are skipped.

    Raises:
      UserError: an image can't be read, or can't be decoded and is not to be skipped, or its label
        is out of range; the message names it.
    """
    encoded = stored.encodings.fetch(indices)
    small = sum(len(one.data) for one in encoded) < _SMALL * len(encoded)
    found = []
    with _IN_TURN if small else contextlib.nullcontext():
        for index, (data, label) in zip(indices, encoded, strict=True):
            if not 0 <= label < len(stored.class_names):
                raise UserError(
                    f"label {label} of image {index} of {stored.name} is out of range:"
                    f" its {len(stored.class_names)} classes need labels 0 to"
                    f" {len(stored.class_names) - 1}"
                )
            pixels = decode(data, stored.fit)
            if isinstance(pixels, Damaged) and stored.on_corrupt == "error":
                raise _damaged(stored, index, pixels.reason)
            found.append((pixels, label))
    return found


def check_shape(stored: Stored, index: int, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise `UserError` where an image has another shape than the first one of its set."""
    if tuple(shape) != tuple(wanted):
        raise UserError(
            f"{stored.encodings.where(index)} is {shape[1]} x {shape[0]} pixels, the first image of"
            f" {stored.name} is {wanted[1]} x {wanted[0]}: set data.image_size"
        )


def read_all(stored: Stored) -> Arrays:
    """The whole set in memory, in order, decoded in threads; without the damaged ones.

    Raises:
      UserError: as `read`; images of several sizes, none at all, or too many.
    """
    image_files.formats()  # PIL's plugins, before there are threads
    count, images, labels = stored.examples, None, []
    tasks = [range(i, min(i + _TASK, count)) for i in range(0, count, _TASK)]
    with image_files.quiet(), ThreadPoolExecutor() as threads:
        for task, rows in zip(tasks, threads.map(partial(read, stored), tasks), strict=True):
            for index, (pixels, label) in zip(task, rows, strict=True):
                if isinstance(pixels, Damaged):
                    continue
                if images is None:
                    _check_bytes(stored, pixels.nbytes)
                    images = np.empty((count, *pixels.shape), np.uint8)
                check_shape(stored, index, pixels.shape, images.shape[1:])
                images[len(labels)] = pixels
                labels.append(label)
    if images is None:
        raise all_damaged(stored)
    say_skipped(stored, count - len(labels))
    return Arrays(images[: len(labels)], np.array(labels, np.int64))


def _damaged(stored: Stored, index: int, reason: str) -> UserError:
    return UserError(
        f"{stored.encodings.where(index)} is damaged ({reason}): replace it, or set"
        " data.on_corrupt=skip"
    )


def all_damaged(stored: Stored) -> UserError:
    """The error of a set of which no image can be decoded."""
    return UserError(f"all {stored.examples} images of {stored.name} are damaged: replace them")


def say_skipped(stored: Stored, count: int) -> None:
    """Log how many damaged images were left out, if any were."""
    if count:
        _LOGGER.warning("%s: skipped %d of %d images", stored.name, count, stored.examples)


def _check_bytes(stored: Stored, image_bytes: int) -> None:
    size = stored.examples * image_bytes
    if size > MAX_BYTES:
        raise UserError(
            f"the {stored.examples} images of {stored.name} take {size / 2**30:.1f} GiB, and sets"
            f" are held in memory up to {MAX_BYTES / 2**30:.0f} GiB: set data.stream=True, or lower"
            " data.train_images or data.image_size"
        )


def first_of_each(labels: Sequence[int] | Int[np.ndarray, " n"], count: int) -> list[int]:
    """Where `count` images stand, in order: the first of every class, then the second ones, ..."""
    seen: dict[int, int] = {}
    ranks = []
    for label in map(int, labels):
        ranks.append(seen.get(label, 0))
        seen[label] = ranks[-1] + 1
    return sorted(sorted(range(len(ranks)), key=ranks.__getitem__)[:count])
