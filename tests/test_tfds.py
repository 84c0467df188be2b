"""TFDS sets in array_record, written here without TensorFlow: features, splits, sizes, faults."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_sets import PACKAGE, a_class, an_image, png, write

from oal_jax.data import manifest, sources
from oal_jax.data.stored import SetSpec
from oal_jax.errors import UserError

RNG = np.random.default_rng(0)


def pixels(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (count, height, width, channels) if channels > 1 else (count, height, width)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def photos(count: int, side: int = 12, classes: int = 2, channels: int = 3) -> list[dict]:
    images = pixels(count, side, side, channels)
    return [{"image": png(image), "label": i % classes} for i, image in enumerate(images)]


SMALL = {"image": an_image((12, 12, 3)), "label": a_class(2)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "pets", {"train": photos(10), "test": photos(4)}, SMALL, shards=2)
    return tmp_path


def load(root: Path, name: str = "pets", split: str = "train", **more) -> sources.ImageSet:
    return sources.load("tfds", name, split, root=str(root), **{"id_set": "pets", **more})


def refused(match: str, *args, **kwargs) -> str:
    with pytest.raises(UserError, match=match) as error:
        load(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def decoded(examples: list[dict], key: str = "image") -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(e[key]))) for e in examples])


def test_shards_are_read_in_order(tmp_path):
    examples = photos(11, classes=3)
    features = {"image": an_image((12, 12, 3)), "label": a_class(3)}
    write(tmp_path, "pets", {"train": examples}, features, shards=3)
    data = load(tmp_path)
    assert data.name == "pets/train" and data.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(data.images, decoded(examples))
    assert data.labels.tolist() == [e["label"] for e in examples]
    np.testing.assert_array_equal(load(tmp_path, limit=4).images, decoded(examples)[:4])
    held = sources.open_source(SetSpec("tfds", "pets", "train", root=str(tmp_path)))
    assert held.labels().tolist() == data.labels.tolist()
    assert "pets-train.array_record-00001-of-00003" in held.where(3)
    assert held.where(3).startswith("record 0 of ")


def test_features_are_recognised_by_their_types(tmp_path):
    scans = pixels(4, 9, 9)
    other = [{"scan": png(p), "file_name": b"x", "diagnosis": i % 2} for i, p in enumerate(scans)]
    text = {"pythonClassName": f"{PACKAGE}.text_feature.Text", "text": {}}
    features = {"scan": an_image((9, 9, 3)), "file_name": text, "diagnosis": a_class(2)}
    write(tmp_path, "scans", {"train": other}, features)
    data = load(tmp_path, "scans", id_set="scans")
    np.testing.assert_array_equal(data.images, scans)
    assert data.labels.tolist() == [0, 1, 0, 1]
    # Among several of a type, the one with the usual name.
    both = [{**e, "coarse": 0} for e in photos(3, classes=3)]
    features = {"image": an_image((12, 12, 3)), "label": a_class(3), "coarse": a_class(2)}
    write(tmp_path, "fine", {"train": both}, features)
    assert load(tmp_path, "fine", id_set="fine").labels.tolist() == [0, 1, 2]
    features["fine"] = features.pop("label")
    write(tmp_path, "vague", {"train": both}, features)
    refused("several features of type ClassLabel .coarse, fine.", tmp_path, "vague")


def test_sets_become_like_the_id_set(root):
    gray = pixels(3, 12, 12, 1)
    write(
        root,
        "gray",
        {"test": [{"image": png(g), "label": 7} for g in gray]},
        {"image": an_image((12, 12, 1)), "label": a_class(10)},
    )
    data = load(root, "gray", "test", labelled=False)
    np.testing.assert_array_equal(data.images, np.repeat(gray[..., None], 3, -1))
    assert data.labels.tolist() == [0, 0, 0] and data.class_names == ("ood",)
    # Sizes that vary, an alpha channel, no labels: the shorter side and the centre.
    wide = np.zeros((24, 60, 3), np.uint8)
    wide[:, 18:42] = 200
    clear = np.full((12, 12, 4), 90, np.uint8)
    examples = [{"image": png(wide)}, {"image": png(wide.swapaxes(0, 1))}, {"image": png(clear)}]
    write(root, "wild", {"test": examples}, {"image": an_image((None, None, 4))})
    data = load(root, "wild", "test", labelled=False)
    assert data.images.shape == (3, 12, 12, 3)
    assert (data.images[:2, 2:-2, 2:-2] == 200).all()
    assert (data.images[2] == round(90 * 90 / 255)).all()  # over black
    assert load(root, "wild", "test", labelled=False, image_size=8).images.shape == (3, 8, 8, 3)
    refused("no feature of type ClassLabel: 'wild' can be an OOD set only", root, "wild", "test")
    # An ID set of gray images makes others gray.
    colour = load(root, "pets", "test", id_set="gray", labelled=False)
    assert colour.images.shape == (4, 12, 12, 1)


def test_large_images_of_imagenet_lose_their_margin(tmp_path):
    wide = np.zeros((64, 80, 3), np.uint8)
    wide[4:60, 12:68] = 255  # 56 of 64 pixels
    examples = [{"image": png(wide), "label": 0}]
    features = {"image": an_image((None, None, 3)), "label": a_class(2)}
    write(tmp_path, "imagenet2012", {"train": examples}, features)
    data = load(tmp_path, "imagenet", id_set="imagenet", image_size=56)
    assert data.images.shape == (1, 56, 56, 3) and (data.images == 255).all()


def test_images_of_several_sizes_ask_for_one(tmp_path):
    examples = [{"image": png(p), "label": 0} for p in (*pixels(2, 9, 9), *pixels(1, 9, 12))]
    features = {"image": an_image((None, None, 3)), "label": a_class(2)}
    write(tmp_path, "pets", {"train": examples}, features)
    message = refused("set data.image_size", tmp_path)
    assert "record 2 of" in message and "is 12 x 9 pixels" in message
    assert load(tmp_path, image_size=6).images.shape == (3, 6, 6, 3)


def test_splits_of_the_config(root):
    whole, tail = load(root), ("train[:-3]", "train[-3:]", "test")
    train, validation, test = (
        load(root, split=split, id_splits=tail) for split in ("train", "validation", "test")
    )
    assert validation.name == "pets/validation"
    np.testing.assert_array_equal(np.concatenate([train.images, validation.images]), whole.images)
    assert len(validation.images) == 3 and len(test.images) == 4
    spec = SetSpec("tfds", "pets", "validation", root=str(root), id_set="pets", id_splits=tail)
    held = sources.open_source(spec)
    assert held.where(0).startswith("record 2 of ")
    assert "00001-of-00002" in held.where(0)
    own = load(root, "pets@train[2:4]", "test", id_set="pets", labelled=False)
    np.testing.assert_array_equal(own.images, whole.images[2:4])
    assert own.name == "pets@train[2:4]"
    refused("'pets' has no split 'validation': choose one of test, train; .*id_splits", root,
            split="validation")  # fmt: skip
    refused("split 'train.x.' of 'pets'", root, id_splits=("train[x]", "a", "b"))


def test_what_is_not_there_is_named(root):
    where = f"--file_format=array_record --data_dir={root}"
    refused(f"in {root}/cifar10: run tfds build cifar10 {where}", root, "cifar10")
    # OpenOOD's names stand for TFDS's.
    refused(f"tfds build svhn_cropped {where}", root, "svhn")
    message = refused("TFDS has none of that name", root, "tin")
    assert f"prepare your own in {root}/tin/VERSION" in message
    refused("only 1.0.0: TFDS has none of that name", root, "pets:2.0.0")
    (root / "other" / "a" / "1.0.0").mkdir(parents=True)
    (root / "other" / "b" / "1.0.0").mkdir(parents=True)
    for config in "ab":
        (root / "other" / config / "1.0.0" / "dataset_info.json").write_text("{}")
    refused("only a, b", root, "other")


def test_wrong_kinds_are_named(root):
    tensor = {"pythonClassName": f"{PACKAGE}.text_feature.Text", "text": {}}
    write(root, "words", {"train": [{"text": b"x"}]}, {"text": tensor})
    refused(r"has features \['text'\]: one must be an Image", root, "words")
    write(
        root, "deep", {"train": photos(1)},
        {"image": an_image((12, 12, 1), "uint16"), "label": a_class(2)},
    )  # fmt: skip
    refused("images in .*deep/1.0.0 are uint16 with 1 channels", root, "deep", id_set="deep")
    features = {"image": an_image((12, 12, 3)), "label": a_class(3)}
    write(root, "three", {"test": photos(3, classes=3)}, features)
    refused("'three' has 3 classes, the ID set 'pets' 2", root, "three", "test")
    write(root, "empty", {"train": []}, SMALL)
    refused("holds no images", root, "empty", id_set="empty")


def test_damaged_images_are_named_or_skipped(tmp_path, capsys):
    examples = photos(6)
    examples[4]["image"] = b"nothing"
    write(tmp_path, "pets", {"train": examples}, SMALL, shards=2)
    message = refused(
        "can't be decoded .not an image.: replace it, .* data.on_corrupt=skip", tmp_path
    )
    assert "record 1 of" in message and "pets-train.array_record-00001-of-00002" in message
    data = load(tmp_path, on_corrupt="skip")
    line = capsys.readouterr().err
    assert line.startswith("oal_jax: pets/train: skipped 1 of 6 images (record 1 of")
    assert data.labels.tolist() == [0, 1, 0, 1, 1]
    sound = [e for i, e in enumerate(examples) if i != 4]
    np.testing.assert_array_equal(data.images, decoded(sound))


def test_files_are_compared_with_their_manifest(root):
    before = load(root)
    assert manifest.write(root) == 6
    np.testing.assert_array_equal(load(root).images, before.images)
    file = next((root / "pets/1.0.0").glob("*train*-00001-of-*"))
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(f"{file} differs from its sha256 in {root}/SHA256SUMS", root)
    refused("differs", root, split="test")  # the set is one
    file.unlink()
    refused(f"{file} is missing", root)
    file.write_bytes(data)
    assert len(load(root).images) == 10
    (file.parent / "more.txt").write_text("x")
    refused("more.txt is not in .*SHA256SUMS", root)
