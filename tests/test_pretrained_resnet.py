"""ResNets from files of torchvision, timm and OpenOOD, against NumPy."""

import numpy as np
import pytest
from classifier_files import (
    IMAGENET,
    assert_gives,
    images_of,
    numpy_resnet,
    resnet_tensors,
    write,
)

from oal_jax.pretrained.classifiers import describe, load_classifier


@pytest.mark.parametrize(
    ("depth", "kernel", "shortcut", "size", "name"),
    [
        (18, 7, "downsample", 32, "resnet18_224x224"),
        (18, 3, "shortcut", 16, "resnet18_32x32"),
    ],
)
def test_resnet_equals_numpy_from_the_file_s_tensors(tmp_path, depth, kernel, shortcut, size, name):
    tensors = resnet_tensors(depth, kernel=kernel, shortcut=shortcut)
    loaded = load_classifier(write(tmp_path / "net.safetensors", tensors))
    mean, std = IMAGENET
    if kernel == 3:
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    assert loaded.config[0] == name and loaded.config[3:] == (mean, std)
    images = images_of(loaded, size=size)
    expected = numpy_resnet(tensors, images.astype(np.float64), np.array(mean), np.array(std))
    maps = assert_gives(loaded, images, expected)
    assert [x.shape[-1] for x in maps] == [2, 2, 4, 8, 16]


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_depth_is_counted(tmp_path, depth):
    sizes = describe(write(tmp_path / "net.safetensors", resnet_tensors(depth)))
    width = 64 if depth == 50 else 16
    assert sizes == {
        **{"architecture": f"resnet{depth}_32x32", "image_size": 32},
        **{"width": width, "depth": depth, "num_classes": 10, "channels": 3},
    }


@pytest.mark.parametrize(
    ("classes", "mean"), [(10, 0.4914), (100, 0.5071)], ids=["cifar10", "cifar100"]
)
def test_cifar_s_constants_go_by_the_classes(tmp_path, classes, mean):
    path = write(tmp_path / "net.safetensors", resnet_tensors(classes=classes))
    assert load_classifier(path).config.mean[0] == mean
    other = load_classifier(path, mean=[0.1], std=[0.2])
    assert other.net.mean == (0.1,) and other.net.std == (0.2,)
