"""TFDS image sets in array_record format, read without TensorFlow.

    tfds build NAME --file_format=array_record --data_dir=ROOT   # needs TensorFlow, once

makes ROOT/NAME/[CONFIG/]VERSION. The set needs an image an example, and a class to be an ID set.
These features are recognised by their types; of several of a type, the ones called "image" and
"label" are used. Images become like those of the ID set: its channels, and its size if all its
images have one (`data.image_size` otherwise).

A set is named NAME, NAME/CONFIG or NAME:VERSION (default: the highest), and NAME@SPLIT for a split
of its own in TFDS's notation, such as "imagenet_v2@test[:1000]". `data.id_splits` names the splits
of the ID set for training, validation and test.
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
from oal_jax.data.image_files import Decoding
from oal_jax.data.stored import SetSpec, Source
from oal_jax.errors import UserError

_TASK = 256  # records read at once
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# OpenOOD's names of sets, which the benchmarks use, to those of TFDS where they differ.
_TFDS_NAMES = {
    "svhn": "svhn_cropped",
    "texture": "dtd",
    "textures": "dtd",
    "places365": "places365_small",
    "imagenet": "imagenet2012",
}
_LARGE = "imagenet2012"  # evaluated on the central part: 224 of 256


class _Prepared(NamedTuple):
    """A prepared set.

    Attributes:
      directory: its files.
      builder: TFDS's description of it.
      remedy: the command that prepares it; ends the messages about damage.
      image: name of the image feature.
      label: name of the class feature; None: there is none.
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


class TfdsSource(Source):
    """The examples of a split of a prepared set.

    Args:
      prepared: the set.
      split: in TFDS's notation.
      labelled: read the labels; otherwise all are 0, "ood".
      name, decoding, on_corrupt: as for `Source`.

    Raises:
      UserError: no such split, no examples in it, or a file format that needs TensorFlow.
    """

    def __init__(
        self,
        name: str,
        prepared: _Prepared,
        split: str,
        labelled: bool,
        decoding: Decoding,
        on_corrupt: str,
    ):
        class_names = prepared.class_names if labelled else ("ood",)
        size = prepared.shape[:2]
        stated = decoding.crop is None and None not in size
        super().__init__(name, class_names, decoding, on_corrupt, size=size if stated else None)
        self._records = _records(prepared, split)
        self._image, self._label = prepared.image, prepared.label if labelled else None
        files = prepared.builder.info.splits[split].file_instructions
        self._files = [file.filename for file in files]
        self._skipped = [file.skip for file in files]
        self._starts = [0, *itertools.accumulate(file.take for file in files)]
        self._damage = f"{prepared.directory} is damaged", prepared.remedy

    def __len__(self) -> int:
        return len(self._records)

    def labels(self, indices: Sequence[int] | None = None) -> Int32[np.ndarray, " n"]:
        """Labels of these examples, or of all. Reads their records but decodes no image."""
        indices = range(len(self)) if indices is None else indices
        if not self._label:
            return np.zeros(len(indices), np.int32)
        parts = [indices[i : i + _TASK] for i in range(0, len(indices), _TASK)]
        return np.array([label for part in parts for _, label in self.fetch(part)], np.int32)

    def where(self, index: int) -> str:
        """The record of an image."""
        file = bisect_right(self._starts, index) - 1
        number = index - self._starts[file] + self._skipped[file]
        return f"record {number} of {self._files[file]}"

    def fetch(self, indices: Sequence[int]) -> list[tuple[bytes, int]]:
        """Encoded images and their labels.

        Raises:
          UserError: a record can't be read.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            with _no_group_size_error():
                records = self._records.__getitems__(list(indices))
            return [self._parsed(tf_example_pb2.Example.FromString(r)) for r in records]
        except Exception as error:  # of array_record's C++ or of protobuf
            what, remedy = self._damage
            raise UserError(f"{what} ({_first_line(error)}): {remedy}") from error

    def _parsed(self, example: Any) -> tuple[bytes, int]:
        features = example.features.feature
        label = features[self._label].int64_list.value[0] if self._label else 0
        return features[self._image].bytes_list.value[0], label


def open_bundled(directory: Path, spec: SetSpec, remedy: str) -> Source:
    """The split of an embedded set. Its images keep their size and its labels are its own.

    Raises:
      UserError: the directory is damaged, or there is no such split.
    """
    prepared = _open(directory, spec.name, remedy)
    decoding = _decoding(spec, prepared, prepared)
    split = _known_split(prepared, spec.name, spec.split)
    return TfdsSource(spec.where, prepared, split, True, decoding, "error")


def open_split(spec: SetSpec) -> Source:
    """The whole split of a set that `tfds build` has prepared below `spec.root`.

    Raises:
      UserError: no such set or split; a damaged set; a set without images, or without the classes
        of the ID set; a file that is missing in a manifest or differs from it.
    """
    plain, _, own = spec.name.partition("@")
    prepared = _verified(plain, spec.root)
    where, split = spec.where, spec.split
    if own:
        where, split = spec.name, own
    elif spec.name == spec.id_set and spec.id_splits:
        split = dict(zip(("train", "validation", "test"), spec.id_splits, strict=True))[split]
    split = _known_split(prepared, spec.name, split)
    id_prepared = prepared
    if spec.name != spec.id_set:
        id_prepared = _find(spec.id_set.partition("@")[0], spec.root)
    if spec.labelled:
        _check_classes(spec.name, prepared, spec.id_set, id_prepared)
    decoding = _decoding(spec, id_prepared, prepared)
    return TfdsSource(where, prepared, split, spec.labelled, decoding, spec.on_corrupt)


def _decoding(spec: SetSpec, id_prepared: _Prepared, prepared: _Prepared) -> Decoding:
    """How images of `prepared` become like those of the ID set."""
    height, width, id_channels = id_prepared.shape
    channels, side = spec.channels or id_channels or 3, spec.image_size
    if side:
        large = re.split("[/:@]", _TFDS_NAMES.get(spec.id_set, spec.id_set))[0] == _LARGE
        return Decoding(channels, side * 256 // 224 if large else side, (side, side))
    if prepared.shape[:2] == (height, width) or height is None or width is None:
        return Decoding(channels)
    return Decoding.to_shape((height, width, channels))


def _check_classes(name: str, prepared: _Prepared, id_set: str, id_prepared: _Prepared) -> None:
    if prepared.label is None:
        raise UserError(
            f"{prepared.directory} has no feature of type ClassLabel: '{name}' can be an OOD set"
            " only"
        )
    classes, id_classes = len(prepared.class_names), len(id_prepared.class_names)
    if classes != id_classes:
        raise UserError(
            f"image set '{name}' has {classes} classes, the ID set '{id_set}' {id_classes}"
        )


def _verified(name: str, root: str | None) -> _Prepared:
    """The set, after a check of its files against a manifest, if there is one."""
    prepared = _find(name, root)
    known = manifest.find(prepared.directory, sets_root(root))
    if known is not None:
        files = [path for path in prepared.directory.iterdir() if not path.name.startswith(".")]
        known.check_names(prepared.directory, files)
        for path in sorted(files):
            if path.name != manifest.NAME:
                known.check(path)
    return prepared


def sets_root(root: str | None) -> Path:
    """The directory of all sets; empty or None: TFDS's own default."""
    from tensorflow_datasets.core import constants

    return Path(root or constants.DATA_DIR).expanduser()


def _find(name: str, root: str | None) -> _Prepared:
    """The set in ROOT/NAME[/CONFIG]/VERSION, of the highest version unless the name has one."""
    plain, _, version = name.partition(":")
    plain = _TFDS_NAMES.get(plain, plain)
    where = f" --data_dir={root}" if root else ""
    spelled = f"{plain}:{version}" if version else plain
    remedy = f"run tfds build {spelled} --file_format=array_record{where}"
    folder = sets_root(root) / plain
    versions = _versions(folder)
    configs = sorted({p.parent.parent.name for p in folder.glob("*/*/dataset_info.json")})
    if not versions and len(configs) == 1:  # TFDS's default configuration
        versions = _versions(folder / configs[0])
    if not versions or (version and version not in versions):
        others = ", ".join(sorted(versions) or configs)
        missing = f"no prepared TFDS set {name!r} in {folder}{others and f', only {others}'}"
        raise UserError(f"{missing}: {_supply(plain, remedy, folder)}")
    highest = max(versions, key=lambda v: tuple(map(int, v.split("."))))
    return _open(versions[version or highest], name, remedy)


def _versions(folder: Path) -> dict[str, Path]:
    folders = (path.parent for path in folder.glob("*/dataset_info.json"))
    return {path.name: path for path in folders if _VERSION.fullmatch(path.name)}


def _supply(plain: str, remedy: str, folder: Path) -> str:
    """What to do about a missing set: build it, if TFDS has one of this name."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if plain.partition("/")[0] in known:
        return remedy
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)[0]
    return (
        f"TFDS has none of that name (nearest: '{near}'); prepare your own in {folder}/VERSION, or"
        " name other sets as data.near, data.far, data.validation and data.csid"
    )


def _open(directory: Path, name: str, remedy: str) -> _Prepared:
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
    if kind != "uint8" or shape[2] not in (None, 1, 3, 4):
        raise UserError(
            f"images in {directory} are {kind} with {shape[2]} channels: image sets need uint8"
            " with 1, 3 or 4"
        )
    names = tuple(features[label].names or ()) if label else ()
    return _Prepared(directory, builder, remedy, image, label, shape, names)


def _feature(features: dict[str, Any], kind: type, usual: str, directory: Path) -> str | None:
    """Name of the feature of this type; of several, the one that has the usual name."""
    names = sorted(name for name, feature in features.items() if type(feature) is kind)
    if len(names) > 1 and usual not in names:
        raise UserError(
            f"{directory} has several features of type {kind.__name__} ({', '.join(names)}), none"
            f" of them called '{usual}'"
        )
    return usual if usual in names else next(iter(names), None)


def _known_split(prepared: _Prepared, name: str, split: str) -> str:
    """The split, after a check that the set has it."""
    splits = prepared.builder.info.splits
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


def _records(prepared: _Prepared, split: str) -> Any:
    """The serialized examples, by number."""
    if not prepared.builder.info.splits[split].num_examples:
        raise UserError(f"split {split} of {prepared.directory} holds no images: choose another")
    try:
        return prepared.builder.as_data_source(split).data_source
    except NotImplementedError as error:
        file_format = prepared.builder.info.file_format.value
        raise UserError(
            f"{prepared.directory} is stored as {file_format}, which needs TensorFlow to read:"
            f" {prepared.remedy}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        what = f"{prepared.directory} is damaged ({_first_line(error)})"
        raise UserError(f"{what}: {prepared.remedy}") from error


@contextlib.contextmanager
def _no_group_size_error() -> Iterator[None]:
    """Hides array_record's log line about files with groups of more than one record.

    Groups make the embedded files a third smaller. They slow random access down, but these files
    are read in order.
    """

    def passes(record: logging.LogRecord) -> bool:
        return "was created with group size" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
