"""Whole image sets from image files: OpenOOD's lists, and folders of classes.

**Lists** are those of OpenOOD v1.5 (arXiv 2306.09301), in its own directory, which its
`scripts/download` fills and to which `data.root` points:

    ROOT/benchmark_imglist/ID_SET/test_SET.txt   lines "relative/path label"
    ROOT/images_classic/...                      CIFAR and its OOD sets, and textures
    ROOT/images_largescale/...                   ImageNet and its OOD sets

The same set has another list in each benchmark, so a set is read as one of an ID set's. Images
become what OpenOOD's test preprocessing makes of them: RGB; the shorter side brought to 32 (CIFAR)
or 256 pixels (ImageNet; ImageNet-C, which has 224, is left so) by Pillow's antialiased bilinear
filter; the central 32 x 32 or 224 x 224. Normalisation is left to the models. Two things differ
from OpenOOD: a truncated image is an error and not grey, and a label is the *last* field of its
line, so that paths may hold spaces.

**Folders** are for one's own data:

    ROOT/SET/SPLIT/CLASS/....png   the ID set and covariate-shifted sets
    ROOT/SET/SPLIT/....png         OOD sets, with or without folders

with SPLIT one of train, validation (or val) and test; OOD sets have the one they are used in. The
classes are the folders of the ID set's train split, sorted. Images are taken a class in turn.

A set is held in memory as bytes: 3 KiB an image of 32 x 32, 147 KiB one of 224 x 224. ImageNet's
test split takes 6.3 GiB; sets of more than 16 GiB, such as ImageNet's train split, are refused.
"""

import collections
import difflib
import itertools
import logging
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from oal_jax.data.benchmarks import CLASS_NAMES
from oal_jax.errors import UserError

MAX_BYTES = 16 * 2**30
ON_CORRUPT = ("error", "skip")
_LOGGER = logging.getLogger("absl")
_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pgm"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_SUPPLY = (
    "set data.root to OpenOOD's data directory (benchmark_imglist, images_classic,"
    " images_largescale), which its scripts/download gets"
)
# Lists that are not called SPLIT_SET.txt, and sets that are not with the others of their benchmark.
_LISTS = {
    ("cifar10", "cinic10"): "val_cinic10.txt",
    ("imagenet200", "imagenet_v2"): "test_imagenet200_v2.txt",
    ("imagenet200", "imagenet_c"): "test_imagenet200_c.txt",
    ("imagenet200", "imagenet_r"): "test_imagenet200_r.txt",
}
_CLASSIC = ("cifar10", "cifar100", "textures")
# What Pillow's readers raise on damaged files.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class Wanted(NamedTuple):
    """One split of an image set, and how to read it.

    Attributes:
      root: the directory of all sets.
      id_set: the ID set that this set is used with, or is.
      name: the set.
      split: "train", "validation" or "test".
      labelled: whether its labels are classes of the ID set; else they are all 0, "ood".
      limit: read only so many images, the first of each class, or evenly spaced ones of an OOD
        set, since lists are sorted by class; 0 for all.
      image_size: side of the square images; 0: 32 or 224 (lists), as stored (folders).
      on_corrupt: "error", or "skip": leave damaged images out and log how many.
    """

    root: str
    id_set: str
    name: str
    split: str
    labelled: bool
    limit: int
    image_size: int
    on_corrupt: str

    @property
    def where(self) -> str:
        """Its name in messages."""
        return f"{self.name}/{self.split}"


class Decoded(NamedTuple):
    """Images, labels and class names as `oal_jax.data.sources.validated` takes them."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]


class _File(NamedTuple):
    path: Path
    label: int
    source: str  # the line that lists it, for messages; empty for folders

    def __str__(self) -> str:
        return f"{self.source}: {self.path}" if self.source else str(self.path)


def read_list(wanted: Wanted) -> Decoded:
    """Reads the images of an OpenOOD list, in its order.

    Raises:
      UserError: no such root, list or image; a bad line, with its number; a damaged image; too
        many images.
    """
    root, id_set = _root(wanted, _SUPPLY), wanted.id_set
    if id_set not in CLASS_NAMES:
        raise UserError(
            f"OpenOOD has no lists for the ID set '{id_set}': choose one of"
            f" {', '.join(CLASS_NAMES)}, or data.source=folder for your own"
        )
    lists = root / "benchmark_imglist" / id_set
    names = _class_names(lists / "classes.txt", id_set)
    path = lists / _list_name(wanted)
    folder = root / ("images_classic" if _is_classic(wanted) else "images_largescale")
    files = _lines(path, folder, wanted, len(names))
    return _decoded(wanted, files, names if wanted.labelled else ("ood",), _resize(wanted))


def read_folder(wanted: Wanted) -> Decoded:
    """Reads the images below ROOT/SET/SPLIT, the classes in turn.

    Raises:
      UserError: no such root, set, split or image; a class that the ID set's train split does not
        have; an image outside a class; images of several sizes; a damaged image; too many images.
    """
    root = _root(wanted, "set data.root to the directory that holds a folder for each image set")
    folder = _split_folder(root, wanted.name, wanted.split)
    if wanted.labelled:
        train = _split_folder(root, wanted.id_set, "train")
        names = tuple(path.name for path in _folders(train))
        if not names:
            raise UserError(f"{train} has no folders: make one for each class")
        files = _class_files(folder, names)
    else:
        names, files = ("ood",), [_File(path, 0, "") for path in _image_paths(folder)]
    if not files:
        raise UserError(f"{folder} holds no images ({' '.join(_SUFFIXES)})")
    size = wanted.image_size
    return _decoded(wanted, files, names, (size, size) if size else None)


def resize_and_crop(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """Reduces or enlarges the shorter side to `resize` pixels, then cuts the central square out.

    The sizes and offsets are rounded as torchvision's Resize and CenterCrop do on Pillow images;
    `crop` is at most `resize`.
    """
    short, long = sorted(image.size)
    other = int(resize * long / short)
    size = (resize, other) if image.width <= image.height else (other, resize)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - crop) / 2) for side in image.size)
    return image.crop((left, top, left + crop, top + crop))


def _root(wanted: Wanted, remedy: str) -> Path:
    root = Path(wanted.root).expanduser()
    if not wanted.root or not root.is_dir():
        state = f"data.root={root} does not exist" if wanted.root else "data.root is empty"
        raise UserError(f"config {state}: {remedy}")
    if wanted.split not in _SPLITS:
        raise UserError(
            f"image set '{wanted.name}' has no split '{wanted.split}': choose one of"
            f" {', '.join(_SPLITS)}"
        )
    return root


def _is_classic(wanted: Wanted) -> bool:
    return wanted.id_set in _CLASSIC or wanted.name in _CLASSIC


def _list_name(wanted: Wanted) -> str:
    usual = f"{_SPLITS[wanted.split]}_{wanted.name.removeprefix('val_')}.txt"
    return _LISTS.get((wanted.id_set, wanted.name), usual)


def _resize(wanted: Wanted) -> tuple[int, int]:
    """Length of the shorter side, side of the crop."""
    if wanted.id_set in _CLASSIC:
        return (wanted.image_size or 32,) * 2
    size = wanted.image_size or 224
    return (size if wanted.name == "imagenet_c" else size * 256 // 224), size


def _class_names(path: Path, id_set: str) -> tuple[str, ...]:
    """The names in `path`, one a line in the order of the labels, or else the package's own."""
    if not path.is_file():
        return CLASS_NAMES[id_set]
    names = tuple(_text(path).split("\n"))
    names = tuple(name.strip() for name in names if name.strip())
    if len(names) != len(CLASS_NAMES[id_set]):
        raise UserError(
            f"{path} has {len(names)} names: {id_set} has {len(CLASS_NAMES[id_set])} classes"
        )
    return names


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_SUPPLY}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): {_SUPPLY}") from error


def _lines(path: Path, folder: Path, wanted: Wanted, classes: int) -> list[_File]:
    files = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            relative, last = line.rsplit(maxsplit=1)
            label = int(last)
        except ValueError:
            raise UserError(f"{source}: {line.strip()!r} is not 'relative/path label'") from None
        if relative.startswith("/"):
            raise UserError(f"{source}: the path {relative} must be relative to {folder}")
        if wanted.labelled and not 0 <= label < classes:
            raise UserError(
                f"{source}: label {label} is out of range: {wanted.id_set} has classes 0 to"
                f" {classes - 1}"
            )
        files.append(_File(folder / relative.lstrip(), label if wanted.labelled else 0, source))
    if not files:
        raise UserError(f"{path} lists no images: {_SUPPLY}")
    return files


def _split_folder(root: Path, name: str, split: str) -> Path:
    """ROOT/NAME/SPLIT; "val" will do for validation."""
    for folder in (root / name / split, root / name / _SPLITS[split]):
        if folder.is_dir():
            return folder
    folder = root / name / split
    raise UserError(f"no folder {folder}: images of '{name}' are expected there")


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_paths(folder: Path) -> list[Path]:
    found = folder.rglob("*")
    return sorted(p for p in found if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))


def _class_files(folder: Path, names: Sequence[str]) -> list[_File]:
    """The first image of every class, then every second one, and so on."""
    for path in folder.iterdir():
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            raise UserError(f"{path} is in no class: move it into {folder}/CLASS")
    columns = []
    for sub in _folders(folder):
        if sub.name not in names:
            near = difflib.get_close_matches(sub.name, names, n=1, cutoff=0.0)
            raise UserError(
                f"{sub}: no class of that name in the ID set's train split; nearest: '{near[0]}'"
            )
        label = names.index(sub.name)
        columns.append([_File(path, label, "") for path in _image_paths(sub)])
    turns = itertools.zip_longest(*columns)
    return [file for turn in turns for file in turn if file is not None]


def _decoded(
    wanted: Wanted, files: list[_File], names: tuple[str, ...], resize: tuple[int, int] | None
) -> Decoded:
    """Decodes the wanted ones of `files` in threads, which Pillow lets run at the same time."""
    if wanted.on_corrupt not in ON_CORRUPT:
        raise UserError(
            f"config data.on_corrupt='{wanted.on_corrupt}' is not one of {', '.join(ON_CORRUPT)}"
        )
    if wanted.limit and wanted.limit < len(files):
        files = _some(files, wanted)
    images, labels = None, []
    with ThreadPoolExecutor() as threads:
        read = threads.map(lambda file: _read(file, resize, wanted), files)
        for file, pixels in zip(files, read, strict=True):
            if isinstance(pixels, Exception):
                if wanted.on_corrupt == "error":
                    raise UserError(
                        f"{file} is damaged ({pixels}): replace it, or set data.on_corrupt=skip"
                    ) from pixels
                continue
            if images is None:
                _check_bytes(wanted, len(files), pixels.nbytes)
                images = np.empty((len(files), *pixels.shape), np.uint8)
            elif pixels.shape != images.shape[1:]:
                raise UserError(
                    f"{file} is {pixels.shape[1]} x {pixels.shape[0]} pixels, the first image of"
                    f" {wanted.where} is {images.shape[2]} x {images.shape[1]}: set data.image_size"
                )
            images[len(labels)] = pixels
            labels.append(file.label)
    if images is None:
        raise UserError(f"all {len(files)} images of {wanted.where} are damaged: replace them")
    if len(labels) < len(files):
        damaged = len(files) - len(labels)
        _LOGGER.warning("%s: skipped %d of %d images", wanted.where, damaged, len(files))
    return Decoded(images[: len(labels)], np.array(labels, np.int64), names)


def _some(files: list[_File], wanted: Wanted) -> list[_File]:
    """`wanted.limit` of the files in their order: the first of each class, or evenly spaced."""
    count = wanted.limit
    if not wanted.labelled:
        return [files[i * len(files) // count] for i in range(count)]
    seen: collections.Counter[int] = collections.Counter()
    ranks = []
    for file in files:
        ranks.append(seen[file.label])
        seen[file.label] += 1
    chosen = sorted(range(len(files)), key=ranks.__getitem__)[:count]
    return [files[i] for i in sorted(chosen)]


def _read(
    file: _File, resize: tuple[int, int] | None, wanted: Wanted
) -> UInt8[np.ndarray, "h w 3"] | Exception:
    """The pixels, or what is wrong with an image that is there but damaged."""
    try:
        with Image.open(file.path) as image:
            rgb = image.convert("RGB")
        return np.asarray(rgb if resize is None else resize_and_crop(rgb, *resize))
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            remedy = "get it anew, or mend the list" if file.source else "mend the folder"
            if wanted.labelled and wanted.name != wanted.id_set:
                remedy += "; data.csid=none leaves covariate-shifted sets out"
            raise UserError(f"{file} cannot be read ({error.strerror}): {remedy}") from error
        return error


def _check_bytes(wanted: Wanted, count: int, image_bytes: int) -> None:
    if count * image_bytes > MAX_BYTES:
        raise UserError(
            f"the {count} images of {wanted.where} take {count * image_bytes / 2**30:.1f} GiB, and"
            f" sets are held in memory up to {MAX_BYTES / 2**30:.0f} GiB: lower data.train_images"
            " or data.image_size"
        )
