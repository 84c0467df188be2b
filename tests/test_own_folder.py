"""One folder of one's own images: layouts, splits by digest, OOD sets, what is left out."""

import numpy as np
import pytest
from PIL import Image

import oal_jax
from oal_jax.config.benchmarks import MADE
from oal_jax.data import own, sources
from oal_jax.errors import UserError


def save(root, names, size=(10, 8), mode="RGB"):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, i % 250).save(path)


def load(root, split="train", name="own", **more):
    labelled = name == "own"
    options = {"root": str(root), "id_set": "own", "image_size": 8, "labelled": labelled} | more
    return sources.load("own", name, split, **options)


def files(root, split="train", name="own"):
    spec = sources.SetSpec("own", name, split, str(root), id_set="own", labelled=name == "own")
    source = own.open_own(spec)
    return {str(source.path(i).relative_to(root)) for i in range(len(source))}


def splits(root):
    return {split: files(root, split) for split in ("train", "validation", "test")}


def test_folders_of_classes_are_enough(tmp_path):
    save(tmp_path, [f"{c}/{'deep/' * (i % 2)}{i}.png" for c in ("cat", "dog") for i in range(40)])
    save(tmp_path, ["ood/rocks/0.jpg", "ood/rocks/more/1.jpg", "ood/a,b/2.jpg", "ood/own/3.jpg"])
    summary = own.summarise(tmp_path)
    assert summary.class_names == ("cat", "dog")
    assert summary.cut == ("validation", "test")
    assert summary.ood == {"a_b": 1, "ood_own": 1, "rocks": 2}
    assert sum(summary.counts.values()).tolist() == [40, 40]
    parts = splits(tmp_path)
    assert len(set.union(*parts.values())) == sum(map(len, parts.values())) == 80
    for split, names in parts.items():
        per_class = [sum(name.startswith(c) for name in names) for c in ("cat", "dog")]
        assert summary.counts[split].tolist() == per_class and min(per_class) > 0
    train = load(tmp_path)
    assert train.class_names == ("cat", "dog") and train.images.shape[1:] == (8, 8, 3)
    assert np.bincount(train.labels).tolist() == summary.counts["train"].tolist()
    rocks = load(tmp_path, "test", "rocks")
    assert rocks.class_names == ("ood",) and rocks.labels.tolist() == [0, 0]


def test_a_file_stays_in_its_split_when_others_come(tmp_path):
    save(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(0, 60, 2)])
    before = splits(tmp_path)
    save(tmp_path, [f"{c}/{i}.png" for c in "abc" for i in range(1, 60, 2)])
    after = splits(tmp_path)
    assert all(before[split] <= after[split] for split in before)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_every_split_has_every_class_of_three(tmp_path, count, capsys):
    classes = [f"class {i}" for i in range(12)]
    save(tmp_path, [f"{c}/{i}.png" for c in classes for i in range(count)] + ["big/0.png"])
    save(tmp_path, [f"big/{i}.png" for i in range(9)])
    counts = own.summarise(tmp_path).counts
    assert all((n > 0).all() for n in counts.values()) == (count >= 3)
    assert (counts["train"] > 0).all()
    if count < 3:
        load(tmp_path, "validation")
        assert "no image of 12 classes (class 0, class 1, class 10, ...)" in capsys.readouterr().err


@pytest.mark.parametrize("validation", ["validation", "val", "Valid"])
def test_given_splits_are_used_and_the_rest_is_cut(tmp_path, validation):
    save(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(30)])
    save(tmp_path, [f"{validation}/{c}/x/{i}.png" for c in "ab" for i in range(5)])
    save(tmp_path, ["OOD/0.png", "extra/1.png", "train/loose.png"])
    summary = own.summarise(tmp_path)
    assert summary.cut == ("test",) and summary.ood == {"ood": 1}
    assert summary.counts["validation"].tolist() == [5, 5]
    assert (summary.counts["train"] + summary.counts["test"]).tolist() == [30, 30]
    assert {name for name, _ in summary.skipped} == {"extra/1.png", "train/loose.png"}
    save(tmp_path, [f"test/{c}/{i}.png" for c in "ab" for i in range(4)])
    assert own.summarise(tmp_path).cut == ()
    assert files(tmp_path) == {f"train/{c}/{i}.png" for c in "ab" for i in range(30)}


def test_two_spellings_of_an_accent_are_one_class(tmp_path):
    save(tmp_path, ["train/caf\u00e9/0.png", "train/tea/0.png", "test/cafe\u0301/0.png"])
    assert load(tmp_path, "test").labels.tolist() == [0]


def test_train_can_be_a_class(tmp_path):
    save(tmp_path, [f"{c}/{i}.png" for c in ("bus", "car", "train") for i in range(4)])
    assert own.summarise(tmp_path).class_names == ("bus", "car", "train")
    save(tmp_path, ["train/steam/4.png"] * 9)
    assert own.summarise(tmp_path).class_names == ("bus", "car", "train")


def test_what_is_no_class_is_named(tmp_path, capsys):
    save(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(3)] + ["__MACOSX/a/._0.png"])
    save(tmp_path, [".cache/0.png", "loose.png"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a/notes.txt").write_text("text")
    (tmp_path / "a/0.png").write_bytes(b"damaged")
    (tmp_path / "b/circle").symlink_to(tmp_path)
    summary = own.summarise(tmp_path)
    assert summary.class_names == ("a", "b")
    reasons = dict(summary.skipped)
    assert reasons.keys() == {
        *("__MACOSX/", ".cache/", "empty/", "a/notes.txt", "loose.png", "a/0.png", "b/circle")
    }
    assert reasons["a/0.png"] == "not an image"
    load(tmp_path, on_corrupt="skip")
    line = capsys.readouterr().err
    for text in ("4 others", "1 repeated link (", "1 image in no class (loose.png)"):
        assert text in line


def test_sizes_and_gray_come_from_the_headers(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path, ["a/0.tif", "b/0.tif"], (30, 20), "I;16")
    Image.new("L", (30, 20)).save(tmp_path / "a/1.jpg", exif=exif)
    Image.new("P", (30, 20)).save(tmp_path / "b/1.gif")
    summary = own.summarise(tmp_path)
    assert summary.sizes.tolist() == [[20, 30], [30, 20], [20, 30], [20, 30]]
    assert summary.gray
    assert load(tmp_path, channels=1).images.shape == (4, 8, 8, 1)
    save(tmp_path, ["a/2.png"])
    assert not own.summarise(tmp_path).gray
    assert len(own.summarise(tmp_path, sample=2).sizes) == 2


def test_faults_are_named(tmp_path):
    def refused(match, *args, **more):
        with pytest.raises(UserError, match=match):
            load(*args, **more)

    refused("data.root=.*nowhere does not exist", tmp_path / "nowhere")
    refused("has 0 folders with images: give a folder", tmp_path)
    save(tmp_path, ["cat/0.png", "ood/rocks/0.png"])
    refused("has 1 folder with images", tmp_path)
    save(tmp_path / "zip", [f"inside/{c}/0.png" for c in "ab"])
    refused("two classes or more, or set data.root=.*zip/inside", tmp_path / "zip")
    save(tmp_path, ["dog/0.png"])
    refused("no OOD set 'stones' in .*ood, only rocks", tmp_path, name="stones")
    refused("no covariate-shifted sets", tmp_path, name="rocks", labelled=True)
    refused("no test images: a class needs three images", tmp_path, "test")
    save(tmp_path / "s", ["train/cat/0.png", "train/dog/0.png", "test/dgo/0.png"])
    refused("test/dgo: no class of that name .* nearest: 'dog'", tmp_path / "s", "test")


@pytest.mark.parametrize("ood", [("rocks", "a,b"), ()])
def test_load_sets_reads_the_folder_and_its_ood_sets(tmp_path, ood):
    save(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(20)])
    save(tmp_path, [f"ood/{name}/{i}.png" for name in ood for i in range(3)])
    sets = oal_jax.load_sets(source="own", root=str(tmp_path), image_size=8)
    assert {name: len(images) for name, images in sets.far.items()} == {
        name.replace(",", "_"): 3 for name in ood
    }
    assert sum(len(sets[i][0]) for i in range(3)) == 40 and set(sets.validation_ood) == set(MADE)
    assert sets.train[0].shape[1:] == (8, 8, 3) and set(sets.train[1]) == {0, 1}


def test_load_sets_of_no_folder_is_one_line():
    with pytest.raises(UserError, match="root=DIR"):
        oal_jax.load_sets(source="own")
