"""What is known of an ID set before an image is decoded, against the images themselves."""

import numpy as np
import pytest
from PIL import Image
from tfds_sets import a_class, an_image, png, write

from oal_jax.config import Config, Data
from oal_jax.config.class_names import CLASS_NAMES
from oal_jax.data import image_files
from oal_jax.data.decoding import Decoding
from oal_jax.data.info import known_info
from oal_jax.errors import UserError
from oal_jax.stages.context import Context

RNG = np.random.default_rng(0)


def context_of(tmp_path, **data) -> Context:
    return Context(Config(data=Data(**data)), tmp_path, None, None)


def picture(height=9, width=7) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture() if pixels is None else pixels).save(path)


def from_bundled(root) -> dict:
    return {}


def from_folder(root) -> dict:
    for name in ("cat/0", "cat/1", "cat/2", "dog/0", "owl/0"):
        save(root / f"mine/train/{name}.png")
    return {"source": "folder", "root": str(root), "id_set": "mine"}


def from_lists(root) -> dict:
    save(root / "images_classic/x.png")
    path = root / "benchmark_imglist/cifar10/train_cifar10.txt"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"x.png {i}\n" for i in range(10)))
    return {"source": "imglist", "root": str(root), "id_set": "cifar10"}


def from_tfds(root, side=None) -> dict:
    examples = [{"image": png(picture()), "label": i % 3} for i in range(7)]
    write(
        root, "pets", {"train": examples}, {"image": an_image((side, side, 3)), "label": a_class(3)}
    )
    return {"source": "tfds", "root": str(root), "id_set": "pets"}


def from_nowhere(root) -> dict:
    return {"source": "generated", "id_set": "cifar10"}


CLASS_OF = {
    from_bundled: "coat",
    from_folder: "dog",
    from_lists: "ship",
    from_tfds: "1",
    from_nowhere: "ship",
}
CASES = [
    (source, changes)
    for source, name in CLASS_OF.items()
    for changes in ({}, {"train_images": 4}, {"image_size": 5}, {"leave_out": (name,)})
    if not (source is from_bundled and "image_size" in changes)  # its images have one size
]


@pytest.mark.parametrize(("source", "changes"), CASES)
def test_the_info_is_that_of_the_images(tmp_path, source, changes, monkeypatch):
    changes = {"near": ("x",)} | changes
    data = source(tmp_path) | changes
    train = context_of(tmp_path, **data).train_images()
    monkeypatch.setattr(image_files, "decode_with_notes", None)  # the info decodes no image
    info = context_of(tmp_path, **data).info
    assert info.name == data.get("id_set", "fashion")
    assert info.class_names == train.class_names
    assert info.image_shape == train.image_shape
    assert info.num_train == train.examples
    left_out = changes.get("leave_out", ())
    assert set(info.all_class_names) == {*info.class_names, *left_out}
    assert [info.all_class_names[i] for i in info.kept_labels] == list(info.class_names)


@pytest.mark.parametrize(
    ("data", "shape", "count"),
    [
        ({}, (28, 28, 1), 12_000),
        ({"id_set": "cifar100", "source": "imglist"}, (32, 32, 3), 50_000),
        ({"id_set": "imagenet", "source": "imglist"}, (224, 224, 3), 1_281_167),
        ({"id_set": "cifar10", "image_size": 64, "train_images": 9}, (64, 64, 3), 9),
        ({"id_set": "mine", "source": "generated"}, (32, 32, 3), 100),
    ],
)
def test_well_known_sets_need_no_files(data, shape, count):
    info = known_info(Data(**data))
    assert (info.image_shape, info.num_train) == (shape, count)
    if data.get("id_set") in CLASS_NAMES:
        assert info.class_names == CLASS_NAMES[data["id_set"]]


def test_lists_are_decoded_as_openood_does():
    decoding = known_info(Data(id_set="imagenet", source="imglist")).decoding
    assert decoding == Decoding(3, 256, (224, 224))


def test_what_is_known_of_the_embedded_set_is_what_its_files_hold(tmp_path):
    assert known_info(Data()) == context_of(tmp_path).info


@pytest.mark.parametrize("data", [{"id_set": "mine"}, {"leave_out": ("coat",)}])
def test_other_sets_need_their_files(data):
    with pytest.raises(UserError, match="data.(id_set|leave_out)"):
        known_info(Data(**data))


def test_damaged_files_are_passed_over_or_named(tmp_path):
    data = from_folder(tmp_path) | {"near": ("x",)}
    (tmp_path / "mine/train/cat/0.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cat/0\.png can't be decoded"):
        _ = context_of(tmp_path, **data).info
    assert context_of(tmp_path, **data, on_corrupt="skip").info.image_shape == (9, 7, 3)


def test_training_images_are_read_once_and_can_not_be_changed(tmp_path):
    context = context_of(tmp_path, **from_folder(tmp_path), near=("x",))
    data = context.train_images()
    assert context.train_images() is data
    with pytest.raises(ValueError, match="read-only"):
        data.images[0] = 0
