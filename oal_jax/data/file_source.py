"""Image files with labels."""

import errno
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from oal_jax.data import manifest
from oal_jax.data.image_files import Decoding
from oal_jax.data.stored import SetSpec, Source
from oal_jax.errors import UserError


class File(NamedTuple):
    """One image file.

    Attributes:
      name: below the folder of the images, with forward slashes.
      label: of its class.
      line: of the list that names it; 0 for folders.
    """

    name: str
    label: int
    line: int = 0


class FileSource(Source):
    """Image files and their labels.

    A million of them take about 100 MB: names and digests lie in arrays, not in objects.

    Args:
      spec: the split; see `SetSpec`.
      folder: folder that the names are relative to.
      files: at least one.
      class_names, decoding, remarks: as for `Source`.
      listed: the list of these files; None for those of a folder.
      known: a manifest that every file must agree with, or None.
    """

    def __init__(
        self,
        spec: SetSpec,
        folder: Path,
        files: Sequence[File],
        class_names: tuple[str, ...],
        decoding: Decoding,
        listed: Path | None,
        known: manifest.Manifest | None,
        remarks: str = "",
    ):
        names = class_names if spec.labelled else ("ood",)
        super().__init__(spec.where, names, decoding, spec.on_corrupt, remarks)
        self._folder, self._listed = str(folder), listed
        shifted = spec.labelled and spec.name != spec.id_set
        self._hint = "; data.csid=none leaves covariate-shifted sets out" if shifted else ""
        self._names = np.array([os.fsencode(file.name) for file in files])
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
        return Path(self._folder, os.fsdecode(self._names[index]))

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
        path = self.path(index)
        try:
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise OSError(errno.EINVAL, "a pipe or a device")  # reading it would never end
            data = path.read_bytes()
        except OSError as error:
            remedy = "download it again, or mend the " + ("list" if self._listed else "folder")
            raise UserError(
                f"{self.where(index)} cannot be read ({error.strerror}): {remedy}{self._hint}"
            ) from error
        digests = self._digests
        if digests is not None and hashlib.sha256(data).digest() != digests[index].tobytes():
            raise manifest.changed(self.where(index), self._manifest)
        return data


def by_class(names: Iterable[str], prefix: str = "") -> tuple[dict[str, list[str]], list[str]]:
    """The images of every class below PREFIX, and those that are in no class.

    Args:
      names: files, sorted, such as "PREFIX/CLASS/MORE/a.png".
      prefix: "" or a folder and a slash; other names are passed over.
    """
    classes: dict[str, list[str]] = {}
    stray = []
    for name in names:
        if name.startswith(prefix):
            folder, slash, _ = name.removeprefix(prefix).partition("/")
            # Systems spell an accent as one character or as two.
            folder = unicodedata.normalize("NFC", folder)
            classes.setdefault(folder, []).append(name) if slash else stray.append(name)
    return dict(sorted(classes.items())), stray


def in_turn(images: Mapping[str, Sequence[str]], class_names: Sequence[str]) -> list[File]:
    """The first image of every class, then the second ones, and so on."""
    labels = {name: label for label, name in enumerate(class_names)}
    columns = ([File(file, labels[name]) for file in files] for name, files in images.items())
    turns = itertools.zip_longest(*columns)
    return [file for turn in turns for file in turn if file is not None]
