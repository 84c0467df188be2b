"""Classes left out of an ID set: without them it is a smaller one, and they are near-OOD for it.

Leaving out one class after another gives as many near-OOD problems as there are classes, on which a
method can be chosen and compared without the benchmark's own near-OOD sets.
"""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from oal_jax.data.stored import Encoded, Encodings, Stored, first_of_each
from oal_jax.errors import UserError

_FEWEST = 2  # classes that must remain


class Relabelled(NamedTuple):
    """Which classes of a set are wanted, and as what.

    Attributes:
      table: the new label of each class, -1 where its images are not wanted.
      class_names: what each new label means.
    """

    table: Int32[np.ndarray, " k"]
    class_names: tuple[str, ...]


def relabelled(
    class_names: Sequence[str], leave_out: Sequence[str], left_out: bool = False
) -> Relabelled:
    """The classes that remain, in their order; or those that are left out, all as 0, "ood".

    Args:
      class_names: of the whole ID set.
      leave_out: some of them; "a,b" is two, as a flag hands them over.
      left_out: the classes that are left out are wanted, not those that remain.

    Raises:
      UserError: a name that no class has, or fewer than two classes remain.
    """
    given = [n for entry in leave_out for n in _names(entry, class_names)]
    for name in given:
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, n=1, cutoff=0.0)
            raise UserError(
                f"config data.leave_out names '{name}', which is no class of the ID set; nearest:"
                f" '{near[0]}'"
            )
    kept = [name for name in class_names if name not in given]
    if len(kept) < _FEWEST:
        raise UserError(
            f"config data.leave_out leaves {len(kept)} of the {len(class_names)} classes of the ID"
            f" set; leave at least {_FEWEST}"
        )
    new = {name: 0 for name in given} if left_out else {n: i for i, n in enumerate(kept)}
    table = np.array([new.get(name, -1) for name in class_names], np.int32)
    return Relabelled(table, ("ood",) if left_out else tuple(kept))


def _names(entry: str, class_names: Sequence[str]) -> list[str]:
    return [entry] if entry in class_names else [part.strip() for part in entry.split(",")]


def kept_labels(class_names: Sequence[str], leave_out: Sequence[str]) -> Int[np.ndarray, " c"]:
    """The labels, in the whole set, of the classes that remain.

    Raises:
      UserError: as `relabelled`.
    """
    return np.flatnonzero(relabelled(class_names, leave_out).table >= 0)


class Part:
    """Some images of a set under other labels, as `oal_jax.data.stored.Encodings`.

    Args:
      encodings: the whole set.
      rows: which of its images.
      labels: of each of them.
    """

    def __init__(
        self,
        encodings: Encodings,
        rows: Int[np.ndarray, " n"],
        labels: Int32[np.ndarray, " n"],
    ):
        self._encodings, self._rows, self._labels = encodings, rows, labels

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self) -> Int32[np.ndarray, " n"]:
        """Of all images."""
        return self._labels

    def where(self, index: int) -> str:
        """The file of an image."""
        return self._encodings.where(int(self._rows[index]))

    def fetch(self, indices: Sequence[int]) -> list[Encoded]:
        """The bytes of these images and their labels."""
        found = self._encodings.fetch([int(self._rows[index]) for index in indices])
        return [
            Encoded(one.data, int(self._labels[index]))
            for one, index in zip(found, indices, strict=True)
        ]


def part_of(
    stored: Stored,
    leave_out: Sequence[str],
    left_out: bool = False,
    limit: int = 0,
    by_class: bool = False,
) -> Stored:
    """A split of an ID set, or of a covariate-shifted one, without the classes that are left out.

    The labels of the whole set are read for it: of TFDS records, the records.

    Args:
      stored: the whole split, with labels.
      leave_out: as for `relabelled`; so is the next.
      left_out: the images of these classes in place of the others.
      limit: only so many images; 0: all.
      by_class: these are as many of each class; else the first ones.

    Raises:
      UserError: as `relabelled`; no image is of a wanted class.
    """
    table, names = relabelled(stored.class_names, leave_out, left_out)
    labels = np.asarray(stored.encodings.labels())
    known = (labels >= 0) & (labels < len(table))
    # What is out of range stays so, for the reader of the image to complain of.
    out_of_range = np.where(labels < 0, labels, len(table))
    labels = np.where(known, table[np.where(known, labels, 0)], out_of_range).astype(np.int32)
    rows = np.flatnonzero((labels >= 0) | ~known)
    if not len(rows):
        raise UserError(
            f"{stored.name} has no image of the classes that config data.leave_out="
            f"{','.join(leave_out)} {'names' if left_out else 'leaves'}"
        )
    if limit:
        rows = rows[first_of_each(labels[rows], limit)] if by_class else rows[:limit]
    part = Part(stored.encodings, rows, labels[rows])
    return stored._replace(encodings=part, class_names=names)
