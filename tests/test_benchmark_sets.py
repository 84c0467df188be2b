"""Which sets a benchmark has, the files of OpenOOD that they are, and sets that a config names."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from oal_jax import main
from oal_jax.config import Config
from oal_jax.config.benchmarks import BENCHMARKS, MADE, Benchmark, resolve
from oal_jax.config.class_names import CLASS_NAMES
from oal_jax.config.rules import validate
from oal_jax.data import sources
from oal_jax.errors import UserError
from oal_jax.runtime import distributed
from oal_jax.stages.context import Context

# OpenOOD v1.5's lists below benchmark_imglist by benchmark, and the directory of their images.
_CIFAR_OOD = {
    ("tin", "test"): "test_tin.txt",
    ("val_tin", "validation"): "val_tin.txt",
    ("mnist", "test"): "test_mnist.txt",
    ("svhn", "test"): "test_svhn.txt",
    ("texture", "test"): "test_texture.txt",
    ("places365", "test"): "test_places365.txt",
}
_IMAGENET_OOD = {
    ("ssb_hard", "test"): "test_ssb_hard.txt",
    ("ninco", "test"): "test_ninco.txt",
    ("inaturalist", "test"): "test_inaturalist.txt",
    ("textures", "test"): "test_textures.txt",
    ("openimage_o", "test"): "test_openimage_o.txt",
    ("val_openimage_o", "validation"): "val_openimage_o.txt",
}
LISTS = {
    "cifar10": {
        ("cifar10", "train"): "train_cifar10.txt",
        ("cifar10", "validation"): "val_cifar10.txt",
        ("cifar10", "test"): "test_cifar10.txt",
        ("cifar10c", "test"): "test_cifar10c.txt",
        ("cinic10", "test"): "val_cinic10.txt",
        ("cifar100", "test"): "test_cifar100.txt",
        **_CIFAR_OOD,
    },
    "cifar100": {
        ("cifar100", "train"): "train_cifar100.txt",
        ("cifar100", "validation"): "val_cifar100.txt",
        ("cifar100", "test"): "test_cifar100.txt",
        ("cifar10", "test"): "test_cifar10.txt",
        **_CIFAR_OOD,
    },
    "imagenet200": {
        ("imagenet200", "train"): "train_imagenet200.txt",
        ("imagenet200", "validation"): "val_imagenet200.txt",
        ("imagenet200", "test"): "test_imagenet200.txt",
        ("imagenet_v2", "test"): "test_imagenet200_v2.txt",
        ("imagenet_c", "test"): "test_imagenet200_c.txt",
        ("imagenet_r", "test"): "test_imagenet200_r.txt",
        **_IMAGENET_OOD,
    },
    "imagenet": {
        ("imagenet", "train"): "train_imagenet.txt",
        ("imagenet", "validation"): "val_imagenet.txt",
        ("imagenet", "test"): "test_imagenet.txt",
        ("imagenet_v2", "test"): "test_imagenet_v2.txt",
        ("imagenet_c", "test"): "test_imagenet_c.txt",
        ("imagenet_r", "test"): "test_imagenet_r.txt",
        **_IMAGENET_OOD,
    },
}
NOT_DEFAULT = {"cinic10"}


def directory(id_set: str, name: str) -> str:
    small = id_set.startswith("cifar") or name == "textures"
    return "images_classic" if small else "images_largescale"


def groups(benchmark: Benchmark) -> list[str]:
    return [*benchmark.near, *benchmark.far, *benchmark.validation, *benchmark.csid]


def context(tmp_path: Path, **data) -> Context:
    config = Config(data=dataclasses.replace(Config().data, **data))
    validate(config)
    return Context(config, tmp_path, distributed.make_mesh(), jax.random.key(0))


@pytest.mark.parametrize("id_set", LISTS)
def test_every_set_is_read_from_its_list(tmp_path, id_set):
    # Every list names one image of a gray level of its own.
    for level, ((name, _), listed) in enumerate(LISTS[id_set].items()):
        path = tmp_path / directory(id_set, name) / name / f"{listed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (level, level, level)).save(path)
        text = tmp_path / "benchmark_imglist" / id_set / listed
        text.parent.mkdir(parents=True, exist_ok=True)
        labelled = name == id_set or name in (*BENCHMARKS[id_set].csid, "cinic10")
        text.write_text(f"{name}/{listed}.png {3 if labelled else -1}\n")
    setting = {"source": "imglist", "root": str(tmp_path), "id_set": id_set}
    run = context(tmp_path, **setting)
    assert {name for name, _ in LISTS[id_set]} - NOT_DEFAULT == {id_set, *groups(run.benchmark)}
    if id_set == "cifar10":
        run = context(tmp_path, **setting, csid=("cifar10c", "cinic10"))
    for level, (name, split) in enumerate(LISTS[id_set]):
        loaded = run.images(split, "" if name == id_set else name)
        assert loaded.name == f"{name}/{split}"
        assert (loaded.images == level).all(), name
        if name == id_set or name in run.benchmark.csid:
            assert loaded.labels.tolist() == [3]
            assert loaded.class_names == CLASS_NAMES[id_set]
        else:
            assert loaded.labels.tolist() == [0]
            assert loaded.class_names == ("ood",)


@pytest.mark.parametrize("id_set", BENCHMARKS)
def test_benchmarks_name_no_set_twice(id_set):
    names = [id_set, *groups(BENCHMARKS[id_set])]
    assert len(names) == len(set(names))
    assert BENCHMARKS[id_set].id_set == id_set
    assert BENCHMARKS[id_set].near and BENCHMARKS[id_set].far and BENCHMARKS[id_set].validation


def test_openood_groups():
    far = ("mnist", "svhn", "texture", "places365")
    for a, b in (("cifar10", "cifar100"), ("cifar100", "cifar10")):
        assert BENCHMARKS[a][:4] == (a, (b, "tin"), far, ("val_tin",))
    for id_set in ("imagenet200", "imagenet"):
        assert BENCHMARKS[id_set][1:] == (
            ("ssb_hard", "ninco"),
            ("inaturalist", "textures", "openimage_o"),
            ("val_openimage_o",),
            ("imagenet_v2", "imagenet_c", "imagenet_r"),
        )


def test_class_names_are_in_the_order_of_the_labels():
    sizes = {"cifar10": 10, "cifar100": 100, "imagenet200": 200, "imagenet": 1000}
    assert {name: len(set(names)) for name, names in CLASS_NAMES.items()} == sizes
    assert list(CLASS_NAMES["cifar10"]) == sorted(CLASS_NAMES["cifar10"])
    fine = CLASS_NAMES["cifar100"]
    assert list(fine) == sorted(fine)
    assert [fine[i] for i in (0, 1, 19, 41, 71, 83, 99)] == [
        *("apple", "aquarium fish", "cattle", "lawn mower", "sea", "sweet pepper", "worm")
    ]


def test_groups_of_the_config_replace_those_of_the_benchmark():
    fashion = BENCHMARKS["fashion"]
    assert resolve("fashion") == fashion
    assert resolve("fashion", far=["mnist"]) == fashion._replace(far=("mnist",))
    assert resolve("fashion", csid=("none",)) == fashion._replace(csid=())
    assert resolve("mine", ("a", "b"), ("c",)) == Benchmark("mine", ("a", "b"), ("c",), MADE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"id_set": "mine"}, "'mine' has no benchmark: give .* data.near .* fashion, cifar10"),
        ({"id_set": "mine", "csid": ("a",)}, "'mine' has no benchmark"),
        ({"id_set": "mine", "near": ("a",), "far": ("b", "a")}, "'a' is in data.near and .*far"),
        ({"near": ("fashion",)}, "'fashion' is in data.id_set and in data.near"),
        ({"validation": ("mnist",)}, "'mnist' is in data.far and in data.validation"),
        ({"source": "folder"}, "data.root is empty: data.source=folder"),
        ({"source": "imglists"}, "nearest: 'imglist'"),
        ({"on_corrupt": "ignore"}, "data.on_corrupt='ignore' is not one of error, skip"),
        ({"image_size": -1}, "data.image_size=-1 must be at least 0"),
    ],
)
def test_wrong_config_is_one_line(data, message):
    with pytest.raises(UserError, match=message) as error:
        validate(Config(data=dataclasses.replace(Config().data, **data)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("near", ["a,b", "('a','b')"])
def test_flags_name_ones_own_sets(tmp_path, near):
    rng = np.random.default_rng(0)
    for folder in (
        *("mine/train/cat", "mine/train/dog", "mine/validation/cat", "mine/test/dog"),
        *("a/test", "b/test/x", "c/test", "shifted/test/dog"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / "0.png")
    (tmp_path / "config.py").write_text("from oal_jax.config import Config as get_config")
    data = {
        "source": "folder",
        "root": tmp_path,
        "id_set": "mine",
        "near": near,
        "far": "c",
        "csid": "shifted",
        "image_size": 16,
    }
    values = main.parse(
        [
            *("main", "--config", str(tmp_path / "config.py")),
            *(f"--config.data.{key}={value}" for key, value in data.items()),
        ]
    )
    run = Context(values.config, tmp_path, distributed.make_mesh(), jax.random.key(0))
    assert run.benchmark == Benchmark("mine", ("a", "b"), ("c",), MADE, ("shifted",))
    assert run.images("validation").class_names == ("cat", "dog")
    assert run.images("test").labels.tolist() == [1]
    assert run.images("test", "shifted").labels.tolist() == [1]
    assert run.train_images().images.shape == (2, 16, 16, 3)
    for name in ("a", "b", "c"):
        assert run.images("test", name).class_names == ("ood",)


def test_bundled_sets_need_no_root():
    loaded = sources.load("bundled", "fashion_jpeg", "test", limit=2)
    assert loaded.images.shape == (2, 28, 28, 1)
