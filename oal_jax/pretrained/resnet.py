"""ResNet-18/34/50 between PyTorch's names (torchvision, timm, OpenOOD) and `models.resnet`."""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from oal_jax.errors import UserError
from oal_jax.models.resnet import STAGES
from oal_jax.pretrained import torch_layout
from oal_jax.pretrained.tensor_files import Place, TensorFile

HEAD = "fc"
_STEMS = {7: "imagenet", 3: "cifar"}  # by the size of the kernel
_BLOCK = re.compile(r"^layer([1-4])\.(\d+)\.")
_RENAMED = (
    (re.compile(r"^(layer\d)_(\d+)\."), r"\1.\2."),
    (re.compile(r"downsample_conv"), "downsample.0"),
    (re.compile(r"downsample_bn"), "downsample.1"),
    (re.compile(r"(kernel|scale)$"), "weight"),
    (re.compile(r"mean$"), "running_mean"),
    (re.compile(r"var$"), "running_var"),
)
_COUNTER = "num_batches_tracked"


def recognises(names: Iterable[str]) -> bool:
    """Whether the names are those of a ResNet."""
    return any(_BLOCK.match(name) for name in names)


def infer(file: TensorFile) -> dict[str, Any]:
    """depth, width, stem, channels and num_classes (0: no head), from names and shapes.

    A 3 x 3 stem is read as OpenOOD's, of stride 1 and without a pool.

    Raises:
      UserError: blocks or a stem of another kind of ResNet.
    """
    width, channels, kernel, _ = file.shape("conv1.weight", 4)
    if kernel not in _STEMS:
        raise UserError(f"{file.path}: a stem of {kernel} x {kernel}; known: 7 x 7 and 3 x 3")
    blocks = [0, 0, 0, 0]
    for match in filter(None, map(_BLOCK.match, file.tensors)):
        stage, block = int(match[1]) - 1, int(match[2])
        blocks[stage] = max(blocks[stage], block + 1)
    bottleneck = "layer1.0.conv3.weight" in file.tensors
    for depth, stages in STAGES.items():
        if stages == tuple(blocks) and bottleneck == (depth >= 50):
            break
    else:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(
            f"{file.path}: stages of {tuple(blocks)} {kind} blocks; known are ResNet-"
            + ", ResNet-".join(map(str, STAGES))
        )
    head = file.tensors.get(f"{HEAD}.weight")
    return {
        "depth": depth,
        "width": width,
        "stem": _STEMS[kernel],
        "channels": channels,
        "num_classes": 0 if head is None else len(head),
    }


def architecture(inferred: Mapping[str, Any]) -> str:
    """OpenOOD's name: "resnet18_224x224", "resnet18_32x32"."""
    side = default_size(inferred)
    return f"resnet{inferred['depth']}_{side}x{side}"


def default_size(inferred: Mapping[str, Any]) -> int:
    """Height and width of the images for which the stem is designed."""
    return 224 if inferred["stem"] == "imagenet" else 32


def torch_name(path: tuple[str, ...]) -> str:
    """torchvision's and timm's name of a variable: `("params", "layer1_0", "conv1", "kernel")`."""
    name = ".".join(path[1:])
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def places(
    shapes: Mapping[tuple, tuple[int, ...]], file: TensorFile
) -> tuple[dict[tuple, Place], list[str]]:
    """The place of each variable in the file; and names of the batch counters, which are unused."""
    # OpenOOD's ResNets for 32 px call the projection of a residual by another name.
    openood = any(".shortcut." in name for name in file.tensors)

    def place(path, shape):
        name = torch_name(path)
        name = name.replace("downsample", "shortcut") if openood else name
        load = partial(_load, path)
        return Place((name,), torch_layout.torch_shape(path, shape), load)

    unused = [name for name in file.tensors if name.endswith(f".{_COUNTER}")]
    return {path: place(path, shape) for path, shape in shapes.items()}, unused


def _load(path, arrays) -> np.ndarray:
    return torch_layout.from_torch(path, arrays[0])


def export(variables: Mapping[tuple, np.ndarray], stem: str) -> dict[str, np.ndarray]:
    """PyTorch's tensors of a trained network's variables; `UserError` for stem 'small'."""
    if stem == "small":
        raise UserError(
            "timm and torchvision have no ResNet with stem 'small' (3 x 3, stride 2); train with"
            " stem 'cifar' or 'imagenet' to export"
        )
    tensors = {}
    for path, array in variables.items():
        tensors[torch_name(path)] = torch_layout.to_torch(path, array)
        if path[-1] == "var":
            name = torch_name(path).rpartition(".")[0]
            tensors[f"{name}.{_COUNTER}"] = np.zeros((), np.int64)
            # Batch normalisation without scale and offset.
            tensors.setdefault(f"{name}.weight", np.ones_like(array))
            tensors.setdefault(f"{name}.bias", np.zeros_like(array))
    return tensors
