"""Image sets of random patterns, for smoke runs of configs whose data are not there.

A class is a coarse random pattern; its images are that pattern in another brightness, with noise.
Images of OOD sets are patterns of their own. Names and numbers of classes are those of the ID set
that they stand for, of ImageNet the first twenty.
"""

import zlib

import numpy as np
from jaxtyping import Float, Int, UInt8

from oal_jax.config.class_names import generated_names

SIZE = 32  # pixels a side, where nothing else is asked for
_CELLS = 4  # of a pattern, a side
_PER_CLASS = 10  # images of a split, where no number is asked for


def draw(
    name: str, split: str, *, id_set: str, labelled: bool, limit: int = 0, size: int = 0
) -> tuple[UInt8[np.ndarray, "n s s 3"], Int[np.ndarray, " n"], tuple[str, ...]]:
    """Images, labels and class names of a split, the classes in turn; the same ones every time.

    Args:
      labelled: whether the images are of the ID classes; else all labels are 0, "ood".
      limit: number of images; 0: ten a class.
      size: side of the images; 0: `SIZE`.
    """
    known, size = generated_names(id_set), size or SIZE
    count = limit or _PER_CLASS * len(known)
    rng = np.random.default_rng(zlib.crc32(f"{name}/{split}".encode()))
    labels = np.arange(count) % len(known)
    if labelled:
        patterns = np.random.default_rng(zlib.crc32(id_set.encode()))
        coarse = patterns.uniform(size=(len(known), _CELLS, _CELLS, 3))[labels]
    else:
        labels, known = np.zeros_like(labels), ("ood",)
        coarse = rng.uniform(size=(count, _CELLS, _CELLS, 3))
    images = _enlarged(coarse, size) * rng.uniform(0.6, 1, (count, 1, 1, 1))
    images += rng.normal(0, 0.05, images.shape)
    return np.rint(255 * images.clip(0, 1)).astype(np.uint8), labels, known


def _enlarged(coarse: Float[np.ndarray, "n k k 3"], size: int) -> Float[np.ndarray, "n s s 3"]:
    cells = np.arange(size) * _CELLS // size
    return coarse[:, cells][:, :, cells]
