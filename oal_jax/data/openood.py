"""Image sets of image files: OpenOOD's lists, and folders of classes.

**Lists** are those of OpenOOD v1.5 (arXiv 2306.09301), in its own directory, which its
`scripts/download` fills and to which `data.root` points:

    ROOT/benchmark_imglist/ID_SET/test_SET.txt   lines "relative/path label"
    ROOT/images_classic/...                      CIFAR and its OOD sets, and textures
    ROOT/images_largescale/...                   ImageNet and its OOD sets

A set has another list in each benchmark, so it is read as one of the sets of an ID set. Images
are preprocessed as in OpenOOD's tests: RGB; the shorter side brought to 32 pixels (CIFAR) or 256
(ImageNet; ImageNet-C keeps its 224) by Pillow's antialiased bilinear filter; the central 32 x 32 or
224 x 224. Normalisation is left to the models. Two things differ from OpenOOD: a truncated image is
an error and not grey, and a label is the *last* field of its line, so that paths may hold spaces.

**Folders** are for one's own data:

    ROOT/SET/SPLIT/CLASS/....png   the ID set and covariate-shifted sets
    ROOT/SET/SPLIT/....png         OOD sets, with or without folders

SPLIT is train, validation (or val) or test; OOD sets need only the one that they are used in. The
classes are the folders of the ID set's train split, sorted. The images come one class in turn.

In memory, an image of 32 x 32 takes 3 KiB, one of 224 x 224 147 KiB: ImageNet's test split 6.3
GiB. Sets of more than 16 GiB, such as ImageNet's train split, are for `oal_jax.data.stream`.
"""

import difflib
import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from oal_jax.config.class_names import CLASS_NAMES
from oal_jax.data import class_names, manifest
from oal_jax.data.image_files import Decoding
from oal_jax.data.stored import SetSpec, Source
from oal_jax.errors import UserError

_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pgm"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_SUPPLY = (
    "set data.root to OpenOOD's data directory (benchmark_imglist, images_classic,"
    " images_largescale), which its scripts/download gets"
)
# Lists that are not called SPLIT_SET.txt.
_LISTS = {
    ("cifar10", "cinic10"): "val_cinic10.txt",
    ("imagenet200", "imagenet_v2"): "test_imagenet200_v2.txt",
    ("imagenet200", "imagenet_c"): "test_imagenet200_c.txt",
    ("imagenet200", "imagenet_r"): "test_imagenet200_r.txt",
}
_CLASSIC = ("cifar10", "cifar100", "textures")


class _File(NamedTuple):
    name: str  # below the folder of the images, with forward slashes
    label: int
    line: int  # of the list; 0 for folders


class FileSource(Source):
    """Image files and their labels.

    A million of them take about 100 MB: names and digests lie in arrays, not in objects.

    Args:
      spec: the split; see `SetSpec`.
      folder: folder that the names are relative to.
      files: at least one.
      class_names, decoding: as for `Source`.
      listed: the list of these files; None for those of a folder.
      known: a manifest that every file must agree with, or None.
    """

    def __init__(
        self,
        spec: SetSpec,
        folder: Path,
        files: Sequence[_File],
        class_names: tuple[str, ...],
        decoding: Decoding,
        listed: Path | None,
        known: manifest.Manifest | None,
    ):
        names = class_names if spec.labelled else ("ood",)
        super().__init__(spec.where, names, decoding, spec.on_corrupt)
        self._folder, self._listed = str(folder), listed
        shifted = spec.labelled and spec.name != spec.id_set
        self._hint = "; data.csid=none leaves covariate-shifted sets out" if shifted else ""
        self._names = np.array([file.name.encode() for file in files])
        self._labels = np.array([file.label for file in files], np.int32)
        self._lines = np.array([file.line for file in files], np.int32)
        self._manifest = known and str(known.path)
        self._digests = known and np.array(
            [bytes.fromhex(known.digest(folder / file.name)) for file in files], "V32"
        )

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self, indices: Sequence[int] | None = None) -> Int32[np.ndarray, " n"]:
        """Labels of these files, or of all. Reads no file."""
        return self._labels if indices is None else self._labels[list(indices)]

    def path(self, index: int) -> Path:
        """The file of an image."""
        return Path(self._folder, self._names[index].decode())

    def where(self, index: int) -> str:
        """The file of an image, and the line that lists it."""
        path = self.path(index)
        return f"{self._listed}, line {self._lines[index]}: {path}" if self._listed else str(path)

    def fetch(self, indices: Sequence[int]) -> list[tuple[bytes, int]]:
        """The bytes of these files and their labels.

        Raises:
          UserError: a file can't be read, or differs from the manifest.
        """
        return [(self._bytes(index), int(self._labels[index])) for index in indices]

    def _bytes(self, index: int) -> bytes:
        try:
            data = self.path(index).read_bytes()
        except OSError as error:
            remedy = "download it again, or mend the " + ("list" if self._listed else "folder")
            raise UserError(
                f"{self.where(index)} cannot be read ({error.strerror}): {remedy}{self._hint}"
            ) from error
        digests = self._digests
        if digests is not None and hashlib.sha256(data).digest() != digests[index].tobytes():
            raise manifest.changed(self.where(index), self._manifest)
        return data


def open_list(spec: SetSpec) -> Source:
    """The images of an OpenOOD list, in its order.

    Raises:
      UserError: no such root or list; a bad line, with its number; a file that is missing in a
        manifest or differs from it.
    """
    root, id_set = _root(spec, _SUPPLY), spec.id_set
    if id_set not in CLASS_NAMES:
        raise UserError(
            f"OpenOOD has no lists for the ID set '{id_set}': choose one of"
            f" {', '.join(CLASS_NAMES)}, or data.source=folder for your own"
        )
    lists = root / "benchmark_imglist" / id_set
    names = _class_names(lists / "classes.txt", id_set)
    path = lists / _list_name(spec)
    folder = root / ("images_classic" if _is_classic(spec) else "images_largescale")
    known = manifest.find(root, root)
    if known is not None and path.is_file():
        known.check(path)
    files = _lines(path, folder, spec, len(names))
    as_openood = decoding(spec.name, id_set, spec.image_size)
    return FileSource(spec, folder, files, names, as_openood, path, known)


def open_folder(spec: SetSpec) -> Source:
    """The images below ROOT/SET/SPLIT, one class in turn.

    Raises:
      UserError: no such root, set, split or image; a class that the ID set's train split does not
        have; an image outside a class; a file that is missing, or missing in a manifest, or differs
        from it.
    """
    root = _root(spec, "set data.root to the directory that holds a folder for each image set")
    folder = _split_folder(root, spec.name, spec.split)
    if spec.labelled:
        train = _split_folder(root, spec.id_set, "train")
        names = tuple(path.name for path in _folders(train))
        if not names:
            raise UserError(f"{train} has no folders: make one for each class")
        files = _class_files(folder, names)
    else:
        names, files = ("ood",), [_File(name, 0, 0) for name in _image_names(folder)]
    known = manifest.find(folder, root)
    if known is not None:
        known.check_names(folder, [folder / file.name for file in files])
    if not files:
        raise UserError(f"{folder} holds no images ({' '.join(_SUFFIXES)})")
    side = spec.image_size
    decoding = Decoding.to_shape((side, side, 3)) if side else Decoding()
    return FileSource(spec, folder, files, names, decoding, None, known)


def _root(spec: SetSpec, remedy: str) -> Path:
    root = Path(spec.root).expanduser()
    if not spec.root or not root.is_dir():
        state = f"data.root={root} does not exist" if spec.root else "data.root is empty"
        raise UserError(f"config {state}: {remedy}")
    if spec.split not in _SPLITS:
        raise UserError(
            f"image set '{spec.name}' has no split '{spec.split}': choose one of"
            f" {', '.join(_SPLITS)}"
        )
    return root


def _is_classic(spec: SetSpec) -> bool:
    return spec.id_set in _CLASSIC or spec.name in _CLASSIC


def _list_name(spec: SetSpec) -> str:
    usual = f"{_SPLITS[spec.split]}_{spec.name.removeprefix('val_')}.txt"
    return _LISTS.get((spec.id_set, spec.name), usual)


def decoding(name: str, id_set: str, image_size: int) -> Decoding:
    """OpenOOD's preprocessing of the images of a list; size 0: its own."""
    classic = id_set in _CLASSIC
    size = image_size or (32 if classic else 224)
    whole = classic or name == "imagenet_c"
    return Decoding(3, size if whole else size * 256 // 224, (size, size))


def _class_names(path: Path, id_set: str) -> tuple[str, ...]:
    """The names in the file, one a line in the order of the labels; without it the package's."""
    if not path.is_file():
        return class_names.of_list(path.with_name(f"train_{id_set}.txt"), CLASS_NAMES[id_set])
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


def _lines(path: Path, folder: Path, spec: SetSpec, classes: int) -> list[_File]:
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
        if spec.labelled and not 0 <= label < classes:
            raise UserError(
                f"{source}: label {label} is out of range: {spec.id_set} has classes 0 to"
                f" {classes - 1}"
            )
        files.append(_File(relative.lstrip(), label if spec.labelled else 0, number))
    if not files:
        raise UserError(f"{path} lists no images: {_SUPPLY}")
    return files


def _split_folder(root: Path, name: str, split: str) -> Path:
    """ROOT/NAME/SPLIT, where validation may be called "val"."""
    for folder in (root / name / split, root / name / _SPLITS[split]):
        if folder.is_dir():
            return folder
    folder = root / name / split
    raise UserError(f"no folder {folder}: images of '{name}' are expected there")


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_names(folder: Path) -> list[str]:
    """Images below the folder, with forward slashes, in the order of their parts."""
    names = []
    for parent, _, files in os.walk(folder):
        below = Path(parent).relative_to(folder).as_posix()
        prefix = "" if below == "." else below + "/"
        names += [prefix + f for f in files if os.path.splitext(f)[1].lower() in _SUFFIXES]
    shown = (name for name in names if not name.rpartition("/")[2].startswith("."))
    return sorted(shown, key=lambda name: name.split("/"))


def _class_files(folder: Path, names: Sequence[str]) -> list[_File]:
    """The first image of every class, then the second ones, and so on."""
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
        columns.append([_File(f"{sub.name}/{name}", label, 0) for name in _image_names(sub)])
    turns = itertools.zip_longest(*columns)
    return [file for turn in turns for file in turn if file is not None]
