"""Image sets of the package, of TFDS, of OpenOOD's lists, of folders, and generated ones.

The first two are TFDS data sets in array_record format, which reads back without TensorFlow. Lists
and folders hold image files. `load` reads a split into memory; `open_source` leaves it on disk, for
`oal_jax.data.stream`.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8

from oal_jax.config.class_names import generated_names
from oal_jax.data import bundled, corruptions, folders, generated, made, openood, own, tfds
from oal_jax.data.leave_out import relabelled
from oal_jax.data.stored import SetSpec, Source, Subset, read_all, select


class Chunk(NamedTuple):
    """Consecutive images of a set."""

    images: UInt8[np.ndarray, "b h w c"]
    labels: Int32[np.ndarray, " b"]


class ImageSet(NamedTuple):
    """One split of an image set, in memory.

    Attributes:
      name: "SET/SPLIT", for messages.
      images: (n, h, w, c) uint8, gray levels 0 to 255.
      labels: (n,) int32 in [0, len(class_names)).
      class_names: what each label means.
    """

    name: str
    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]

    @property
    def examples(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    def chunks(self, size: int, rows: Int[np.ndarray, " m"] | None = None) -> Iterator[Chunk]:
        """All images in order, or those of `rows`, `size` at a time; the last chunk is the rest."""
        for start in range(0, len(self.images) if rows is None else len(rows), size):
            part = slice(start, start + size)
            part = part if rows is None else rows[part]
            yield Chunk(self.images[part], self.labels[part])


def load(source: str, name: str, split: str, **options) -> ImageSet:
    """One split of an image set, in memory: `read_set` of `SetSpec(source, name, split, ...)`."""
    return read_set(SetSpec(source, name, split, **options))


def read_set(spec: SetSpec) -> ImageSet:
    """One split of an image set, in memory.

    Raises:
      UserError: the set or split is missing or damaged, or has no class of a name in `leave_out`.
    """
    if spec.name in made.SETS:
        return _made(spec)
    if spec.source == "generated":
        return _generate(spec)
    if spec.source == "bundled" and spec.name in corruptions.SETS:
        clean = read_set(dataclasses.replace(spec, name=corruptions.SETS[spec.name].base))
        return clean._replace(name=spec.where, images=corruptions.corrupt(spec.name, clean.images))
    source = open_source(spec)
    return ImageSet(source.name, *read_all(source), source.class_names)


def open_source(spec: SetSpec) -> Source:
    """One split of an image set, on disk. Decodes no image. Not of generated or made sets.

    Raises:
      UserError: as `read_set`.
    """
    if spec.source == "bundled":
        directory = bundled.verified_directory(spec.name, spec.root)
        return select(tfds.open_bundled(directory, spec, bundled.REMEDY), spec)
    opener = {
        "tfds": tfds.open_split,
        "imglist": openood.open_list,
        "folder": folders.open_folder,
        "own": own.open_own,
    }
    return select(opener[spec.source](spec), spec)


def _made(spec: SetSpec) -> ImageSet:
    """An OOD set made from a split of the ID set. Reads no more images than it uses."""
    known = dataclasses.replace(spec, name=spec.id_set, labelled=True, limit=0)
    if spec.source == "generated":
        _, images, labels, _ = read_set(known)
        rows = made.base_rows(len(images), images.shape[1:], spec.limit)
        images, labels = images[rows], labels[rows]
    else:
        source = open_source(known)
        source.remarks = None  # the ID set's own line has them
        rows = made.base_rows(len(source), source.image_shape(), spec.limit)
        images, labels = read_all(Subset(source, rows, source.class_names))
    images = made.make(spec.name, images, labels)
    return ImageSet(spec.where, images, np.zeros(len(images), np.int32), ("ood",))


def _generate(spec: SetSpec) -> ImageSet:
    options = {"id_set": spec.id_set, "labelled": spec.labelled, "size": spec.image_size}
    if not spec.leave_out:
        arrays = generated.draw(spec.name, spec.split, limit=spec.limit, **options)
        return ImageSet(spec.where, *arrays)
    whole = generated_names(spec.id_set)
    table, names = relabelled(whole, spec.leave_out, spec.left_out)
    # The classes come in turn: enough rounds hold `limit` images of those that are selected.
    rounds = -(-spec.limit // int(np.sum(table >= 0)))
    images, labels, _ = generated.draw(spec.name, spec.split, limit=rounds * len(whole), **options)
    rows = np.flatnonzero(table[labels] >= 0)[: spec.limit or None]
    return ImageSet(spec.where, images[rows], table[labels[rows]], names)
