"""Words for ImageNet's class names, which are WordNet's ids.

The generator's prompts and token embeddings need a word for each class. CIFAR's class names are
words; ImageNet's are ids such as n01440764 in its directories, in TFDS and in OpenOOD's lists.

The ids are those of ILSVRC 2012, sorted, which is the order of the labels everywhere. The names are
from torchvision 0.29, `torchvision.models._meta` (BSD 3-Clause, Copyright (c) Soumith Chintala
2016): one WordNet lemma an id, all different because two were changed by hand.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from oal_jax.config.class_names import IMAGENET

_ID = re.compile(r"n\d{8}")


def words(names: Sequence[str]) -> tuple[str, ...]:
    """Class names for prompts: ImageNet's words in place of its ids."""
    return tuple(IMAGENET.get(name, name) for name in names)


def of_list(path: Path, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """Words of the classes of a list whose images lie in folders named by ImageNet's ids.

    OpenOOD's train list of ImageNet-200 has lines such as
    "imagenet_1k/train/n01443537/n01443537_1.JPEG 0". Returns `otherwise` if that holds real names,
    if there is no list, or if the list has not one id a class.
    """
    if not otherwise[0].startswith("class ") or not path.is_file():
        return otherwise
    return _of_list(path, path.stat().st_mtime_ns, len(otherwise)) or otherwise


@functools.cache
def _of_list(path: Path, changed: int, classes: int) -> tuple[str, ...] | None:
    ids_of: dict[str, set[str]] = {str(label): set() for label in range(classes)}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            image, _, label = line.strip().rpartition(" ")
            if label in ids_of:
                ids_of[label].update(_ID.findall(image)[:1])
    if any(len(ids) != 1 or not ids <= IMAGENET.keys() for ids in ids_of.values()):
        return None
    return tuple(IMAGENET[id_] for ids in ids_of.values() for id_ in ids)
