"""The one way from an encoded image to pixels: training, evaluation and scoring all use it.

A copy of this file is the `preprocess.py` of an exported detector, so it needs Pillow and NumPy
alone. Content tells the format of a file.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from oal_jax.errors import UserError

# Pillow starts Ghostscript for EPS. It knows the others by their headers but can't decode them.
_NOT_READ = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF"})
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_OPAQUE = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_DEEP = frozenset({"PNG", "TIFF", "PPM", "JPEG2000"})  # formats whose 16 bits are gray levels
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
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
CONVERTED = "converted to the model's channels of 8 bits"
SEVERAL = "with several frames or layers, of which the first is read"


class Unreadable(Exception):
    """An image file that can't be decoded, or has pixels of unknown meaning."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a file becomes pixels. `dataclasses.asdict` gives its JSON.

    Attributes:
      channels: 1 (gray), 3 (RGB) or 4 (RGB and opacity).
      resize: length of the shorter side after resizing, more where the crop needs more; None: the
        image keeps its size.
      crop: (height, width) of the central part that remains; None: all.
    """

    channels: int = 3
    resize: int | None = None
    crop: tuple[int, int] | None = None

    def __post_init__(self):
        if self.channels not in _MODES:
            raise UserError(f"a model of {self.channels} channels: image files have 1, 3 or 4")
        for side in (self.resize, *(self.crop or ())):
            if side is not None and (type(side) is not int or side < 1):
                raise UserError(f"a decoding to {side!r} pixels: sides are positive integers")

    @classmethod
    def to_shape(cls, image_shape: Sequence[int]) -> "Decoding":
        """To (height, width, channels), by as little resizing as fills it: images of it stay."""
        height, width, channels = image_shape
        return cls(channels, min(height, width), (height, width))

    @classmethod
    def from_json(cls, values: Any) -> "Decoding":
        """The decoding that was written as JSON; `UserError` where the value is none."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or values.keys() != names:
            raise UserError(f"no decoding: {str(values)[:80]}")
        crop = values["crop"]
        if crop is not None and not (isinstance(crop, list) and len(crop) == 2):
            raise UserError(f"a decoding with the crop {str(crop)[:80]}: give height and width")
        return cls(values["channels"], values["resize"], crop and tuple(crop))


@cache
def formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """Pillow's names of the formats that are read, and the endings of their files."""
    Image.init()
    known = tuple(name for name in Image.OPEN if name not in _NOT_READ)
    endings = Image.registered_extensions().items()
    return known, frozenset(ending for ending, name in endings if name not in _NOT_READ)


@contextlib.contextmanager
def opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """The image of a file, which is read when its pixels are.

    Raises:
      Unreadable: whatever fails inside, with the reason in a few words.
    """
    if isinstance(file, str | os.PathLike) and not os.path.isfile(file):
        raise Unreadable("not a file")  # reading a pipe or a device would never end
    try:
        with Image.open(file, formats=formats()[0]) as image:
            yield image
    except Unreadable:
        raise
    except Exception as error:  # a damaged file makes PIL's decoders raise almost anything
        raise Unreadable(_reason(error)) from None


def decode(file: str | os.PathLike | bytes | BinaryIO, decoding: Decoding) -> np.ndarray:
    """The pixels of an encoded image, uint8 (height, width, channels).

    The first of several frames. 16-bit levels become their high byte. Transparency is over black,
    unless the model takes opacity as fourth channel. Colour profiles are not applied. The image is
    turned upright by its EXIF tag, resized by Pillow's antialiased bilinear filter and cropped;
    sizes and offsets are rounded as torchvision's Resize and CenterCrop round them.

    Args:
      file: a path, the bytes of a file, or a file open for reading.
      decoding: how it becomes pixels.

    Raises:
      Unreadable: damaged, truncated, too large to be safe, or of levels without a known range.
    """
    return decode_with_notes(file, decoding)[0]


def decode_with_notes(
    file: str | os.PathLike | bytes | BinaryIO, decoding: Decoding
) -> tuple[np.ndarray, list[str]]:
    """`decode`, and which of `CONVERTED` and `SEVERAL` hold for the image."""
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    with opened(file) as image:
        mode = _MODES[decoding.channels]
        key = _transparent_key(image)
        image.load()
        pixels = convert(_eight_bits(image, key), mode, key)
        turn = _turn(image)
        pixels = pixels if turn is None else pixels.transpose(turn)
        pixels = np.asarray(resize_and_crop(pixels, decoding))
        notes = [CONVERTED] if image.mode != mode else []
        if _has_several_frames(image):
            notes.append(SEVERAL)
        return pixels if pixels.ndim == 3 else pixels[..., None], notes


def is_gray(image: Image.Image) -> bool:
    """Whether an opened image has no colours, by its header."""
    palette = image.getpalette() if image.mode in ("P", "PA") else None
    if palette is not None:
        return palette[::3] == palette[1::3] == palette[2::3]
    return Image.getmodebase(image.mode) == "L"


def upright_shape(image: Image.Image, channels: int) -> tuple[int, int, int]:
    """(height, width, channels) of an opened image as `decode` gives it without a resize."""
    turned = _turn(image) in (_UPRIGHT[5], _UPRIGHT[6], _UPRIGHT[7], _UPRIGHT[8])
    turned = turned and image.format != "TIFF"  # whose plugin turns it, and gives the upright size
    return (*(image.size if turned else image.size[::-1]), channels)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are sound where only the EXIF data is not
        return None


def _has_several_frames(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # the first frame is sound where a later one is not
        return True


def _transparent_key(image: Image.Image):
    """The colour that is transparent, if there is one, in the depth of the decoded pixels."""
    key = image.info.get("transparency")
    deep = image.mode == "RGB" and image.tile and "16" in str(image.tile[0].args)
    return tuple(level >> 8 for level in key) if deep and isinstance(key, tuple) else key


def _eight_bits(image: Image.Image, key: int | None) -> Image.Image:
    """The image with 8 bits a channel: the high byte of 16, which Pillow takes of colours too."""
    if image.mode == "F":
        what = "floats"
    elif not image.mode.startswith("I"):
        return image
    elif image.mode == "I" and image.format not in ("PPM", "PNG"):  # their 16 bits in 32
        what = "signed or 32-bit integers"
    elif image.format not in _DEEP:
        what = f"{image.format}'s 16-bit integers"
    else:
        tags = image.tag_v2 if image.format == "TIFF" else {}
        deep = np.asarray(image)
        levels = (deep >> (tags.get(_BITS, (16,))[0] - 8)).astype(np.uint8)
        gray = Image.fromarray(255 - levels if tags.get(_PHOTOMETRIC) == 0 else levels)
        if key is None:
            return gray
        alpha = Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8))
        return Image.merge("LA", (gray, alpha))
    raise Unreadable(f"its levels are {what}, whose range is not known: save it with 8 bits")


def convert(image: Image.Image, mode: str, key=None) -> Image.Image:
    """An image of 8 bits a channel in another mode; transparency is over black unless it stays."""
    if not image.has_transparency_data:
        if image.mode not in _OPAQUE:
            raise Unreadable(f"its colours are {image.mode}: save it as RGB or gray")
        return image if image.mode == mode else image.convert(mode)
    if key is not None and "transparency" in image.info:
        image.info["transparency"] = key
    for premultiplied, straight in (("La", "LA"), ("RGBa", "RGBA")):
        image = image.convert(straight) if image.mode == premultiplied else image
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    if mode == "RGBA":
        return image
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert(mode)


def resize_and_crop(image: Image.Image, decoding: Decoding) -> Image.Image:
    """The central part of an image, after the resize.

    Raises:
      Unreadable: the resized image is too large to be safe.
    """
    size = _resized(*image.size, decoding.resize, decoding.crop)
    limit = Image.MAX_IMAGE_PIXELS
    if limit and size[0] * size[1] > limit:
        raise Unreadable(f"{image.width} x {image.height}, resized more than {limit} pixels")
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    if decoding.crop is None:
        return image
    height, width = decoding.crop
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _resized(
    width: int, height: int, resize: int | None, crop: tuple[int, int] | None
) -> tuple[int, int]:
    """(width, height) after resizing, which keeps the ratio of the sides."""

    def to_width(side: int) -> tuple[int, int]:
        return side, int(side * height / width)

    def to_height(side: int) -> tuple[int, int]:
        return int(side * width / height), side

    size = width, height
    if resize is not None:
        size = to_width(resize) if width <= height else to_height(resize)
    if crop is not None and size[0] < crop[1]:
        size = to_width(crop[1])
    if crop is not None and size[1] < crop[0]:
        size = to_height(crop[0])
    return size
