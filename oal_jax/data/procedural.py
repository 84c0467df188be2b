"""Images drawn by a program: auxiliary outliers for methods that train on outlier images.

Dead leaves, gratings and marble: "Learning to See by Looking at Noise" (Baradad et al., arXiv
2106.05963) shows that such images carry useful structure. Half of them fill the image; half are cut
to a random outline on black, as garments are. In colour, each image has a palette of its own. None
is a garment, a digit, a letter or a photograph, so training sees no near- or far-OOD set of the
embedded benchmark. Its validation set of drawn shapes is the most similar one.
"""

import math

import numpy as np
from jaxtyping import Float, UInt8

_COUNT, _BYTES = 12_000, 2**28
# Images, and pixels of a channel, drawn at a time: they bound the memory.
_CHUNK, _PIXELS = 1000, 2**20
_LEAVES = 40
_PALETTE = 4  # colours, between which gray levels are interpolated


def size_of(shape: tuple[int, int, int], limit: int = 0) -> int:
    """Number of images of this shape in a set: 12,000, or as many as fit into 256 MiB.

    A limit above 0 makes it fewer.
    """
    count = min(_COUNT, max(1, _BYTES // math.prod(shape)))
    return min(count, limit) if limit else count


def draw(count: int, shape: tuple[int, int, int], seed: int = 0) -> UInt8[np.ndarray, "n h w c"]:
    """`count` images of a shape (height, width, channels), the three kinds in turn.

    Image i depends only on `seed`, the shape and i's chunk, so a longer set begins with a shorter
    one. Images of one channel are the gray levels.
    """
    height, width, channels = shape
    size = max(height, width)
    middle = np.s_[:, (size - height) // 2 :, (size - width) // 2 :]
    at_once = min(_CHUNK, max(6, _PIXELS // size**2))
    images = np.empty((count, *shape), np.uint8)
    for start in range(0, count, at_once):
        rng = np.random.default_rng([seed, start])
        levels = np.empty((at_once, size, size))
        for i, kind in enumerate((dead_leaves, gratings, marble)):
            gray = kind(rng, len(levels[i::3]), size)
            gray[::2] *= outlines(rng, len(gray[::2]), size)
            levels[i::3] = gray
        gray = levels[middle][: count - start, :height, :width]
        colours = gray[..., None] if channels == 1 else coloured(rng, gray, channels)
        images[start : start + at_once] = np.rint(255 * colours)
    return images


def coloured(
    rng: np.random.Generator, gray: Float[np.ndarray, "n h w"], channels: int
) -> Float[np.ndarray, "n h w c"]:
    """Gray levels in [0, 1], coloured by linear interpolation in a random palette an image."""
    palettes = rng.uniform(size=(len(gray), _PALETTE, channels))
    below = np.minimum((gray * (_PALETTE - 1)).astype(int), _PALETTE - 2)
    share = (gray * (_PALETTE - 1) - below)[..., None]
    image = np.arange(len(gray))[:, None, None]
    return (1 - share) * palettes[image, below] + share * palettes[image, below + 1]


def outlines(rng: np.random.Generator, count: int, size: int) -> Float[np.ndarray, "n s s"]:
    """1 inside a closed curve around the middle, 0 outside. The radius is a Fourier series."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = np.arctan2(y, x)
    radius = rng.uniform(0.2, 0.4, (count, 1, 1)) * np.ones_like(angle)[None]
    for k in range(1, 6):
        wave = np.cos(k * angle + rng.uniform(0, 2 * np.pi, (count, 1, 1)))
        radius = radius + rng.uniform(0, 0.12 / k, (count, 1, 1)) * wave
    return (np.hypot(y, x) < radius).astype(np.float64)


def dead_leaves(rng: np.random.Generator, count: int, size: int) -> Float[np.ndarray, "n s s"]:
    """Discs and squares on top of each other, with radii of density r^-3; in [0, 1]."""
    y, x = np.mgrid[:size, :size]
    images = np.broadcast_to(rng.uniform(size=(count, 1, 1)), (count, size, size)).copy()
    for _ in range(_LEAVES):
        row, column = rng.uniform(0, size, (2, count, 1, 1))
        # Inverse transform of p(r) ~ r^-3 between a sixteenth and half of the side.
        low, high = (size / 16) ** -2, (size / 2) ** -2
        radius = (low - rng.uniform(size=(count, 1, 1)) * (low - high)) ** -0.5
        dy, dx = np.abs(y[None] - row), np.abs(x[None] - column)
        square = rng.uniform(size=(count, 1, 1)) < 0.5
        inside = np.where(square, np.maximum(dy, dx) < radius, dy**2 + dx**2 < radius**2)
        images = np.where(inside, rng.uniform(size=(count, 1, 1)), images)
    return images


def gratings(rng: np.random.Generator, count: int, size: int) -> Float[np.ndarray, "n s s"]:
    """Sums of three waves of random direction, each in a Gaussian window; in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    total = np.zeros((count, size, size))
    for _ in range(3):
        angle, phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1))
        cycles = rng.uniform(2, size / 4, (count, 1, 1))
        wave = np.sin(2 * np.pi * cycles * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        row, column = rng.uniform(-0.5, 0.5, (2, count, 1, 1))
        width = rng.uniform(0.15, 0.6, (count, 1, 1))
        window = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2))
        total += rng.uniform(0.3, 1, (count, 1, 1)) * wave * window
    return np.clip(rng.uniform(0.2, 0.8, (count, 1, 1)) + total / 2, 0, 1)


def marble(rng: np.random.Generator, count: int, size: int) -> Float[np.ndarray, "n s s"]:
    """Bands bent by a random field, in a few gray levels; in [0, 1]."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    spectrum = 1 / np.maximum(frequency, 1 / size) ** 2.5
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(count, size, size))) * spectrum).real
    field /= field.std(axis=(1, 2), keepdims=True)
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    bands = rng.uniform(1, 4, (count, 1, 1)) * (np.cos(angle) * x + np.sin(angle) * y)
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (bands + rng.uniform(0.1, 0.5, (count, 1, 1)) * field))
    levels = rng.integers(2, 6, (count, 1, 1))
    return np.rint(wave * levels) / levels
