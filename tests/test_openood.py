"""Image files: OpenOOD's lists and folders of classes, and their faults."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oal_jax.data import sources, stored
from oal_jax.data.image_files import Decoding, decode
from oal_jax.errors import UserError

CAT, DOG = 3, 5  # labels of CIFAR-10


def photo(path: Path, width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth random image with detail, written to `path`."""
    rng = np.random.default_rng(seed)
    channels = (3,) if mode == "RGB" else ()
    coarse = rng.integers(0, 256, (7, 5, *channels), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    fine = rng.normal(0, 20, (height, width, *channels))
    image = Image.fromarray(np.clip(np.asarray(image) + fine, 0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


@pytest.fixture
def digits() -> sources.ImageSet:
    return sources.load("bundled", "mnist", "test", limit=12)


def openood(root: Path, lines: list[str], listed: str = "cifar10/test_cifar10.txt") -> Path:
    """Writes a list of OpenOOD's; returns its path."""
    path = root / "benchmark_imglist" / listed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return path


def load(root: Path, name: str = "cifar10", split: str = "test", **more) -> sources.ImageSet:
    return sources.load("imglist", name, split, root=str(root), **more)


def refused(match: str, function, *args, **kwargs) -> str:
    with pytest.raises(UserError, match=match) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def independent(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """Triangle filter, widened where it reduces, by matrix products in float64; then the centre."""

    def weights(old: int, new: int) -> np.ndarray:
        scale = old / new
        centres = (np.arange(new) + 0.5) * scale
        distance = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(scale, 1.0)
        triangle = np.clip(1 - distance, 0, None)
        return triangle / triangle.sum(axis=1, keepdims=True)

    pixels = np.asarray(image.convert("RGB"), np.float64)
    height, width = pixels.shape[:2]
    new = (resize * height // min(height, width), resize * width // min(height, width))
    if new != (height, width):
        pixels = np.einsum("yh,hwc->ywc", weights(height, new[0]), pixels)
        pixels = np.einsum("xw,ywc->yxc", weights(width, new[1]), pixels)
    top, left = (round((side - crop) / 2) for side in new)
    return pixels[top : top + crop, left : left + crop]


SIZES = [(64, 64), (100, 37), (37, 100), (33, 35), (20, 31), (32, 32), (401, 300)]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_small_images_are_preprocessed_as_openood_does(tmp_path, suffix):
    lines, expected = [], []
    for i, (width, height) in enumerate(SIZES):
        path = tmp_path / "images_classic" / f"tin/{i}.{suffix}"
        photo(path, width, height, i, "L" if i == 2 else "RGB")
        lines.append(f"tin/{i}.{suffix} -1")
        with Image.open(path) as image:
            expected.append(independent(image, 32, 32))
    openood(tmp_path, lines, "cifar100/test_tin.txt")
    loaded = load(tmp_path, "tin", id_set="cifar100", labelled=False)
    assert loaded.images.shape == (len(SIZES), 32, 32, 3)
    assert np.abs(loaded.images - np.stack(expected)).max() <= 1


def test_large_images_are_preprocessed_as_openood_does(tmp_path):
    data = tmp_path / "images_largescale"
    images = [photo(data / f"imagenet_1k/{i}.png", *size, i) for i, size in enumerate(SIZES)]
    photo(data / "imagenet_c/snow.png", 224, 224)
    openood(tmp_path, [f"imagenet_1k/{i}.png {i}" for i in range(7)], "imagenet/test_imagenet.txt")
    openood(tmp_path, ["imagenet_c/snow.png 999"], "imagenet/test_imagenet_c.txt")
    loaded = load(tmp_path, "imagenet")
    expected = np.stack([independent(image, 256, 224) for image in images])
    assert np.abs(loaded.images - expected).max() <= 1
    # Another size keeps the share that the crop leaves.
    small = load(tmp_path, "imagenet", image_size=56)
    expected = np.stack([independent(image, 64, 56) for image in images])
    assert np.abs(small.images - expected).max() <= 1
    # ImageNet-C has its size already.
    shifted = load(tmp_path, "imagenet_c", id_set="imagenet")
    with Image.open(data / "imagenet_c/snow.png") as image:
        np.testing.assert_array_equal(shifted.images[0], image)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (256, 224), (64, 56)])
def test_preprocessing_is_torchvisions(tmp_path, resize, crop):
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(crop),
        ]
    )
    for i, size in enumerate([*SIZES, (500, 333), (375, 500), (1023, 257), (224, 224)]):
        image = photo(tmp_path / "x.png", *size, i)
        decoding = Decoding(3, resize, (crop, crop))
        np.testing.assert_array_equal(decode(tmp_path / "x.png", decoding), theirs(image))


def test_lists_keep_their_order_and_paths_may_hold_spaces(tmp_path, digits):
    names = ["b c/two  words.png", "a/0.jpg", "z.png", "a/1 2.png"]
    for name, image in zip(names, digits.images, strict=False):
        path = tmp_path / "images_classic" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(image[..., 0], 2)).save(path, quality=95)
    labels = [DOG, CAT, 0, 9]
    lines = [f"{name} {label}" for name, label in zip(names, labels, strict=True)]
    openood(tmp_path, [*lines[:2], "", lines[2] + "\r", lines[3] + " ", ""])
    loaded = load(tmp_path)
    assert loaded.name == "cifar10/test"
    assert loaded.labels.tolist() == labels
    assert loaded.labels.dtype == np.int32
    for i, image in enumerate(loaded.images):
        gray = np.pad(digits.images[i], ((2, 2), (2, 2), (0, 0)))
        error = np.abs(image.astype(int) - gray)
        assert error.max() == 0 if names[i].endswith("png") else error.mean() < 4


def test_text_files_may_begin_with_a_byte_order_mark(tmp_path):
    photo(tmp_path / "images_largescale/n01443537/x.png", 8, 8)
    path = openood(tmp_path, ["n01443537/x.png 1"], "imagenet200/val_imagenet200.txt")
    path.write_text(path.read_text(), "utf-8-sig")
    (path.parent / "classes.txt").write_text(
        "".join(f"thing {i}\n" for i in range(200)), "utf-8-sig"
    )
    loaded = load(tmp_path, "imagenet200", "validation", image_size=8)
    assert len(loaded.images) == 1 and loaded.class_names[0] == "thing 0"


def test_limit_takes_of_every_class_in_order(tmp_path):
    # OpenOOD's lists are sorted by class.
    lines = []
    for i in range(30):
        photo(tmp_path / f"images_classic/{i}.png", 8, 8, i)
        lines.append(f"{i}.png {i // 10}")
    openood(tmp_path, lines)
    openood(tmp_path, [f"{i}.png -1" for i in range(30)], "cifar10/test_svhn.txt")
    whole = load(tmp_path)
    few = load(tmp_path, limit=5)
    assert few.labels.tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_array_equal(few.images, whole.images[[0, 1, 10, 11, 20]])
    assert len(load(tmp_path, limit=31).images) == 30
    outliers = load(tmp_path, "svhn", id_set="cifar10", labelled=False, limit=3)
    np.testing.assert_array_equal(outliers.images, whole.images[[0, 10, 20]])


def test_classes_of_imagenet_can_be_named(tmp_path):
    photo(tmp_path / "images_largescale/x.png", 8, 8)
    openood(tmp_path, ["x.png 1"], "imagenet200/val_imagenet200.txt")
    loaded = load(tmp_path, "imagenet200", "validation", image_size=8)
    assert loaded.class_names[1] == "class 1"
    path = tmp_path / "benchmark_imglist/imagenet200/classes.txt"
    path.write_text("".join(f"thing {i}\n" for i in range(200)))
    loaded = load(tmp_path, "imagenet200", "validation", image_size=8)
    assert loaded.class_names[1] == "thing 1"
    path.write_text("cat\ndog\n")
    refused("classes.txt has 2 names: imagenet200 has 200", load, tmp_path, "imagenet200")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x.png 0", "x.png"], r"test_cifar10.txt, line 2: 'x.png' is not 'relative/path label'"),
        (["x.png cat"], "line 1: 'x.png cat' is not 'relative/path label'"),
        (["7"], "line 1: '7' is not"),
        (["x.png 0", "", "x.png 10"], "line 3: label 10 is out of range: cifar10 .* 0 to 9"),
        (["x.png -1"], "line 1: label -1 is out of range"),
        (["x.png 0", "gone.png 0"], "line 2: .*gone.png cannot be read .*No such file"),
        (["/x.png 0"], r"line 1: the path ./x\.png. must"),
        (["a/../../x.png 0"], r"line 1: the path .a/\.\./\.\./x\.png. must"),
        (["a\0.png 0"], r"line 1: the path .*png. must"),
        (["x.png 0", "text.png 1"], "line 2: .*text.png can't be decoded .*not an image"),
        (["cut.png 1"], "line 1: .*cut.png can't be decoded .*on_corrupt=skip"),
        (["cut.jpg 1"], "line 1: .*cut.jpg can't be decoded .*truncated"),
        (["folder 1"], "line 1: .*folder cannot be read .*Is a directory"),
        ([], "test_cifar10.txt lists no images"),
        (["", " "], "test_cifar10.txt lists no images"),
    ],
)
def test_faults_name_the_list_and_the_line(tmp_path, lines, message):
    data = tmp_path / "images_classic"
    for name in ("x.png", "cut.png", "cut.jpg"):
        photo(data / name, 64, 48)
    for name in ("cut.png", "cut.jpg"):
        content = (data / name).read_bytes()
        (data / name).write_bytes(content[: len(content) // 2])
    (data / "text.png").write_text("not an image")
    (data / "folder").mkdir()
    openood(tmp_path, lines)
    refused(message, load, tmp_path)


def test_damaged_images_are_skipped_and_counted_when_asked(tmp_path, capsys):
    lines = []
    for i in range(6):
        photo(tmp_path / f"images_classic/{i}.png", 32, 32, i)
        lines.append(f"{i}.png {i}")
    openood(tmp_path, lines)
    whole = load(tmp_path)
    for i in (0, 4):
        (tmp_path / f"images_classic/{i}.png").write_bytes(b"nothing")
    loaded = load(tmp_path, on_corrupt="skip")
    assert "cifar10/test: 4 images; skipped 2 of 6 images (" in capsys.readouterr().err
    assert loaded.labels.tolist() == [1, 2, 3, 5]
    np.testing.assert_array_equal(loaded.images, whole.images[[1, 2, 3, 5]])
    # A missing file is a wrong list, not a damaged image.
    (tmp_path / "images_classic/1.png").unlink()
    refused("line 2: .*1.png cannot be read", load, tmp_path, on_corrupt="skip")
    refused("'ignore' is not one of error, skip", load, tmp_path, on_corrupt="ignore")
    openood(tmp_path, ["0.png 0", "4.png 0"])
    refused("none of the 2 images of cifar10/test can", load, tmp_path, on_corrupt="skip")


def test_what_is_not_there_is_named_with_where_to_get_it(tmp_path):
    supply = "benchmark_imglist, images_classic, images_largescale.* scripts/download"
    refused(f"data.root={tmp_path}/no does not exist: .*{supply}", load, tmp_path / "no")
    refused(f"data.root is empty: .*{supply}", sources.load, "imglist", "cifar10", "test")
    refused(f"cifar10/test_cifar10.txt cannot be read .*{supply}", load, tmp_path)
    refused("no lists for the ID set 'mine': choose .*data.source=folder", load, tmp_path, "mine")
    refused("'cifar10' has no split 'extra'", load, tmp_path, "cifar10", "extra")
    openood(tmp_path, ["cifar10c/0.png 3"], "cifar10/test_cifar10c.txt")
    refused("0.png cannot be read .* data.csid=none", load, tmp_path, "cifar10c", id_set="cifar10")
    openood(tmp_path, [""]).write_bytes(b"\xff\xfe 0\n")
    refused("test_cifar10.txt is not UTF-8", load, tmp_path)


def test_too_many_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    photo(tmp_path / "images_largescale/x.png", 8, 8)
    openood(tmp_path, ["x.png 0"] * 50, "imagenet/train_imagenet.txt")
    monkeypatch.setattr(stored, "MAX_BYTES", 20 * 64 * 64 * 3)
    assert len(load(tmp_path, "imagenet", "train", image_size=64, limit=20).images) == 20
    refused("the 50 images of imagenet/train .* GiB", load, tmp_path, "imagenet", "train")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two classes with 3 and 2 training images, an OOD set with folders and one without."""
    for i, name in enumerate(
        [
            *("mine/train/cat/b.png", "mine/train/cat/a.PNG", "mine/train/cat/sub/c.jpg"),
            *("mine/train/dog/x.png", "mine/train/dog/y.png", "mine/val/dog/v w.png"),
            *("rocks/test/big/r.png", "rocks/test/q.png", "foggy/test/dog/f.png"),
        ]
    ):
        photo(tmp_path / name, 24, 24, i)
    (tmp_path / "mine/train/cat/notes.txt").write_text("not an image")
    (tmp_path / "mine/train/cat/._a.png").write_bytes(b"left by a file manager")
    return tmp_path


def folder(root: Path, name: str = "mine", split: str = "train", **more) -> sources.ImageSet:
    return sources.load("folder", name, split, root=str(root), **{"id_set": "mine", **more})


def test_folders_are_classes_taken_in_turn(own):
    loaded = folder(own)
    assert loaded.class_names == ("cat", "dog")
    assert loaded.labels.tolist() == [0, 1, 0, 1, 0]
    for image, name in zip(
        loaded.images[:4], ["cat/a.PNG", "dog/x.png", "cat/b.png", "dog/y.png"], strict=True
    ):
        np.testing.assert_array_equal(image, Image.open(own / "mine/train" / name))
    np.testing.assert_array_equal(folder(own, limit=3).images, loaded.images[:3])
    # A split or shifted set that lacks a class keeps the labels.
    assert folder(own, split="validation").labels.tolist() == [1]
    assert folder(own, "foggy", "test").class_names == ("cat", "dog")
    assert folder(own, "foggy", "test").labels.tolist() == [1]
    rocks = folder(own, "rocks", "test", labelled=False)
    assert rocks.class_names == ("ood",)
    assert rocks.labels.tolist() == [0, 0]
    with Image.open(own / "rocks/test/big/r.png") as image:
        np.testing.assert_array_equal(rocks.images[0], image)


def test_what_is_no_image_of_a_class_is_said(own, capsys):
    photo(own / "mine/train/stray.png", 24, 24)
    photo(own / "elsewhere/0.jfif", 24, 24)
    (own / "mine/train/empty").mkdir()
    (own / "mine/train/__MACOSX").mkdir()
    (own / "mine/train/dog/more").symlink_to(own / "elsewhere")
    loaded = folder(own)
    assert loaded.class_names == ("cat", "dog") and loaded.labels.tolist() == [0, 1, 0, 1, 0, 1]
    line = capsys.readouterr().err
    assert line.startswith("oal_jax: mine/train: 6 images; left out 4 others (__MACOSX/,")
    assert "1 image in no class (stray.png)" in line


def test_folder_images_get_the_size_asked_for(own):
    wide = photo(own / "mine/train/dog/z.png", 60, 30)
    message = refused("set data.image_size", folder, own)
    assert re.search(r"z.png is 60 x 30 pixels, .* mine/train is 24 x 24", message)
    loaded = folder(own, image_size=20)
    assert loaded.images.shape == (6, 20, 20, 3)
    third = np.flatnonzero(loaded.labels == 1)[2]
    assert np.abs(loaded.images[third] - independent(wide, 20, 20)).max() <= 1


def test_faults_of_folders_are_named(own):
    root = f"data.root={own}/no does not exist: set data.root to the directory that holds a folder"
    refused(root, folder, own / "no")
    refused("no folder .*mine/test: images of 'mine'", folder, own, split="test")
    refused("no folder .*pebbles/test", folder, own, "pebbles", "test", labelled=False)
    photo(own / "mine/val/dgo/0.png", 24, 24)
    refused(
        "mine/val/dgo: no class of that name .* nearest: 'dog'", folder, own, split="validation"
    )
    (own / "empty/test").mkdir(parents=True)
    refused("empty/test holds no images", folder, own, "empty", "test", labelled=False)
    (own / "new/train").mkdir(parents=True)
    refused("new/train has no folders", folder, own, "new", id_set="new")
    (own / "rocks/test/q.png").write_bytes(b"damaged")
    refused("rocks/test/q.png can't be decoded", folder, own, "rocks", "test", labelled=False)
    skipped = folder(own, "rocks", "test", labelled=False, on_corrupt="skip")
    assert len(skipped.images) == 1
