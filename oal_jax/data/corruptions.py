"""Corrupted copies of the embedded in-distribution images: covariate-shifted ID sets.

Five corruptions of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261, section 3) that suit
gray images of 28 pixels: a noise, a blur and three digital ones. Each has one severity, at which
the change is easy to see and the class still recognisable. They resemble none of the validation OOD
sets, which turn, rearrange, mix or invent images.

An image's random draws depend only on the name of the set and the index of the image.
"""

import io
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_Image = UInt8[np.ndarray, "h w c"]


def gaussian_noise(rng: np.random.Generator, image: _Image) -> _Image:
    """Adds normal noise of 0.12 of the range, independent in every pixel and channel."""
    return _to_bytes(image + 255 * 0.12 * rng.standard_normal(image.shape))


def motion_blur(rng: np.random.Generator, image: _Image) -> _Image:
    """Mean along a line of 5 pixels in a random direction; edge pixels are repeated outside."""
    angle = rng.uniform(0, np.pi)
    steps = np.linspace(-2, 2, 17)
    # Each point of the line is divided among the four pixels around it.
    kernel = np.zeros((7, 7))
    for y, x in zip(3 + steps * np.sin(angle), 3 + steps * np.cos(angle), strict=True):
        i, j = int(y), int(x)
        kernel[i : i + 2, j : j + 2] += np.outer((i + 1 - y, y - i), (j + 1 - x, x - j))
    kernel = kernel[..., None] / kernel.sum()
    import scipy.ndimage

    return _to_bytes(scipy.ndimage.convolve(image.astype(np.float64), kernel, mode="nearest"))


def low_contrast(rng: np.random.Generator, image: _Image) -> _Image:
    """Keeps 0.3 of each pixel's distance from the mean of its channel."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return _to_bytes(mean + 0.3 * (image - mean))


def jpeg(rng: np.random.Generator, image: _Image) -> _Image:
    """The image after JPEG compression of quality 20."""
    stored = io.BytesIO()
    _to_pil(image).save(stored, "JPEG", quality=20)
    with Image.open(stored) as read:
        return np.asarray(read).reshape(image.shape)


def pixelate(rng: np.random.Generator, image: _Image) -> _Image:
    """Box means of 0.45 of the height and width, enlarged again."""
    height, width = image.shape[:2]
    small = (max(1, round(0.45 * width)), max(1, round(0.45 * height)))
    reduced = _to_pil(image).resize(small, Image.Resampling.BOX)
    return np.asarray(reduced.resize((width, height), Image.Resampling.BOX)).reshape(image.shape)


class Shifted(NamedTuple):
    """A covariate-shifted set: the bundled set that it corrupts, and how."""

    base: str
    corruption: Callable[[np.random.Generator, _Image], _Image]


SETS = {
    "fashion_gaussian": Shifted("fashion", gaussian_noise),
    "fashion_blur": Shifted("fashion", motion_blur),
    "fashion_contrast": Shifted("fashion", low_contrast),
    "fashion_jpeg": Shifted("fashion", jpeg),
    "fashion_pixelate": Shifted("fashion", pixelate),
}


def corrupt(name: str, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
    """Images as the set `name` of `SETS` has them, in the same order; gray or colour."""
    corruption, seed = SETS[name].corruption, zlib.crc32(name.encode())
    return np.stack(
        [corruption(np.random.default_rng((seed, i)), image) for i, image in enumerate(images)]
    )


def _to_bytes(values: np.ndarray) -> _Image:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _to_pil(image: _Image) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
