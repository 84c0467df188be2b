"""Words for ImageNet's class names, which are WordNet's ids.

The generator's prompts and token embeddings want a word for each class. CIFAR's class names are
words; ImageNet's are ids such as n01440764 in its directories, in TFDS and in OpenOOD's lists.

Source of the ids: ILSVRC 2012 (sorted, which is the order of the labels everywhere). Of the names:
torchvision 0.29, `torchvision.models._meta` (BSD 3-Clause, Copyright (c) Soumith Chintala 2016),
one for each id, all different; they are WordNet's lemmas, two of them told apart by hand.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from oal_jax.config.class_names import IMAGENET

_ID = re.compile(r"n\d{8}")


def words(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as prompts can say them: ImageNet's words in place of its ids."""
    return tuple(IMAGENET.get(name, name) for name in names)


def of_list(path: Path, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """The words of classes whose images lie in folders called by ImageNet's ids, in a list.

    OpenOOD's train list of ImageNet-200 is so: "imagenet_1k/train/n01443537/n01443537_1.JPEG 0".
    `otherwise` where that has names already, there is no list, or not one id a class.
    """
    if not otherwise[0].startswith("class ") or not path.is_file():
        return otherwise
    return _of_list(path, path.stat().st_mtime_ns, len(otherwise)) or otherwise


@functools.cache
def _of_list(path: Path, changed: int, classes: int) -> tuple[str, ...] | None:
    found: dict[str, set[str]] = {str(label): set() for label in range(classes)}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            image, _, label = line.strip().rpartition(" ")
            if label in found:
                found[label].update(_ID.findall(image)[:1])
    if any(len(ids) != 1 or not ids <= IMAGENET.keys() for ids in found.values()):
        return None
    return tuple(IMAGENET[id_] for ids in found.values() for id_ in ids)
