"""Builds the embedded image sets from their raw files.

    pip install "oal_jax[prepare]"
    python -m tools.fashion_set.build --raw DIR --output oal_jax/data/embedded

Needs TensorFlow (extra `prepare`), because TFDS writes with it; reading needs none. DIR holds the
files of `raw_files`, in any sub-folders. They come in packages of Debian 12 and PyPI
(dataset-fashion-mnist, opencv-doc, lomiri-wallpapers-16.04 and -20.04, fonts-comic-neue,
fonts-dancingscript, fonts-humor-sans; matplotlib, scikit-image, scikit-learn).

Each set becomes a TFDS data set (`NAME/1.0.0`, file format array_record) of 28 x 28 x 1 PNG images
and integer labels. The same raw files give the same pixels, except that another version of Pillow
(13.0 for the embedded files) could draw the letters otherwise.
"""

import gzip
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from oal_jax.errors import UserError
from oal_jax.runtime.command import BareParser, guard
from tools.fashion_set import raw_files, synthesis
from tools.fashion_set.synthesis import Labelled

VERSION = "1.0.0"
# Classes of Fashion-MNIST in the ID set, by their original label.
ID_CLASSES = {
    0: "t-shirt",
    1: "trouser",
    2: "pullover",
    3: "dress",
    4: "coat",
    6: "shirt",
    7: "sneaker",
    9: "boot",
}
NEAR_CLASSES = {5: "sandal", 8: "bag"}
# Images a class. The train, validation and extra images come from the original train set.
TRAIN, VALIDATION, EXTRA, TEST = 1500, 125, 3500, 250
NEAR, FAR, OUTLIERS = 1000, 2000, 500
# Uncompressed PNGs in compressed groups of records take a third less than TFDS's compressed PNGs in
# groups of one: neighbours share headers and contents.
RECORD_OPTIONS = "group_size:256,zstd:19"

_MIT_FASHION = "MIT, (c) 2017 Zalando SE"
_DERIVED = "derived from Fashion-MNIST: " + _MIT_FASHION


class BuiltSet(NamedTuple):
    """One data set to write: its splits by name, its source and licence."""

    name: str
    splits: dict[str, Labelled]
    source: str
    licence: str


def find_raw(folder: Path) -> dict[str, Path]:
    """The path of every raw file below `folder`, by name.

    Raises:
      UserError: a file is missing, or none of its name has the expected sha256.
    """
    by_name: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            by_name.setdefault(path.name, []).append(path)
    raw_paths = {}
    for raw in (*raw_files.FASHION, raw_files.DIGITS, *raw_files.FONTS, *raw_files.PHOTOS):
        paths = by_name.get(raw.name, [])
        same = [p for p in paths if hashlib.sha256(p.read_bytes()).hexdigest() == raw.sha256]
        if not same:
            what = "has another sha256" if paths else "is missing"
            where = paths[0] if paths else folder / raw.name
            raise UserError(f"{where} {what}: get it from {raw.package} (sha256 {raw.sha256})")
        raw_paths[raw.name] = same[0]
    return raw_paths


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file (MNIST's format: magic, sizes, bytes)."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def first_of_each(images: UInt8[np.ndarray, "n h w"], seen: set[bytes]) -> Bool[np.ndarray, " n"]:
    """True where an image is not in `seen`, nor earlier in `images`; adds all to `seen`."""
    new = np.zeros(len(images), bool)
    for i, image in enumerate(images):
        digest = hashlib.sha256(image.tobytes()).digest()
        new[i] = digest not in seen
        seen.add(digest)
    return new


def choose(
    rng: np.random.Generator, labels: UInt8[np.ndarray, " n"], sizes: list[int]
) -> list[np.ndarray]:
    """Disjoint index sets, shuffled; the i-th has sizes[i] random images of each ID class."""
    parts: list[list[np.ndarray]] = [[] for _ in sizes]
    stops = np.cumsum(sizes)
    for original in ID_CLASSES:
        candidates = rng.permutation(np.flatnonzero(labels == original))
        for part, stop, size in zip(parts, stops, sizes, strict=True):
            part.append(candidates[stop - size : stop])
    return [rng.permutation(np.concatenate(part)) for part in parts]


def fashion_splits(
    raw: dict[str, Path],
) -> tuple[dict[str, Labelled], dict[str, Labelled]]:
    """The splits of the in-distribution set, and the near-OOD sets, of Fashion-MNIST.

    Exact duplicates are left out, so the splits share no image.
    """
    images, labels, test_images, test_labels = (read_idx(raw[f.name]) for f in raw_files.FASHION)
    rng = np.random.default_rng(20240625)
    seen: set[bytes] = set()
    test_new = first_of_each(test_images, seen)
    test_images, test_labels = test_images[test_new], test_labels[test_new]
    train_new = first_of_each(images, seen)
    images, labels = images[train_new], labels[train_new]
    names = tuple(ID_CLASSES.values())

    relabel = np.full(10, -1, np.int32)
    relabel[list(ID_CLASSES)] = np.arange(len(ID_CLASSES))
    chosen = choose(rng, labels, [TRAIN, VALIDATION, EXTRA])
    splits = {
        split: Labelled(images[index], relabel[labels[index]], names)
        for split, index in zip(("train", "validation", "extra"), chosen, strict=True)
    }
    (index,) = choose(rng, test_labels, [TEST])
    splits["test"] = Labelled(test_images[index], relabel[test_labels[index]], names)
    near = {}
    for original, name in NEAR_CLASSES.items():
        index = np.flatnonzero(test_labels == original)[:NEAR]
        near[name] = Labelled(test_images[index], np.zeros(len(index), np.int32), (name,))
    return splits, near


def digits(path: Path) -> Labelled:
    """`FAR` MNIST digits, equally many a class, of OpenCV's sheet of 50 x 100 tiles of 20 x 20."""
    rng = np.random.default_rng(3)
    with Image.open(path) as opened:
        sheet = np.asarray(opened.convert("L"))
    tiles = sheet.reshape(50, 20, 100, 20).transpose(0, 2, 1, 3).reshape(10, 500, 20, 20)
    chosen = np.stack([tiles[d][rng.permutation(500)[: FAR // 10]] for d in range(10)], axis=1)
    images = np.pad(chosen.reshape(FAR, 20, 20), ((0, 0), (4, 4), (4, 4)))
    labels = np.tile(np.arange(10, dtype=np.int32), FAR // 10)
    return Labelled(images, labels, tuple("0123456789"))


def all_sets(raw: dict[str, Path]) -> list[BuiltSet]:
    """Every embedded set, in memory."""
    splits, near = fashion_splits(raw)
    base = splits["validation"]
    seeded = np.random.default_rng
    fonts = [raw[f.name] for f in raw_files.FONTS]
    photos = [raw[f.name] for f in raw_files.PHOTOS]
    fashion = "Fashion-MNIST"
    outliers = {
        "val_rotated": synthesis.rotated(seeded(11), OUTLIERS, base),
        "val_jigsaw": synthesis.jigsaw(seeded(12), OUTLIERS, base),
        "val_blend": synthesis.blend(seeded(13), OUTLIERS, base),
    }
    synthetic = {
        "val_shapes": synthesis.shapes(seeded(14), OUTLIERS),
        "val_noise": synthesis.noise(seeded(15), OUTLIERS),
    }
    return [
        BuiltSet("fashion", splits, f"{fashion}, 8 of its 10 classes", _MIT_FASHION),
        *(BuiltSet(n, {"test": m}, f"{fashion}, test set", _MIT_FASHION) for n, m in near.items()),
        BuiltSet(
            "mnist",
            {"test": digits(raw[raw_files.DIGITS.name])},
            f"{raw_files.DIGITS.package}; {raw_files.DIGITS.author}",
            raw_files.DIGITS.licence,
        ),
        BuiltSet(
            "letters",
            {"test": synthesis.letters(seeded(1), FAR, fonts)},
            "rendered from the fonts named in LICENSES.md",
            "CC0 1.0",
        ),
        BuiltSet(
            "photos",
            {"test": synthesis.photo_crops(seeded(2), FAR, photos)},
            "crops of the photographs named in LICENSES.md; the label names the photograph",
            "each crop as its photograph, see LICENSES.md",
        ),
        *(
            BuiltSet(n, {"validation": m}, f"{fashion}, validation images", _DERIVED)
            for n, m in outliers.items()
        ),
        *(BuiltSet(n, {"validation": m}, "procedural", "CC0 1.0") for n, m in synthetic.items()),
    ]


def _examples(split: Labelled) -> Iterator[tuple[int, dict]]:
    for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png", compress_level=0)
        yield i, {"image": png.getvalue(), "label": int(label)}


def repack(path: Path) -> None:
    """Rewrites an array_record file with `RECORD_OPTIONS`, which TFDS can't set.

    Also sorts the features of each record. TFDS writes them in random order, and the same raw files
    must give the same bytes.
    """
    import tensorflow as tf
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    writer = array_record_module.ArrayRecordWriter(str(path), RECORD_OPTIONS)
    for record in records:
        example = tf.train.Example.FromString(record)
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()


def write_set(built: BuiltSet, output: Path) -> dict:
    """Writes one set below `output` as a TFDS data set; returns its entry of the manifest."""
    import tensorflow_datasets as tfds

    shutil.rmtree(output / built.name, ignore_errors=True)
    names = next(iter(built.splits.values())).class_names
    tfds.dataset_builders.store_as_tfds_dataset(
        name=built.name,
        version=VERSION,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=list(names)),
            }
        ),
        split_datasets={name: list(_examples(split)) for name, split in built.splits.items()},
        data_dir=output,
        description=f"{built.source}. Licence: {built.licence}.",
        file_format="array_record",
        disable_shuffling=True,
    )
    folder = output / built.name / VERSION
    for path in folder.glob("*.array_record-*"):
        repack(path)
    return {
        "directory": f"{built.name}/{VERSION}",
        "splits": {name: len(split.images) for name, split in built.splits.items()},
        "class_names": list(names),
        "source": built.source,
        "licence": built.licence,
        "files": {p.relative_to(output).as_posix(): _entry(p) for p in sorted(folder.iterdir())},
    }


def _entry(path: Path) -> dict:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def build(raw: Path, output: Path) -> None:
    """Builds every set and `manifest.json`; leaves `LICENSES.md` in `output` as it is.

    Raises:
      UserError: a raw file is missing or differs, or `LICENSES.md` is not in `output`.
    """
    licences = output / "LICENSES.md"
    if not licences.is_file():
        raise UserError(f"{licences} is missing: take it from the repository, the data needs it")
    if not raw.is_dir():
        raise UserError(f"{raw} is no folder: give --raw the folder with the raw files")
    sets = {built.name: write_set(built, output) for built in all_sets(find_raw(raw))}
    manifest = {"sets": sets, "files": {licences.name: _entry(licences)}}
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def run(argv: Sequence[str]) -> None:
    """Parse the arguments and build."""
    parser = BareParser("python -m tools.fashion_set.build", __doc__)
    parser.add_argument("--raw", type=Path, required=True, help="folder with the raw files")
    parser.add_argument("--output", type=Path, required=True, help="where the sets are written")
    arguments = parser.parse_args(argv[1:])
    build(arguments.raw, arguments.output)


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
