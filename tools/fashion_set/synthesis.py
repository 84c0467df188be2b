"""Synthetic image sets: letters, crops of photographs, and the validation outliers.

Every function takes a `numpy.random.Generator` and is deterministic in it. Images are (n, 28, 28)
uint8. Figures are white on black, as in MNIST and Fashion-MNIST.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageDraw, ImageFont

SIDE = 28
# Figures are drawn this many times larger and then reduced, which smooths their edges.
_SCALE = 8

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
SHAPES = ("polygon", "polygon outline", "ellipse", "ellipse outline", "lines")
OCTAVES = ("1 octave", "2 octaves", "3 octaves", "4 octaves")


class Labelled(NamedTuple):
    """Images (n, 28, 28) uint8, labels (n,) int32, and the name of each label."""

    images: UInt8[np.ndarray, "n 28 28"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]


def _reduce(canvas: Image.Image) -> UInt8[np.ndarray, "28 28"]:
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def _labels(values: Sequence[int]) -> Int32[np.ndarray, " n"]:
    return np.asarray(values, np.int32)


def letters(rng: np.random.Generator, count: int, fonts: Sequence[Path]) -> Labelled:
    """Latin letters of random font, height (13 to 21 pixels), rotation (+-15 degrees) and place.

    The 52 letters take turns, so their counts differ by at most one.
    """
    side = SIDE * _SCALE
    images = []
    labels = [i % len(LETTERS) for i in range(count)]
    for label in labels:
        font = ImageFont.truetype(str(fonts[rng.integers(len(fonts))]), 20 * _SCALE)
        left, top, right, bottom = font.getbbox(LETTERS[label])
        glyph = Image.new("L", (right - left + 4, bottom - top + 4))
        ImageDraw.Draw(glyph).text((2 - left, 2 - top), LETTERS[label], fill=255, font=font)
        # Scaled by the longer side, so that "i" and "w" come out equally large.
        factor = rng.uniform(13, 21) * _SCALE / max(glyph.size)
        size = (max(1, round(glyph.width * factor)), max(1, round(glyph.height * factor)))
        glyph = glyph.resize(size, Image.Resampling.BICUBIC)
        glyph = glyph.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        shift = rng.uniform(-2, 2, 2) * _SCALE
        place = (
            round((side - glyph.width) / 2 + shift[0]),
            round((side - glyph.height) / 2 + shift[1]),
        )
        canvas = Image.new("L", (side, side))
        canvas.paste(glyph, place)
        image = _reduce(canvas).astype(np.float64) * rng.uniform(0.8, 1.0)
        images.append(np.round(image).astype(np.uint8))
    return Labelled(np.stack(images), _labels(labels), LETTERS)


def photo_crops(rng: np.random.Generator, count: int, photos: Sequence[Path]) -> Labelled:
    """Square crops of photographs, in gray, reduced to 28 x 28; the label is the photograph.

    Photographs of more than 1,200 pixels are first reduced to that. A crop's side is log-uniform
    between 84 pixels (a texture) and the photograph's shorter side (the scene). Crops with a
    standard deviation below 12 gray levels, such as sky or a wall, are drawn again.
    """
    gray = []
    for path in photos:
        with Image.open(path) as opened:
            photo = opened.convert("L")
        photo.thumbnail((1200, 1200), Image.Resampling.BOX)
        gray.append(photo)
    images = []
    labels = [i % len(photos) for i in range(count)]
    for label in labels:
        photo = gray[label]
        while True:
            short = min(photo.size)
            side = round(math.exp(rng.uniform(math.log(84), math.log(short))))
            x = int(rng.integers(photo.width - side + 1))
            y = int(rng.integers(photo.height - side + 1))
            image = _reduce(photo.crop((x, y, x + side, y + side)))
            if image.std() >= 12:
                break
        images.append(image[:, ::-1] if rng.integers(2) else image)
    return Labelled(np.stack(images), _labels(labels), tuple(path.stem for path in photos))


def rotated(rng: np.random.Generator, count: int, base: Labelled) -> Labelled:
    """In-distribution images turned by 90 or 270 degrees; labels are those of the originals."""
    chosen = rng.permutation(len(base.images))[:count]
    turns = rng.choice([1, 3], count)
    images = [np.rot90(base.images[i], turn) for i, turn in zip(chosen, turns, strict=True)]
    return Labelled(np.stack(images), base.labels[chosen], base.class_names)


def jigsaw(rng: np.random.Generator, count: int, base: Labelled) -> Labelled:
    """In-distribution images whose four quadrants are permuted; at least two of them move."""
    half = SIDE // 2
    orders = [order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)]
    chosen = rng.permutation(len(base.images))[:count]
    images = []
    for i in chosen:
        image = base.images[i]
        parts = [image[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
        a, b, c, d = (parts[k] for k in orders[rng.integers(len(orders))])
        images.append(np.block([[a, b], [c, d]]))
    return Labelled(np.stack(images), base.labels[chosen], base.class_names)


def blend(rng: np.random.Generator, count: int, base: Labelled) -> Labelled:
    """Means of two in-distribution images of different classes; labels are those of the first."""
    chosen = rng.permutation(len(base.images))[:count]
    images = []
    for i in chosen:
        other = rng.choice(np.flatnonzero(base.labels != base.labels[i]))
        total = base.images[i].astype(np.uint16) + base.images[other]
        images.append(((total + 1) // 2).astype(np.uint8))
    return Labelled(np.stack(images), base.labels[chosen], base.class_names)


def _polygon(rng: np.random.Generator) -> list[tuple[float, float]]:
    """A star-shaped polygon of 3 to 7 corners about the middle of the canvas."""
    corners = int(rng.integers(3, 8))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(5, 13, corners) * _SCALE
    centre = (SIDE / 2 + rng.uniform(-2, 2, 2)) * _SCALE
    return [
        (centre[0] + r * math.cos(a), centre[1] + r * math.sin(a))
        for a, r in zip(angles, radii, strict=True)
    ]


def _draw(rng: np.random.Generator, kind: str) -> UInt8[np.ndarray, "28 28"]:
    """One image of a kind in `SHAPES`."""
    canvas = Image.new("L", (SIDE * _SCALE, SIDE * _SCALE))
    draw = ImageDraw.Draw(canvas)
    ink = int(rng.integers(110, 256))
    width = int(rng.integers(1 * _SCALE, 3 * _SCALE))
    if kind == "polygon":
        draw.polygon(_polygon(rng), fill=ink)
    elif kind == "polygon outline":
        corners = _polygon(rng)
        draw.line([*corners, *corners[:2]], fill=ink, width=width, joint="curve")
    elif kind == "lines":
        for _ in range(rng.integers(2, 6)):
            ends = rng.uniform(2, SIDE - 2, 4) * _SCALE
            draw.line(ends.tolist(), fill=ink, width=width)
    else:
        box = np.sort(rng.uniform(2, SIDE - 2, (2, 2)), axis=0)
        box[1] = np.minimum(np.maximum(box[1], box[0] + 8), SIDE - 1)
        corners = (box * _SCALE).flatten().tolist()
        if kind == "ellipse":
            draw.ellipse(corners, fill=ink)
        else:
            draw.ellipse(corners, outline=ink, width=width)
        canvas = canvas.rotate(rng.uniform(0, 180), Image.Resampling.BICUBIC)
    return _reduce(canvas)


def shapes(rng: np.random.Generator, count: int) -> Labelled:
    """Filled and outlined polygons and ellipses, and bundles of lines, of random brightness."""
    images = []
    labels = [i % len(SHAPES) for i in range(count)]
    for label in labels:
        image = _draw(rng, SHAPES[label])
        # A sliver of a few pixels is no useful outlier.
        while np.count_nonzero(image > 60) < 20:
            image = _draw(rng, SHAPES[label])
        images.append(image)
    return Labelled(np.stack(images), _labels(labels), SHAPES)


def noise(rng: np.random.Generator, count: int) -> Labelled:
    """Smooth noise: sums of 1 to 4 octaves of random grids, each with half the weight of the last.

    The first grid has 2 to 5 cells a side. Mean and contrast are random.
    """
    images = []
    labels = [i % len(OCTAVES) for i in range(count)]
    for label in labels:
        cells = int(rng.integers(2, 6))
        field = np.zeros((SIDE, SIDE))
        for octave in range(label + 1):
            side = min(cells * 2**octave, SIDE) + 1
            grid = Image.fromarray(rng.normal(size=(side, side)).astype(np.float32))
            smooth = grid.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            field += np.asarray(smooth, np.float64) * 0.5**octave
        field = (field - field.mean()) / field.std()
        image = rng.uniform(80, 176) + rng.uniform(20, 70) * field
        images.append(np.clip(np.round(image), 0, 255).astype(np.uint8))
    return Labelled(np.stack(images), _labels(labels), OCTAVES)
