"""Image sets of random patterns, for smoke runs of configs whose data are not there.

A class is a coarse random pattern; its images are that pattern in another brightness, with noise.
Each image of an OOD set is a pattern of its own. The classes are those of the ID set that the
generated one stands for; ImageNet has its first twenty.
"""

import zlib

import numpy as np
from jaxtyping import Float, Int32, UInt8

from oal_jax.config.class_names import generated_names

SIZE = 32  # default side in pixels
_CELLS = 4  # cells of a pattern, a side
PER_CLASS = 10  # default number of images of a class in a split


def draw(
    name: str, split: str, *, id_set: str, labelled: bool, limit: int = 0, size: int = 0
) -> tuple[UInt8[np.ndarray, "n s s 3"], Int32[np.ndarray, " n"], tuple[str, ...]]:
    """Images, labels and class names of a split, the classes in turn. Deterministic.

    Args:
      labelled: the images are of the ID classes; otherwise all labels are 0, "ood".
      limit: number of images; 0: `PER_CLASS` a class.
      size: side of the images; 0: `SIZE`.
    """
    known, size = generated_names(id_set), size or SIZE
    count = limit or PER_CLASS * len(known)
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
    return np.rint(255 * images.clip(0, 1)).astype(np.uint8), labels.astype(np.int32), known


def _enlarged(coarse: Float[np.ndarray, "n k k 3"], size: int) -> Float[np.ndarray, "n s s 3"]:
    cells = np.arange(size) * _CELLS // size
    return coarse[:, cells][:, :, cells]
