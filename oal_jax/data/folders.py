"""Several image sets below one folder, for `data.source=folder`.

    ROOT/SET/SPLIT/CLASS/....png   the ID set and covariate-shifted sets
    ROOT/SET/SPLIT/....png         OOD sets, with or without folders

SPLIT is train, validation (or val) or test; OOD sets need only the one that they are used in. The
classes are the folders of the ID set's train split that hold images, sorted. The images come one
class in turn.
"""

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

from oal_jax.data import image_files, manifest
from oal_jax.data.file_source import File, FileSource, by_class, in_turn
from oal_jax.data.image_files import Decoding
from oal_jax.data.stored import SetSpec, Source
from oal_jax.errors import UserError

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def open_folder(spec: SetSpec) -> Source:
    """The images below ROOT/SET/SPLIT, one class in turn.

    Raises:
      UserError: no such root, set, split or image; a class that the ID set's train split does not
        have; a file that is missing in a manifest, or differs from it.
    """
    root = set_root(spec, "set data.root to the directory that holds a folder for each image set")
    folder = _split_folder(root, spec.name, spec.split)
    listing, names = image_files.find(folder), ("ood",)
    files, remarks = [File(name, 0) for name in listing.names], [listing.left_out()]
    if spec.labelled:
        train = _split_folder(root, spec.id_set, "train")
        names = tuple(by_class(image_files.find(train).names)[0])
        if not names:
            raise UserError(f"{train} has no folders with images: make one for each class")
        images, stray = by_class(listing.names)
        check_known(folder, images, names)
        files = in_turn(images, names)
        remarks.append(image_files.counted(stray, "image in no class", "images in no class"))
    return open_files(spec, root, folder, files, names, "; ".join(filter(None, remarks)))


def open_files(
    spec: SetSpec,
    root: Path,
    folder: Path,
    files: Sequence[File],
    class_names: tuple[str, ...],
    remarks: str,
) -> Source:
    """The files of a folder as a source, checked against a manifest if there is one.

    Raises:
      UserError: there are none; one is missing in a manifest.
    """
    if not files:
        raise UserError(f"{folder} holds no images{remarks and f': {remarks}'}")
    known = manifest.find(folder, root)
    if known is not None:
        known.check_names(folder, [folder / file.name for file in files])
    channels, side = spec.channels or 3, spec.image_size
    decoding = Decoding.to_shape((side, side, channels)) if side else Decoding(channels)
    return FileSource(spec, folder, files, class_names, decoding, None, known, remarks)


def set_root(spec: SetSpec, remedy: str) -> Path:
    """The directory of all sets.

    Raises:
      UserError: there is none, with the remedy; or no such split.
    """
    root = Path(spec.root).expanduser()
    if not spec.root or not root.is_dir():
        state = f"data.root={root} does not exist" if spec.root else "data.root is empty"
        raise UserError(f"config {state}: {remedy}")
    if spec.split not in SPLITS:
        raise UserError(
            f"image set '{spec.name}' has no split '{spec.split}': choose one of"
            f" {', '.join(SPLITS)}"
        )
    return root


def check_known(folder: Path, classes: Collection[str], known: Sequence[str]) -> None:
    """Raise `UserError` for a class that is none of the training split."""
    for name in classes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(
                f"{folder / name}: no class of that name in the ID set's train split; nearest:"
                f" '{near[0]}'"
            )


def _split_folder(root: Path, name: str, split: str) -> Path:
    """ROOT/NAME/SPLIT, where validation may be called "val"."""
    for folder in (root / name / split, root / name / SPLITS[split]):
        if folder.is_dir():
            return folder
    folder = root / name / split
    raise UserError(f"no folder {folder}: images of '{name}' are expected there")
