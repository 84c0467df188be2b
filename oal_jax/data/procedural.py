"""Images drawn by a program, as auxiliary outliers for methods that are trained on some.

Dead leaves, gratings and marble, kinds of which "Learning to See by Looking at Noise" (Baradad et
al., arXiv 2106.05963) shows that they carry useful structure; half of them fill the image, half
are cut to a random outline on black, as garments are. None is a garment, a digit, a letter or a
photograph, so no near- or far-OOD set is seen in training. Of the validation families the drawn
shapes are the nearest relative.
"""

import numpy as np
from jaxtyping import Float, UInt8

NAME = "procedural"  # as an image set; every split of it is the same
COUNT = 12_000
SIZE = 28  # pixels a side, as the embedded sets
_CHUNK = 1000  # images drawn at a time: bounds the memory
_LEAVES = 40


def draw(count: int, size: int, seed: int = 0) -> UInt8[np.ndarray, "n s s 1"]:
    """`count` gray images of `size` x `size` pixels, a third of each kind, in turns.

    Image i depends on `seed` and i's chunk alone, so a longer set begins with a shorter one.
    """
    chunks = []
    for start in range(0, count, _CHUNK):
        rng = np.random.default_rng([seed, start])
        drawn = np.empty((_CHUNK, size, size))
        for i, kind in enumerate((dead_leaves, gratings, marble)):
            images = kind(rng, len(drawn[i::3]), size)
            images[::2] *= outlines(rng, len(images[::2]), size)
            drawn[i::3] = images
        chunks.append(drawn[: count - start])
    images = np.concatenate(chunks) if chunks else np.zeros((0, size, size))
    return np.rint(255 * images).astype(np.uint8)[..., None]


def outlines(rng: np.random.Generator, count: int, size: int) -> Float[np.ndarray, "n s s"]:
    """1 inside a closed curve around the middle, else 0; its radius is a short Fourier series."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = np.arctan2(y, x)
    radius = rng.uniform(0.2, 0.4, (count, 1, 1)) * np.ones_like(angle)[None]
    for k in range(1, 6):
        wave = np.cos(k * angle + rng.uniform(0, 2 * np.pi, (count, 1, 1)))
        radius = radius + rng.uniform(0, 0.12 / k, (count, 1, 1)) * wave
    return (np.hypot(y, x) < radius).astype(np.float64)


def dead_leaves(rng: np.random.Generator, count: int, size: int) -> Float[np.ndarray, "n s s"]:
    """Discs and squares over one another, their radii by the power law r^-3; in [0, 1]."""
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
    """Sums of three waves of any direction, each in a Gaussian window of its own; in [0, 1]."""
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
    """Bands whose course is bent by a random field, cut into a few gray levels; in [0, 1]."""
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
