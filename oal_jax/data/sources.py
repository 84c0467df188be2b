"""Image sets: of the package, of TFDS, of OpenOOD's lists, of folders.

The first two are TFDS data sets in a format that reads back without TensorFlow (array_record). The
others are image files. `load` reads a split into memory; `open_stored` leaves it on disk, for
`oal_jax.data.stream`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8

from oal_jax.config.class_names import generated_names
from oal_jax.data import bundled, corruptions, generated, openood, tfds
from oal_jax.data import leave_out as classes
from oal_jax.data.stored import Stored, read_all
from oal_jax.errors import UserError

SOURCES = ("bundled", "tfds", "imglist", "folder", "generated")


class Chunk(NamedTuple):
    """Consecutive images of a set."""

    images: UInt8[np.ndarray, "b h w c"]
    labels: Int32[np.ndarray, " b"]


class ImageSet(NamedTuple):
    """One split of an image set.

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
        """All images in order, or those of `rows`, `size` at a time; the last may be fewer."""
        for start in range(0, len(self.images) if rows is None else len(rows), size):
            part = slice(start, start + size)
            part = part if rows is None else rows[part]
            yield Chunk(self.images[part], self.labels[part])


def load(source: str, name: str, split: str, *, limit: int = 0, **options) -> ImageSet:
    """Reads one split of an image set into memory.

    Args:
      source: "bundled" may also be a corrupted copy (see `oal_jax.data.corruptions`); "generated"
        needs no files (see `oal_jax.data.generated`).
      The rest is as for `open_stored`.

    Raises:
      UserError: the set or split is not there, is damaged, or breaks what `ImageSet` promises.
    """
    if limit < 0:
        raise UserError(f"limit for image set {name!r} is {limit}: give 0 (all) or more")
    if source == "bundled" and name in corruptions.SETS:
        clean = load(source, corruptions.SETS[name].base, split, limit=limit, **options)
        shifted = corruptions.corrupt(name, clean.images)
        return clean._replace(name=f"{name}/{split}", images=shifted)
    if source == "generated":
        return _generated(name, split, limit, **options)
    stored = open_stored(source, name, split, limit=limit, **options)
    return validated(stored.name, *read_all(stored), stored.class_names)


def _generated(
    name: str,
    split: str,
    limit: int,
    id_set: str = "",
    labelled: bool = True,
    image_size: int = 0,
    leave_out: Sequence[str] = (),
    left_out: bool = False,
    **_,
) -> ImageSet:
    def draw(count: int) -> ImageSet:
        drawn = generated.draw(
            name, split, id_set=id_set or name, labelled=labelled, limit=count, size=image_size
        )
        return validated(f"{name}/{split}", *drawn)

    if not leave_out:
        return draw(limit)
    whole = generated_names(id_set or name)
    table, names = classes.relabelled(whole, leave_out, left_out)
    # The classes come in turn: of so many images at least `limit` are wanted.
    data = draw(-(-limit // int(np.sum(table >= 0))) * len(whole))
    labels = table[data.labels]
    rows = np.flatnonzero(labels >= 0)[: limit or None]
    return data._replace(images=data.images[rows], labels=labels[rows], class_names=names)


def open_stored(
    source: str,
    name: str,
    split: str,
    *,
    limit: int = 0,
    leave_out: Sequence[str] = (),
    left_out: bool = False,
    **options,
) -> Stored:
    """One split of an image set on disk; no image is decoded yet.

    Args:
      source: "bundled" (the sets that come with the package, see `oal_jax.data.bundled`), "tfds"
        (prepared once with `tfds build`, see `oal_jax.data.tfds`), "imglist" (OpenOOD's
        lists) or "folder" (a folder a class), for both of which `oal_jax.data.openood` says what
        `root` must hold.
      name: the set; for "tfds" also NAME/CONFIG, NAME:VERSION, NAME@SPLIT.
      split: such as "train", "validation" or "test".
      limit: only so many images; 0 for all. The first ones of "bundled" and "tfds"; of image files,
        which lie class by class, as many of each class.
      leave_out: of a labelled set: classes that are taken out of it, see `oal_jax.data.leave_out`.
      left_out: those classes are taken, as an OOD set, not the others.
      options: `root`: where the sets are; None for the package, or for TFDS's own default
        directory. And what `_open_whole` says.

    Raises:
      UserError: the set or split is not there, or is damaged; there is no such class.
    """
    if not leave_out:
        return _open_whole(source, name, split, limit=limit, **options)
    whole = _open_whole(source, name, split, limit=0, **options)
    files = source in ("imglist", "folder")
    return classes.part_of(whole, leave_out, left_out, limit, by_class=files)


def _open_whole(
    source: str,
    name: str,
    split: str,
    *,
    root: str | None = None,
    limit: int = 0,
    id_set: str = "",
    id_splits: Sequence[str] = (),
    labelled: bool = True,
    image_size: int = 0,
    on_corrupt: str = "error",
) -> Stored:
    """`open_stored` of all classes.

    Args:
      id_set: the ID set that this set is used with; empty: it is the ID set. Not of "bundled", nor
        are those below.
      id_splits: of "tfds": what the ID set's train, validation and test splits are called.
      labelled: whether the labels are classes of the ID set, as those of the ID set itself and of
        covariate-shifted sets are. Else all are 0, of the class "ood".
      image_size: the side that images get; 0 for the source's default.
      on_corrupt: "error", or "skip" to leave damaged images out.
    """
    id_set = id_set or name
    if source == "bundled":
        directory = bundled.verified_directory(name, root)
        return tfds.open_bundled(directory, name, split, limit, bundled.REMEDY)
    if source == "tfds":
        return tfds.open_split(
            name,
            split,
            root=root,
            limit=limit,
            id_set=id_set,
            id_splits=id_splits,
            labelled=labelled,
            image_size=image_size,
            on_corrupt=on_corrupt,
        )
    if source not in SOURCES:
        raise UserError(f"unknown image source {source!r}: choose one of {', '.join(SOURCES)}")
    wanted = openood.Wanted(
        *(root or "", id_set, name, split, labelled, limit, image_size, on_corrupt)
    )
    return openood.open_list(wanted) if source == "imglist" else openood.open_folder(wanted)


def validated(
    name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]
) -> ImageSet:
    """An `ImageSet` of these arrays.

    Raises:
      UserError: the arrays are not as `ImageSet` says; the message names the set and the value.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"images of {name} are {images.dtype} of shape {images.shape}: "
            "give uint8 of shape (n, height, width, channels)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels of {name} are {labels.dtype} of shape {labels.shape}: "
            f"give one integer for each of the {len(images)} images"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if wrong.size:
        raise UserError(
            f"label {labels[wrong[0]]} of image {wrong[0]} of {name} is out of range: "
            f"its {len(class_names)} classes need labels 0 to {len(class_names) - 1}"
        )
    return ImageSet(name, images, labels.astype(np.int32), class_names)
