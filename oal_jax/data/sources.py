"""Whole image sets in memory: of the package, of TFDS, of OpenOOD's lists, of folders.

The first two are TFDS data sets in a format that reads back without TensorFlow (array_record),
their images of one size. The others are image files (`oal_jax.data.imglist`). Sets that do not fit
in memory are not for this module.
"""

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from oal_jax.data import bundled, corruptions, imglist, procedural
from oal_jax.errors import UserError

SOURCES = ("bundled", "tfds", "imglist", "folder")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


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


def load(
    source: str,
    name: str,
    split: str,
    *,
    root: str | None = None,
    limit: int = 0,
    id_set: str = "",
    labelled: bool = True,
    image_size: int = 0,
    on_corrupt: str = "error",
) -> ImageSet:
    """Reads one split of an image set into memory.

    Args:
      source: "bundled" (the sets that come with the package, see `oal_jax.data.bundled`, and their
        corrupted copies, see `oal_jax.data.corruptions`, and `oal_jax.data.procedural`), "tfds"
        (prepared once with `tfds build`), "imglist" (OpenOOD's lists) or "folder" (a folder a
        class), for both of which `oal_jax.data.imglist` says what `root` must hold.
      name: the set; for "tfds" also NAME/CONFIG or NAME:VERSION, else the highest version.
      split: such as "train", "validation" or "test".
      root: where the sets are; None for the package, or for TFDS's own default directory.
      limit: read only so many images; 0 for all. The first ones of "bundled" and "tfds"; of image
        files, which lie class by class, as many of each class.
      id_set: of image files: the ID set that this set is used with; empty: it is the ID set.
      labelled: of image files: whether the labels are classes of the ID set, as those of the ID set
        itself and of covariate-shifted sets are. Else all are 0, of the class "ood".
      image_size: of image files: the side that images get; 0 for the source's default.
      on_corrupt: of image files: "error", or "skip" to leave damaged images out.

    Raises:
      UserError: the set or split is not there, is damaged, or breaks what `ImageSet` promises.
    """
    if limit < 0:
        raise UserError(f"limit for image set {name!r} is {limit}: give 0 (all) or more")
    if source == "bundled" and name in corruptions.SETS:
        clean = load(source, corruptions.SETS[name].base, split, root=root, limit=limit)
        shifted = corruptions.corrupt(name, clean.images)
        return clean._replace(name=f"{name}/{split}", images=shifted)
    if source == "bundled" and name == procedural.NAME:
        drawn = procedural.draw(limit or procedural.COUNT, procedural.SIZE)
        return validated(f"{name}/{split}", drawn, np.zeros(len(drawn), np.int32), ("outlier",))
    if source in ("imglist", "folder"):
        wanted = imglist.Wanted(
            *(root or "", id_set or name, name, split, labelled, limit, image_size, on_corrupt)
        )
        read = imglist.read_list if source == "imglist" else imglist.read_folder
        return validated(wanted.where, *read(wanted))
    if source == "bundled":
        directory = bundled.verified_directory(name, root)
        remedy = bundled.REMEDY
    elif source == "tfds":
        remedy = _build_command(name, root)
        directory = _tfds_directory(name, root, remedy)
    else:
        raise UserError(f"unknown image source {source!r}: choose one of {', '.join(SOURCES)}")
    return _read(directory, name, split, limit, remedy)


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


def _build_command(name: str, root: str | None) -> str:
    where = "" if root is None else f" --data_dir={root}"
    return f"run tfds build {name} --file_format=array_record{where}"


def _tfds_directory(name: str, root: str | None, remedy: str) -> Path:
    """ROOT/NAME[/CONFIG]/VERSION, the highest version unless the name gives one."""
    from tensorflow_datasets.core import constants

    plain, _, version = name.partition(":")
    folder = Path(root or constants.DATA_DIR).expanduser() / plain
    found = {
        path.parent.name: path.parent
        for path in folder.glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    }
    if not found or (version and version not in found):
        held = f", only {', '.join(sorted(found))}" if found else ""
        raise UserError(f"no prepared TFDS set {name!r} in {folder}{held}: {remedy}")
    return found[version or max(found, key=lambda v: tuple(map(int, v.split("."))))]


@contextlib.contextmanager
def _no_group_size_error() -> Iterator[None]:
    """Silences array_record's logged error about files with groups of more than one record.

    The embedded files are grouped because that makes them a third smaller. Groups slow down random
    access; here everything is read in order.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "was created with group size" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _read(directory: Path, name: str, split: str, limit: int, remedy: str) -> ImageSet:
    """The split of the TFDS data set in `directory`; `remedy` says how to get it anew."""
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    try:
        builder = tfds.builder_from_directory(directory)
    except (OSError, ValueError, json_format.Error) as error:
        raise UserError(f"{directory} is damaged ({_first_line(error)}): {remedy}") from error
    features = dict(builder.info.features.items())
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image):
        raise UserError(f"{directory} has features {sorted(features)}: 'image' must be an Image")
    if not isinstance(label, tfds.features.ClassLabel):
        raise UserError(f"{directory} has features {sorted(features)}: 'label' must be a class")
    if split not in builder.info.splits:
        splits = ", ".join(sorted(builder.info.splits)) or "none"
        raise UserError(f"image set {name!r} has no split {split!r}: choose one of {splits}")
    try:
        # PIL on the stored bytes takes two thirds of the time of TFDS's own decoding.
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        kept = builder.info.file_format.value
        raise UserError(
            f"{directory} is stored as {kept}, which needs TensorFlow to read: {remedy}"
        ) from error
    count = min(limit, len(source)) if limit else len(source)
    try:
        with _no_group_size_error():
            examples = source.__getitems__(range(count))
        images = [_decode(example["image"], image.shape[-1]) for example in examples]
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{directory} is damaged ({_first_line(error)}): {remedy}") from error
    where = f"{name}/{split}"
    _check_shapes(where, images, image.shape)
    labels = np.array([example["label"] for example in examples], np.int64)
    return validated(where, np.stack(images), labels, tuple(label.names))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _decode(data: bytes, channels: int | None) -> UInt8[np.ndarray, "h w c"]:
    with Image.open(io.BytesIO(data)) as image:
        mode = _MODES.get(channels, image.mode)
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _check_shapes(where: str, images: list[np.ndarray], declared: tuple[int | None, ...]) -> None:
    """Raises a UserError where an image has another shape than the first, or than is declared."""
    if not images:
        raise UserError(f"{where} holds no images: choose another split")
    for i, image in enumerate(images):
        if image.shape != images[0].shape:
            raise UserError(
                f"image {i} of {where} has shape {image.shape}, image 0 has {images[0].shape}: "
                "resize them to one shape"
            )
    if any(d not in (None, s) for d, s in zip(declared, images[0].shape, strict=True)):
        raise UserError(
            f"images of {where} have shape {images[0].shape}, its features.json says {declared}: "
            "prepare the set anew"
        )
