"""OOD sets made from the images of any ID set, for validation.

They are of the kinds of the embedded validation sets (`tools/fashion_set/synthesis.py`), for images
of any size and of 1, 3 or 4 channels. None is of the kinds of `oal_jax.data.procedural`, on which
methods train. A set is a function of its name and of the images.

`made_rotated` is OOD only where the ID classes have an upright direction: turned balls, cells or
textures still belong to their class. Every score then has an AUROC near 50 on it.
"""

import itertools
import math
import zlib

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

Rng = np.random.Generator
Images = UInt8[np.ndarray, "n h w c"]

_COUNT = (100, 500)  # fewest and most images of a set
_BYTES = 2**28  # most memory of the ID images that a set is made from
_CANVAS = 512  # pixels of a side from which figures are reduced, where images are smaller
_ORDERS = [order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)]


def base_rows(count: int, shape: tuple[int, int, int], limit: int = 0) -> Int[np.ndarray, " m"]:
    """Rows of the ID images that sets are made from, in order: all, or random ones of many.

    Args:
      count: number of ID images.
      shape: (height, width, channels).
      limit: most rows; 0: 500, or fewer if the images take more than 256 MiB.
    """
    most = min(_COUNT[1], max(1, _BYTES // math.prod(shape)), limit or count, count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def make(name: str, images: Images, labels: Int[np.ndarray, " n"], count: int = 0) -> Images:
    """An OOD set: `count` images of the shape of `images`.

    Args:
      name: a key of `SETS`.
      images: at least one.
      labels: their classes.
      count: number of images; 0: as many as `images`, but at least 100. Images are then used more
        than once.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    count = count or max(_COUNT[0], len(images))
    rounds = -(-count // len(images))
    rows = np.concatenate([rng.permutation(len(images)) for _ in range(rounds)])[:count]
    return SETS[name](rng, images, labels, rows)


def rotated(rng: Rng, images: Images, labels: np.ndarray, rows: np.ndarray) -> Images:
    """Images turned by 90 or 270 degrees; by 180 degrees if they are not square."""
    square = images.shape[1] == images.shape[2]
    turns = rng.choice([1, 3] if square else [2], len(rows))
    return np.stack([np.rot90(images[i], turn) for i, turn in zip(rows, turns, strict=True)])


def jigsaw(rng: Rng, images: Images, labels: np.ndarray, rows: np.ndarray) -> Images:
    """Images whose quadrants are permuted; the middle line of an odd side stays."""
    h, w = (side // 2 for side in images.shape[1:3])
    bottom, right = images.shape[1] - h, images.shape[2] - w
    corners = [np.s_[y : y + h, x : x + w] for y in (0, bottom) for x in (0, right)]
    moved = images[rows]
    for image, row, order in zip(
        moved, rows, rng.integers(len(_ORDERS), size=len(rows)), strict=True
    ):
        for corner, source in zip(corners, _ORDERS[order], strict=True):
            image[corner] = images[row][corners[source]]
    return moved


def blended(rng: Rng, images: Images, labels: np.ndarray, rows: np.ndarray) -> Images:
    """Means of two images of different classes; of any two if there is one class."""
    mixed = np.empty((len(rows), *images.shape[1:]), np.uint8)
    for place, row in enumerate(rows):
        others = np.flatnonzero(labels != labels[row])
        others = others if len(others) else np.flatnonzero(np.arange(len(images)) != row)
        other = rng.choice(others) if len(others) else row
        mixed[place] = (images[row].astype(np.uint16) + images[other] + 1) // 2
    return mixed


def noise(rng: Rng, images: Images, labels: np.ndarray, rows: np.ndarray) -> Images:
    """Smooth noise: 1 to 4 octaves of random grids, each with half the weight of the last.

    The first grid has 2 to 5 cells a side. Mean and contrast are random. In colour, half of the
    variance is common to the channels.
    """
    _, height, width, channels = images.shape
    colours = _colours(channels)
    fields = np.empty((len(rows), height, width, channels), np.uint8)
    for field in fields:
        cells, octaves = int(rng.integers(2, 6)), int(rng.integers(1, 5))
        planes = [_smooth(rng, height, width, cells, octaves) for _ in range(colours)]
        gray = planes[0] if colours == 1 else _smooth(rng, height, width, cells, octaves)
        values = np.stack([(gray + plane) / 2 for plane in planes], axis=-1)
        values = (values - values.mean()) / max(values.std(), 1e-9)
        values = rng.uniform(80, 176) + rng.uniform(20, 70) * values
        field[..., :colours] = np.clip(np.round(values), 0, 255)
        field[..., colours:] = 255
    return fields


def shapes(rng: Rng, images: Images, labels: np.ndarray, rows: np.ndarray) -> Images:
    """A polygon, an ellipse, its outline, or lines, in one colour on a background of another."""
    _, height, width, channels = images.shape
    colours = _colours(channels)
    drawn = np.full((len(rows), height, width, channels), 255, np.uint8)
    for place, image in enumerate(drawn):
        share = _figure(rng, height, width, place % 5)[..., None]
        # Half of the backgrounds are black; ink and background differ by at least 80 levels.
        back = rng.uniform(0, 255, colours) * (place // 5 % 2)
        ink = (back + rng.uniform(80, 175, colours)) % 255
        image[..., :colours] = np.round(back + share * (ink - back))
    return drawn


def _colours(channels: int) -> int:
    """Channels without the last one of an even number, which is opacity."""
    return channels - (channels % 2 == 0)


def _smooth(
    rng: Rng, height: int, width: int, cells: int, octaves: int
) -> Float[np.ndarray, "h w"]:
    field = np.zeros((height, width))
    for octave in range(octaves):
        side = min(cells * 2**octave, max(height, width)) + 1
        grid = Image.fromarray(rng.normal(size=(side, side)).astype(np.float32))
        smooth = grid.resize((width, height), Image.Resampling.BICUBIC)
        field += np.asarray(smooth, np.float64) * 0.5**octave
    return field


def _figure(rng: Rng, height: int, width: int, kind: int) -> Float[np.ndarray, "h w"]:
    """Share of every pixel that a figure covers; slivers are drawn again, at most ten times."""
    scale = max(1, min(8, _CANVAS // max(height, width)))
    size = np.array([width * scale, height * scale])
    for _ in range(10):
        canvas = Image.new("L", tuple(size.tolist()))
        _draw(rng, ImageDraw.Draw(canvas), size, kind)
        share = np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255
        if share.mean() > 0.025:
            break
    return share


def _draw(rng: Rng, draw: ImageDraw.ImageDraw, size: Int[np.ndarray, " 2"], kind: int) -> None:
    line = max(1, int(rng.uniform(0.035, 0.1) * min(size)))
    if kind < 2:  # a star-shaped polygon around the middle, filled or not
        corners = int(rng.integers(3, 8))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        radii = rng.uniform(0.18, 0.46, corners) * min(size)
        around = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
        points = [tuple(p) for p in (size * rng.uniform(0.43, 0.57, 2) + around).tolist()]
        if kind == 0:
            draw.polygon(points, fill=255)
        else:
            draw.line([*points, *points[:2]], fill=255, width=line, joint="curve")
    elif kind < 4:
        low, high = np.sort(rng.uniform(0.07, 0.93, (2, 2)), axis=0)
        box = (*(low * size), *(np.maximum(high, low + 0.28) * size))
        draw.ellipse(box, fill=255 if kind == 2 else None, outline=255, width=line)
    else:
        for _ in range(rng.integers(2, 6)):
            ends = rng.uniform(0.07, 0.93, (2, 2)) * size
            draw.line(ends.ravel().tolist(), fill=255, width=line)


SETS = {
    "made_rotated": rotated,
    "made_jigsaw": jigsaw,
    "made_blended": blended,
    "made_noise": noise,
    "made_shapes": shapes,
}
