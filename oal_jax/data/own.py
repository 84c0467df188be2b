"""One folder of one's own images, for `data.source=own`.

    DIR/CLASS/...                           is enough, or
    DIR/{train,validation,test}/CLASS/...   validation also as val or valid
    DIR/ood/NAME/...                        OOD sets, if there are any

Below CLASS and NAME there may be more folders; images in DIR/ood itself are the OOD set "ood". A
validation or test split without a folder is cut from the training images, 15 % each, by a digest of
their names: so a file stays in its split when others come. Each split then has an image of every
class that has three.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from oal_jax.config.benchmarks import LEFT_OUT, MADE, NO_SETS
from oal_jax.data import folders, image_files
from oal_jax.data.file_source import File, by_class, in_turn
from oal_jax.data.image_files import Listing, Unreadable
from oal_jax.data.stored import SetSpec, Source
from oal_jax.errors import UserError

NAME = "own"  # of the ID set
SHARE = 0.15  # of the training images, for a validation or test split that has no folder
_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
_OOD = "ood"
_TAKEN = (NAME, *NO_SETS, *MADE, *LEFT_OUT.values())  # names that OOD sets can't have


class FolderSummary(NamedTuple):
    """What a folder of images holds.

    Attributes:
      class_names: sorted; label 0, 1, ...
      counts: images of each class, by split.
      cut: the splits that are cut from the training images.
      ood: number of images of every OOD set.
      sizes: (height, width) of a sample of the ID images, evenly spaced over splits and classes.
      gray: whether all images of the sample are gray.
      skipped: what is not read, relative to the folder, and why; of images, those of the sample.
    """

    class_names: tuple[str, ...]
    counts: dict[str, Int[np.ndarray, " c"]]
    cut: tuple[str, ...]
    ood: dict[str, int]
    sizes: Int32[np.ndarray, "n 2"]
    gray: bool
    skipped: list[tuple[str, str]]


class _Layout(NamedTuple):
    """All names are relative to DIR.

    Attributes:
      splits: images of every class, by split and class.
      folders: where the images of a split lie: "" or a folder and a slash.
      cut: the splits that are cut from the training images.
      stray: images in no class and in no OOD set.
    """

    splits: dict[str, dict[str, list[str]]]
    folders: dict[str, str]
    cut: tuple[str, ...]
    stray: list[str]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every class has a training image."""
        return tuple(self.splits["train"])


def summarise(root: str | os.PathLike, sample: int = 512) -> FolderSummary:
    """What a folder of images holds. Reads the headers of at most `sample` images.

    Raises:
      UserError: no such folder, no two classes with images, or a class of another split that the
        training split does not have.
    """
    root = Path(root).expanduser()
    listing = image_files.find(root)
    layout = _layout(root, listing.names)
    names = [n for split in layout.splits.values() for files in split.values() for n in files]
    chosen = np.linspace(0, len(names) - 1, min(sample, len(names))).astype(int)
    sizes, gray, damaged = [], [], []
    with image_files.quiet():
        for name in (names[i] for i in chosen):
            try:
                with image_files.opened(root / name) as image:
                    sizes.append(image_files.upright_shape(image, 1)[:2])
                    gray.append(image_files.is_gray(image))
            except Unreadable as error:
                damaged.append((name, str(error)))
    return FolderSummary(
        class_names=layout.class_names,
        counts={
            split: np.array([len(images.get(name, ())) for name in layout.class_names])
            for split, images in layout.splits.items()
        },
        cut=layout.cut,
        ood={name: len(files) for name, files in _ood_sets(listing.names).items()},
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        gray=bool(gray) and all(gray),
        skipped=[
            *((name, "not an image by its name") for name in listing.others),
            *((name, "a link that repeats a folder") for name in listing.repeats),
            *((name, "in no class") for name in layout.stray),
            *damaged,
        ],
    )


def open_own(spec: SetSpec) -> Source:
    """A split of the folder's classes, or one of its OOD sets, which have no splits.

    Raises:
      UserError: as `summarise`; no such OOD set; no image in the split; a file that a manifest
        does not have.
    """
    remedy = "set data.root to a folder that holds a folder of images for each class"
    root = folders.set_root(spec, remedy)
    listing = image_files.find(root)
    if spec.name != spec.id_set:
        return _open_ood(spec, root, listing)
    layout = _layout(root, listing.names)
    images, names = layout.splits[spec.split], layout.class_names
    remarks = [
        listing.left_out(layout.folders[spec.split]),
        image_files.counted(layout.stray, "image in no class", "images in no class"),
    ]
    if spec.split in layout.cut:
        remarks.append(f"no folder {spec.split}, so {SHARE:.0%} of each class are taken for it")
    if spec.split in layout.cut and not images:
        few = "a class needs three images to have one in each split"
        raise UserError(f"{root} has no {spec.split} images: {few}; add images")
    without = [name for name in names if name not in images]
    if without:
        remarks.append(f"no image of {image_files.counted(without, 'class', 'classes')}")
    text = "; ".join(filter(None, remarks))
    return folders.open_files(spec, root, root, in_turn(images, names), names, text)


def _layout(root: Path, names: Sequence[str]) -> _Layout:
    """The classes of every split."""
    top, stray = by_class(names)
    for name in [name for name in top if name.lower() == _OOD]:
        del top[name]
    places = _split_folders(top)
    if places:
        others = [name for name in top if name not in places.values()]
        stray += [file for name in others for file in top[name]]
        below = {split: by_class(top[name], name + "/") for split, name in places.items()}
        stray += [file for _, files in below.values() for file in files]
        given = {split: classes for split, (classes, _) in below.items()}
    else:
        given = {"train": top}
    prefixes = {split: name + "/" for split, name in places.items()} or {"train": ""}
    train = given["train"]
    if len(train) < 2:
        inside = [name for name in train if len(by_class(train[name], name + "/")[0]) > 1]
        hint = f", or set data.root={root / inside[0]}" if inside else ""
        raise UserError(
            f"{root / prefixes['train']} has"
            f" {len(train)} folder{'' if len(train) == 1 else 's'} with images: give a folder that"
            f" holds one for each of two classes or more{hint}"
        )
    for split, classes in given.items():
        folders.check_known(root / prefixes[split], classes, tuple(train))
    cut = tuple(split for split in ("validation", "test") if split not in given)
    splits = {**given, **_cut(train, cut)}
    prefixes |= dict.fromkeys(cut, prefixes["train"])
    return _Layout({split: splits[split] for split in _FOLDERS}, prefixes, cut, stray)


def _split_folders(top: Mapping[str, list[str]]) -> dict[str, str]:
    """The folder of each split, if DIR has folders of splits and not of classes.

    A split holds folders with images, most of which a class does not. Beside other folders,
    "train" is a class unless "validation" or "test" are there too.
    """
    places = {}
    for split, spellings in _FOLDERS.items():
        for name in (name for name in top if name.lower() in spellings):
            classes, stray = by_class(top[name], name + "/")
            if sum(map(len, classes.values())) > len(stray):
                places.setdefault(split, name)
    others = set(top) - set(places.values())
    return places if "train" in places and (len(places) > 1 or not others) else {}


def _cut(images: Mapping[str, list[str]], cut: tuple[str, ...]) -> dict[str, dict[str, list[str]]]:
    """The training images of every class, divided: by split, then by class."""
    parts: dict[str, dict[str, list[str]]] = {split: {} for split in ("train", *cut)}
    for label, names in images.items():
        places = [_place(name) for name in names]
        split_of = [_at(place, cut) for place in places]
        if len(names) <= len(cut):
            split_of = ["train"] * len(names)
        for split in parts:
            if split not in split_of and len(names) > len(cut):  # gets the image next to its share
                several = [i for i, other in enumerate(split_of) if split_of.count(other) > 1]
                nearest = min(several, key=lambda i: (split_of[i] != "train", places[i]))
                split_of[nearest] = split
        for name, split in zip(names, split_of, strict=True):
            parts[split].setdefault(label, []).append(name)
    return parts


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6]) / 2**48


def _at(place: float, cut: tuple[str, ...]) -> str:
    number = int(place / SHARE)
    return cut[number] if number < len(cut) else "train"


def _ood_sets(names: Sequence[str]) -> dict[str, list[str]]:
    """Images of every OOD set, by a name that configs can list."""
    folder = next((n for n in by_class(names)[0] if n.lower() == _OOD), _OOD)
    images, stray = by_class(names, folder + "/")
    sets = {_OOD: stray} if stray else {}
    for name, files in images.items():
        spelled = name.replace(",", "_").strip()
        while spelled in sets or spelled in _TAKEN:
            spelled = f"{_OOD}_{spelled}"
        sets[spelled] = files
    return sets


def _open_ood(spec: SetSpec, root: Path, listing: Listing) -> Source:
    sets = _ood_sets(listing.names)
    if spec.name not in sets:
        names = f"only {', '.join(sets)}" if sets else "which holds no images"
        raise UserError(f"no OOD set '{spec.name}' in {root / _OOD}, {names}")
    if spec.labelled:
        raise UserError(
            f"config data.csid={spec.name}: data.source=own has no covariate-shifted sets; name it"
            " in data.near or data.far"
        )
    files = [File(name, 0) for name in sets[spec.name]]
    remarks = listing.left_out(f"{_OOD}/{spec.name}/")
    return folders.open_files(spec, root, root, files, ("ood",), remarks)
