"""The embedded image sets and their readers."""

import functools
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oal_jax.config.benchmarks import BENCHMARKS
from oal_jax.data import bundled, corruptions, sources
from oal_jax.errors import UserError
from tools.fashion_set import build, synthesis

FASHION = BENCHMARKS["fashion"]
ID_SPLITS = {"train": 12_000, "extra": 28_000, "validation": 1_000, "test": 2_000}
OUTLIERS = {
    "sandal": ("test", 1_000),
    "bag": ("test", 1_000),
    "mnist": ("test", 2_000),
    "letters": ("test", 2_000),
    "photos": ("test", 2_000),
    "val_rotated": ("validation", 500),
    "val_jigsaw": ("validation", 500),
    "val_blend": ("validation", 500),
    "val_shapes": ("validation", 500),
    "val_noise": ("validation", 500),
}


@functools.cache
def read(name: str, split: str) -> sources.ImageSet:
    return sources.load("bundled", name, split)


def distinct(image_set: sources.ImageSet) -> set[bytes]:
    return {image.tobytes() for image in image_set.images}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the embedded MNIST digits and their manifest, free to be damaged."""
    root = bundled.embedded_root()
    shutil.copytree(root / "mnist", tmp_path / "mnist")
    shutil.copy(root / "manifest.json", tmp_path)
    return tmp_path


def records(tree: Path) -> Path:
    return next((tree / "mnist" / "1.0.0").glob("*.array_record-*"))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("split", "count"), ID_SPLITS.items())
def test_fashion_is_complete_and_balanced(split: str, count: int) -> None:
    loaded = read("fashion", split)
    assert loaded.name == f"fashion/{split}"
    assert loaded.images.shape == (count, 28, 28, 1)
    assert loaded.images.dtype == np.uint8
    assert loaded.labels.dtype == np.int32
    assert len(set(loaded.class_names)) == 8
    np.testing.assert_array_equal(np.bincount(loaded.labels), [count // 8] * 8)
    # Shuffled: a prefix (limit) holds all the classes.
    assert set(loaded.labels[:100]) == set(range(8))


def test_fashion_splits_share_no_image() -> None:
    hashes = {split: distinct(read("fashion", split)) for split in ID_SPLITS}
    for split, count in ID_SPLITS.items():
        assert len(hashes[split]) == count, f"duplicates within {split}"
    for a, b in itertools.combinations(ID_SPLITS, 2):
        assert not hashes[a] & hashes[b], f"{a} and {b} share images"


def test_benchmark_names_every_embedded_set() -> None:
    manifest = bundled.read_manifest(bundled.embedded_root())
    groups = FASHION.near + FASHION.far + FASHION.validation
    assert len(groups) == len(set(groups))
    assert {FASHION.id_set, *groups} == set(manifest["sets"])
    assert set(groups) == set(OUTLIERS)
    # The covariate-shifted sets are made of embedded ones when they are read.
    assert set(FASHION.csid) == set(corruptions.SETS)
    assert not set(FASHION.csid) & {FASHION.id_set, *groups}


@pytest.mark.parametrize("name", OUTLIERS)
def test_outliers_are_complete_and_balanced(name: str) -> None:
    split, count = OUTLIERS[name]
    loaded = read(name, split)
    assert loaded.images.shape == (count, 28, 28, 1)
    assert loaded.images.dtype == np.uint8
    # No blank image, and no more than chance repeats.
    assert loaded.images.std(axis=(1, 2, 3)).min() > 3
    assert len(distinct(loaded)) == count
    if not name.startswith(("val_rotated", "val_jigsaw", "val_blend")):
        counts = np.bincount(loaded.labels, minlength=len(loaded.class_names))
        assert counts.max() - counts.min() <= 1


def test_no_image_is_in_two_sets() -> None:
    hashes = {name: distinct(read(name, split)) for name, (split, _) in OUTLIERS.items()}
    hashes |= {f"fashion/{split}": distinct(read("fashion", split)) for split in ID_SPLITS}
    hashes |= {name: distinct(read(name, "test")) for name in FASHION.csid}
    assert len(set().union(*hashes.values())) == sum(map(len, hashes.values()))


def test_rotated_images_are_turned_validation_images() -> None:
    originals = distinct(read("fashion", "validation"))
    for image in read("val_rotated", "validation").images[:50]:
        assert {np.rot90(image, k).tobytes() for k in (1, 3)} & originals


def test_jigsaw_images_are_rearranged_validation_images() -> None:
    originals = distinct(read("fashion", "validation"))
    for image in read("val_jigsaw", "validation").images[:20]:
        parts = [image[y : y + 14, x : x + 14] for y in (0, 14) for x in (0, 14)]
        orders = list(itertools.permutations(parts))
        restored = {
            np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)]).tobytes()
            for a, b, c, d in orders[1:]
        }
        assert restored & originals


def test_classes_look_like_their_names() -> None:
    fashion = read("fashion", "train")
    mean = {
        name: fashion.images[fashion.labels == label].mean(axis=0)[..., 0]
        for label, name in enumerate(fashion.class_names)
    }
    # Shoes are empty at the top, coats are not; pullovers have sleeves, trousers are narrow.
    for shoe in ("sneaker", "boot"):
        assert mean[shoe][:4].mean() < 0.5 * mean["coat"][:4].mean()
    assert mean["sneaker"][:8].mean() < 0.5 * mean["boot"][:8].mean()
    assert mean["trouser"][:, :6].mean() < 0.2 * mean["pullover"][:, :6].mean()
    digits = read("mnist", "test")
    assert digits.class_names == tuple("0123456789")
    # The digits keep MNIST's margin of 4 pixels; a zero is hollow, a one is not.
    assert not digits.images[:, [0, 1, 2, 3, -1, -2, -3, -4]].any()
    centre = digits.images[:, 12:16, 12:16].mean(axis=(1, 2, 3))
    assert centre[digits.labels == 0].mean() < 0.3 * centre[digits.labels == 1].mean()
    # Photographs fill the frame, the other far sets are figures on black.
    assert (read("photos", "test").images[:, 0, 0] > 0).mean() > 0.9
    assert (read("letters", "test").images[:, 0, 0] == 0).mean() > 0.99


def test_manifest_covers_every_file_and_the_size_limit() -> None:
    root = bundled.embedded_root()
    manifest = bundled.read_manifest(root)
    listed = set(manifest["files"]) | {"manifest.json"}
    for entry in manifest["sets"].values():
        listed |= set(entry["files"])
        assert entry["source"] and entry["licence"]
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert present == listed
    assert sum((root / path).stat().st_size for path in present) <= 23_000_000


def test_limit_reads_the_first_images() -> None:
    few = sources.load("bundled", "fashion", "train", limit=7)
    np.testing.assert_array_equal(few.images, read("fashion", "train").images[:7])
    np.testing.assert_array_equal(few.labels, read("fashion", "train").labels[:7])
    with pytest.raises(UserError, match="limit"):
        sources.load("bundled", "fashion", "train", limit=-1)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
def test_damaged_file_is_named(tree: Path, damage) -> None:
    assert len(sources.load("bundled", "mnist", "test", root=str(tree), limit=3).images) == 3
    damage(records(tree))
    with pytest.raises(UserError) as error:
        sources.load("bundled", "mnist", "test", root=str(tree))
    message = one_line(error)
    assert str(records(tree) if damage is not Path.unlink else "mnist-test") in message
    assert "python -m tools.fashion_set.build" in message


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_damaged_manifest_is_named(tree: Path, text: str | None) -> None:
    path = tree / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="manifest.json"):
        sources.load("bundled", "mnist", "test", root=str(tree))


def test_unknown_names_list_the_choices() -> None:
    for arguments, expected in (
        (("folders", "mnist", "test"), "bundled, tfds, imglist, folder"),
        (("bundled", "cifar", "test"), "fashion"),
        (("bundled", "mnist", "train"), "test"),
    ):
        with pytest.raises(UserError) as error:
            sources.load(*arguments)
        assert expected in one_line(error)


def test_tfds_source_reads_the_same(tree: Path) -> None:
    loaded = sources.load("tfds", "mnist", "test", root=str(tree))
    np.testing.assert_array_equal(loaded.images, read("mnist", "test").images)
    pinned = sources.load("tfds", "mnist:1.0.0", "test", root=str(tree), limit=2)
    assert len(pinned.images) == 2


def test_missing_tfds_set_names_the_command(tree: Path) -> None:
    for name in ("cifar10", "mnist:9.9.9"):
        with pytest.raises(UserError) as error:
            sources.load("tfds", name, "test", root=str(tree))
        command = f"tfds build {name} --file_format=array_record --data_dir={tree}"
        assert command in one_line(error)


@pytest.mark.parametrize("name", ["records", "features.json", "dataset_info.json"])
def test_damaged_tfds_set_names_the_command(tree: Path, name: str) -> None:
    if name == "records":
        damage_truncate(records(tree))
    else:
        (tree / "mnist" / "1.0.0" / name).write_text("{")
    with pytest.raises(UserError) as error:
        sources.load("tfds", "mnist", "test", root=str(tree))
    assert "tfds build mnist" in one_line(error)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_labels_out_of_range_are_reported(tree: Path) -> None:
    folder = tree / "mnist" / "1.0.0"
    (folder / "label.labels.txt").write_text("0\n1\n2\n")

    def three_classes(features: dict) -> None:
        features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "3"

    edit(folder / "features.json", three_classes)
    with pytest.raises(UserError, match="label 3 of image 3 of mnist/test .* 3 classes"):
        sources.load("tfds", "mnist", "test", root=str(tree))


def test_wrong_shape_is_reported(tree: Path) -> None:
    def larger(features: dict) -> None:
        shape = features["featuresDict"]["features"]["image"]["image"]["shape"]
        shape["dimensions"] = ["32", "32", "1"]

    edit(tree / "mnist" / "1.0.0" / "features.json", larger)
    with pytest.raises(UserError, match=r"record 0 of .*shape is \(28, 28\), the set's \(32"):
        sources.load("tfds", "mnist", "test", root=str(tree))


def test_other_file_format_names_the_command(tree: Path) -> None:
    edit(
        tree / "mnist" / "1.0.0" / "dataset_info.json",
        lambda info: info.update(fileFormat="tfrecord"),
    )
    with pytest.raises(UserError) as error:
        sources.load("tfds", "mnist", "test", root=str(tree))
    assert "tfrecord" in one_line(error)
    assert "--file_format=array_record" in one_line(error)


def test_made_outliers_depend_on_the_seed_alone() -> None:
    for make in (synthesis.shapes, synthesis.noise):
        first, again, other = (make(np.random.default_rng(seed), 8).images for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_build_names_the_missing_raw_file_and_its_package(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(UserError, match="train-images.* is missing: .*dataset-fashion-mnist"):
        build.find_raw(raw)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"other")
    with pytest.raises(UserError, match="train-images.* has another sha256"):
        build.find_raw(raw)


def test_build_command_ends_with_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tools.fashion_set.build",
        "--raw",
        tmp_path,
        "--output",
        tmp_path,
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1 and "LICENSES.md" in run.stderr


def test_reading_is_quiet_and_needs_no_tensorflow() -> None:
    code = (
        "import sys; from oal_jax.data import sources;"
        "assert 'tensorflow_datasets' not in sys.modules, 'imported before it is needed';"
        "sources.load('bundled', 'mnist', 'test', limit=5);"
        "assert 'tensorflow' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
