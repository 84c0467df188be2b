"""TFDS image sets in array_record format, read without TensorFlow.

    tfds build NAME --file_format=array_record --data_dir=ROOT   # needs TensorFlow, once

makes ROOT/NAME/[CONFIG/]VERSION. Any set with an image and a class an example will do: the features
are found by their types; where there are several of a type, those called "image" and "label" are
taken. Images become those of the ID set: its channels, and its size where that is one size
(`data.image_size` otherwise), as `oal_jax.data.stored.resize_and_crop` does it.

A set is given as NAME, NAME/CONFIG, NAME:VERSION (else the highest), and with a split of its own as
NAME@SPLIT, in TFDS's notation, such as "imagenet_v2@test[:1000]". `data.id_splits` says which
splits of the ID set are for training, validation and test.
"""

import contextlib
import difflib
import itertools
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from oal_jax.data import manifest
from oal_jax.data.stored import Encoded, Fit, Stored, check_on_corrupt
from oal_jax.errors import UserError

_TASK = 256  # records read at once
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# OpenOOD's names of sets, which the benchmarks use, that TFDS has under another one.
_TFDS_NAMES = {
    "svhn": "svhn_cropped",
    "texture": "dtd",
    "textures": "dtd",
    "places365": "places365_small",
    "imagenet": "imagenet2012",
}
_LARGE = "imagenet2012"  # evaluated on the central part: 224 of 256


class Opened(NamedTuple):
    """A prepared set: its directory, TFDS's description of it, and how to get it anew.

    Attributes:
      image: name of the feature that is the image.
      label: name of the feature that is its class; None: it has none.
      shape: (height, width, channels) of the images, None where they vary.
      class_names: what each label means.
    """

    directory: Path
    builder: Any
    remedy: str
    image: str
    label: str | None
    shape: tuple[int | None, int | None, int | None]
    class_names: tuple[str, ...]


class Records:
    """The examples of a split, as `oal_jax.data.stored.Encodings`.

    Args:
      opened: the set.
      split: in TFDS's notation.
      limit: only the first so many; 0: all.
      labelled: whether labels are read; else all are 0.

    Raises:
      UserError: no such split, no examples in it, or a file format that needs TensorFlow.
    """

    def __init__(self, opened: Opened, split: str, limit: int, labelled: bool):
        self._records = _records(opened, split)
        self._count = min(limit or len(self._records), len(self._records))
        self._image, self._label = opened.image, opened.label if labelled else None
        files = opened.builder.info.splits[split].file_instructions
        self._files = [file.filename for file in files]
        self._skipped = [file.skip for file in files]
        self._starts = [0, *itertools.accumulate(file.take for file in files)]
        self._damage = f"{opened.directory} is damaged", opened.remedy

    def __len__(self) -> int:
        return self._count

    def labels(self) -> Int32[np.ndarray, " n"]:
        """Of all examples, which are read for it."""
        if not self._label:
            return np.zeros(self._count, np.int32)
        parts = [range(i, min(i + _TASK, self._count)) for i in range(0, self._count, _TASK)]
        labels = [encoded.label for part in parts for encoded in self.fetch(part)]
        return np.array(labels, np.int32)

    def where(self, index: int) -> str:
        """The record of an image."""
        file = bisect_right(self._starts, index) - 1
        number = index - self._starts[file] + self._skipped[file]
        return f"record {number} of {self._files[file]}"

    def fetch(self, indices: Sequence[int]) -> list[Encoded]:
        """The bytes of these images and their labels.

        Raises:
          UserError: a record can't be read.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            with _no_group_size_error():
                records = self._records.__getitems__(list(indices))
            return [self._encoded(tf_example_pb2.Example.FromString(r)) for r in records]
        except Exception as error:  # of array_record's C++ or of protobuf
            what, remedy = self._damage
            raise UserError(f"{what} ({_first_line(error)}): {remedy}") from error

    def _encoded(self, example: Any) -> Encoded:
        features = example.features.feature
        label = features[self._label].int64_list.value[0] if self._label else 0
        return Encoded(features[self._image].bytes_list.value[0], label)


def open_bundled(directory: Path, name: str, split: str, limit: int, remedy: str) -> Stored:
    """The split of an embedded set: its images as they are, its labels its own.

    Raises:
      UserError: the directory is damaged, or there is no such split.
    """
    opened = _open(directory, name, remedy)
    fit = _fit(name, opened, opened, 0)
    records = Records(opened, _known_split(opened, name, split), limit, True)
    return Stored(f"{name}/{split}", records, opened.class_names, fit, "error")


def open_split(
    name: str,
    split: str,
    *,
    root: str | None,
    limit: int,
    id_set: str,
    id_splits: Sequence[str],
    labelled: bool,
    image_size: int,
    on_corrupt: str,
) -> Stored:
    """The split of a set that `tfds build` has prepared below `root`.

    Args:
      id_splits: splits of the ID set for "train", "validation" and "test"; empty: of these names.
      labelled: whether the labels are classes of the ID set; else they are all 0, "ood".
      The others are those of `oal_jax.data.sources.load`.

    Raises:
      UserError: no such set or split, a set that is damaged, that has no image or class, or other
        classes than the ID set; a file that a manifest has not, or has otherwise.
    """
    check_on_corrupt(on_corrupt)
    plain, _, own = name.partition("@")
    opened = _verified(plain, root)
    if own:
        where, split = name, own
    else:
        where = f"{name}/{split}"
        if name == id_set and id_splits:
            split = dict(zip(("train", "validation", "test"), id_splits, strict=True))[split]
    split = _known_split(opened, name, split)
    id_opened = opened
    if name != id_set:
        id_opened = _find(id_set.partition("@")[0], root)
    if labelled:
        _check_classes(name, opened, id_set, id_opened)
    return Stored(
        where,
        Records(opened, split, limit, labelled),
        opened.class_names if labelled else ("ood",),
        _fit(id_set, id_opened, opened, image_size),
        on_corrupt,
    )


def _fit(id_set: str, id_opened: Opened, opened: Opened, image_size: int) -> Fit:
    """What makes images those of the ID set."""
    height, width, channels = id_opened.shape
    mode = _MODES[channels or 3]
    if not image_size:
        if opened.shape[:2] == (height, width) or height is None or height != width:
            own = opened.shape[:2]
            return Fit(mode, None, None if None in own else own)
        return Fit(mode, (height, height))
    large = re.split("[/:@]", _TFDS_NAMES.get(id_set, id_set))[0] == _LARGE
    return Fit(mode, (image_size * 256 // 224 if large else image_size, image_size))


def _check_classes(name: str, opened: Opened, id_set: str, id_opened: Opened) -> None:
    if opened.label is None:
        raise UserError(
            f"{opened.directory} has no feature of type ClassLabel: '{name}' can be an OOD set only"
        )
    have, wanted = len(opened.class_names), len(id_opened.class_names)
    if have != wanted:
        raise UserError(f"image set '{name}' has {have} classes, the ID set '{id_set}' {wanted}")


def _verified(name: str, root: str | None) -> Opened:
    """The set, its files compared with the manifest where there is one."""
    opened = _find(name, root)
    base = sets_root(root)
    known = manifest.find(opened.directory, base)
    if known is not None:
        found = [path for path in opened.directory.iterdir() if not path.name.startswith(".")]
        known.check_names(opened.directory, found)
        for path in sorted(found):
            if path.name != manifest.NAME:
                known.check(path)
    return opened


def sets_root(root: str | None) -> Path:
    """The directory of all sets; None: TFDS's own default."""
    from tensorflow_datasets.core import constants

    return Path(root or constants.DATA_DIR).expanduser()


def _find(name: str, root: str | None) -> Opened:
    """The set in ROOT/NAME[/CONFIG]/VERSION: the highest version unless the name gives one."""
    plain, _, version = name.partition(":")
    plain = _TFDS_NAMES.get(plain, plain)
    where = "" if root is None else f" --data_dir={root}"
    spelled = f"{plain}:{version}" if version else plain
    remedy = f"run tfds build {spelled} --file_format=array_record{where}"
    folder = sets_root(root) / plain
    found = _versions(folder)
    configs = sorted({p.parent.parent.name for p in folder.glob("*/*/dataset_info.json")})
    if not found and len(configs) == 1:  # TFDS's default configuration
        found = _versions(folder / configs[0])
    if not found or (version and version not in found):
        held = f", only {', '.join(sorted(found) or configs)}" if found or configs else ""
        missing = f"no prepared TFDS set {name!r} in {folder}{held}"
        raise UserError(f"{missing}: {_supply(plain, remedy, folder)}")
    chosen = version or max(found, key=lambda v: tuple(map(int, v.split("."))))
    return _open(found[chosen], name, remedy)


def _versions(folder: Path) -> dict[str, Path]:
    found = (path.parent for path in folder.glob("*/dataset_info.json"))
    return {path.name: path for path in found if _VERSION.fullmatch(path.name)}


def _supply(plain: str, remedy: str, folder: Path) -> str:
    """What would supply a set: TFDS, if it has one of this name, or one's own preparation."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if plain.partition("/")[0] in known:
        return remedy
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)[0]
    return (
        f"TFDS has none of that name (nearest: '{near}'); prepare your own in {folder}/VERSION, or"
        " name other sets as data.near, data.far, data.validation and data.csid"
    )


def _open(directory: Path, name: str, remedy: str) -> Opened:
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    try:
        builder = tfds.builder_from_directory(directory)
        features = dict(builder.info.features.items())
    except (OSError, ValueError, AttributeError, json_format.Error) as error:
        raise UserError(f"{directory} is damaged ({_first_line(error)}): {remedy}") from error
    image = _feature(features, tfds.features.Image, "image", directory)
    label = _feature(features, tfds.features.ClassLabel, "label", directory)
    if image is None:
        raise UserError(f"{directory} has features {sorted(features)}: one must be an Image")
    kind = features[image].np_dtype
    shape = features[image].shape
    if kind != "uint8" or shape[2] not in (None, *_MODES):
        raise UserError(
            f"images in {directory} are {kind} with {shape[2]} channels: image sets need uint8"
            " with 1, 3 or 4"
        )
    names = tuple(features[label].names or ()) if label else ()
    return Opened(directory, builder, remedy, image, label, shape, names)


def _feature(features: dict[str, Any], kind: type, usual: str, directory: Path) -> str | None:
    """The name of the feature of this type: the only one, or of several the one usually called."""
    found = sorted(name for name, feature in features.items() if type(feature) is kind)
    if len(found) > 1 and usual not in found:
        raise UserError(
            f"{directory} has several features of type {kind.__name__} ({', '.join(found)}), none"
            f" of them called '{usual}'"
        )
    return usual if usual in found else next(iter(found), None)


def _known_split(opened: Opened, name: str, split: str) -> str:
    """The split, if the set has what it names."""
    splits = opened.builder.info.splits
    if not set(re.findall(r"(?:^|\+)\s*(\w+)", split)) <= set(splits):
        raise UserError(
            f"image set {name!r} has no split {split!r}: choose one of"
            f" {', '.join(sorted(splits)) or 'none'}; data.id_splits chooses those of the ID set,"
            " NAME@SPLIT that of another"
        )
    try:
        splits[split]
    except Exception as error:  # TFDS's parser of slices raises several kinds
        raise UserError(f"split {split!r} of {name!r}: {_first_line(error)}") from error
    return split


def _records(opened: Opened, split: str) -> Any:
    """The serialized examples, by number."""
    if not opened.builder.info.splits[split].num_examples:
        raise UserError(f"split {split} of {opened.directory} holds no images: choose another")
    try:
        return opened.builder.as_data_source(split).data_source
    except NotImplementedError as error:
        kept = opened.builder.info.file_format.value
        raise UserError(
            f"{opened.directory} is stored as {kept}, which needs TensorFlow to read:"
            f" {opened.remedy}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        what = f"{opened.directory} is damaged ({_first_line(error)})"
        raise UserError(f"{what}: {opened.remedy}") from error


@contextlib.contextmanager
def _no_group_size_error() -> Iterator[None]:
    """Silences array_record's logged error about files with groups of more than one record.

    The embedded files are grouped because that makes them a third smaller. Groups slow down random
    access; those are read in order.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "was created with group size" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
