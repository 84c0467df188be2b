"""Image sets of OpenOOD's lists.

They are those of OpenOOD v1.5 (arXiv 2306.09301), in its own directory, which its
`scripts/download` fills and to which `data.root` points:

    ROOT/benchmark_imglist/ID_SET/test_SET.txt   lines "relative/path label"
    ROOT/images_classic/...                      CIFAR and its OOD sets, and textures
    ROOT/images_largescale/...                   ImageNet and its OOD sets

A set has another list in each benchmark, so it is read as one of the sets of an ID set. Images
are preprocessed as in OpenOOD's tests: RGB; the shorter side brought to 32 pixels (CIFAR) or 256
(ImageNet; ImageNet-C keeps its 224) by Pillow's antialiased bilinear filter; the central 32 x 32 or
224 x 224. Normalisation is left to the models. Three things differ from OpenOOD: a truncated image
is an error and not grey; a label is the *last* field of its line, so that paths may hold spaces;
EXIF turns and transparency are respected.

In memory, an image of 32 x 32 takes 3 KiB, one of 224 x 224 147 KiB: ImageNet's test split 6.3
GiB. Sets of more than 16 GiB, such as ImageNet's train split, are for `oal_jax.data.stream`.
"""

from pathlib import Path

from oal_jax.config.class_names import CLASS_NAMES
from oal_jax.data import class_names, folders, manifest
from oal_jax.data.file_source import File, FileSource
from oal_jax.data.image_files import Decoding
from oal_jax.data.stored import SetSpec, Source
from oal_jax.errors import UserError

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


def open_list(spec: SetSpec) -> Source:
    """The images of an OpenOOD list, in its order.

    Raises:
      UserError: no such root or list; a bad line, with its number; a file that is missing in a
        manifest or differs from it.
    """
    root, id_set = folders.set_root(spec, _SUPPLY), spec.id_set
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
    as_openood = decoding(spec.name, id_set, spec.image_size, spec.channels or 3)
    return FileSource(spec, folder, files, names, as_openood, path, known)


def _is_classic(spec: SetSpec) -> bool:
    return spec.id_set in _CLASSIC or spec.name in _CLASSIC


def _list_name(spec: SetSpec) -> str:
    usual = f"{folders.SPLITS[spec.split]}_{spec.name.removeprefix('val_')}.txt"
    return _LISTS.get((spec.id_set, spec.name), usual)


def decoding(name: str, id_set: str, image_size: int, channels: int = 3) -> Decoding:
    """OpenOOD's preprocessing of the images of a list; size 0: its own."""
    classic = id_set in _CLASSIC
    size = image_size or (32 if classic else 224)
    whole = classic or name == "imagenet_c"
    return Decoding(channels, size if whole else size * 256 // 224, (size, size))


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
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_SUPPLY}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): {_SUPPLY}") from error


def _lines(path: Path, folder: Path, spec: SetSpec, classes: int) -> list[File]:
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
        if relative.startswith("/") or "\0" in relative or ".." in relative.split("/"):
            raise UserError(f"{source}: the path {relative!r} must lie below {folder}")
        if spec.labelled and not 0 <= label < classes:
            raise UserError(
                f"{source}: label {label} is out of range: {spec.id_set} has classes 0 to"
                f" {classes - 1}"
            )
        files.append(File(relative.lstrip(), label if spec.labelled else 0, number))
    if not files:
        raise UserError(f"{path} lists no images: {_SUPPLY}")
    return files
