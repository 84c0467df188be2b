"""Classifiers from weight files of other libraries, and files that timm and torchvision load.

Supported are Vision Transformers (timm's, torchvision's and Hugging Face's names in safetensors;
Google's npz), DeiT's distillation token and DINOv2's registers among them, and ResNet-18/34/50 for
224 px and for 32 px (torchvision's, timm's, Hugging Face's and OpenOOD's names in safetensors).
The architecture follows from names and shapes. Nothing is unpickled and torch isn't needed:
`python -m oal_jax.pretrained.convert` turns a `.ckpt` or `.pth` file into safetensors.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial

from oal_jax.errors import UserError
from oal_jax.models.conv import with_maps
from oal_jax.models.normalise import Moments
from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import VisionTransformer
from oal_jax.pretrained import resnet, vit
from oal_jax.pretrained.layouts import network
from oal_jax.pretrained.normalisation import METADATA, UNIT, choose, stated
from oal_jax.pretrained.tensor_files import TensorFile, fit, read
from oal_jax.runtime import artifacts


class Config(NamedTuple):
    """The classifier of a file."""

    architecture: str  # "resnet18_32x32", "vit_base_patch16_224", ...
    num_classes: int
    image_shape: tuple[int, int, int]  # height, width, channels; ResNets also take other sizes
    mean: tuple[float, ...]  # of pixels in [0, 1]; the network subtracts it
    std: tuple[float, ...]


class Classifier(NamedTuple):
    """A network with its weights; `forward` and `head` are arguments of `calibrate`."""

    net: nn.Module
    variables: dict[str, Any]
    head: tuple[np.ndarray, np.ndarray]  # (kernel (d, c), bias (c,)) of the last linear layer
    # Float images (n, h, w, c) in [0, 1] to (logits, features, feature maps).
    forward: Partial
    config: Config


def load_classifier(
    path: str | Path,
    architecture: str | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    *,
    heads: int | None = None,
    new_head: jax.Array | None = None,
) -> Classifier:
    """A classifier from a `.safetensors` file or from one of Google's `.npz` files.

    Prefixes of wrappers are removed (`module.`, `_orig_mod.`, `model.`, `ema.`, ...), and tensors
    outside of the network left out, which a line on stderr says.

    Without `mean` and `std`, the normalisation is that of the file's metadata (see `save_timm`), or
    of timm's `config.json` or Hugging Face's `preprocessor_config.json` beside it. Else it follows
    from the architecture: ImageNet's where `architecture` is a DeiT ("deit_...") or has timm's tag
    ".mae" or ".dino"; 0.5 for ViTs of timm, Google and Hugging Face (0 and 1 for those without a
    bias in `qkv`, timm's "miil"); ImageNet's for ViTs with layer scale (DINOv2) or distillation
    token, torchvision's ViTs, Hugging Face's DeiTs and ResNets for 224 px; OpenOOD's CIFAR
    constants for ResNets for 32 px of 10 or 100 classes. Any other file needs `mean` and `std`. A
    DeiT by timm's names looks like any ViT; for such files a line says what is assumed.

    Args:
      path: the file.
      architecture: required architecture: "resnet18", "resnet18_32x32", "vit_base_patch16_224".
        A "deit" is a ViT here, and timm's tags (".augreg_in21k") are ignored, but for the
        normalisation. None allows any.
      num_classes: required number of classes, or that of a new head.
      mean, std: of pixels in [0, 1], one value per channel, or one for all.
      image_size: height and width of the images. A ViT's position embeddings are resized to it.
      heads: attention heads of a ViT of unusual width or without class token (see `vit.infer`).
      new_head: key of a random head, which replaces the head of the file.

    Raises:
      UserError: the file can't be read; another architecture or number of classes; tensors that
        are missing, left over or of the wrong shape, all listed.
    """
    for argument, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise UserError(f"{argument} must be a whole number, 1 or more, got {value!r}")
    file = network(vit.without_root(read(path)))
    metadata = stated(file)
    family, inferred = _infer(file, heads or metadata.get("heads"))
    name = family.architecture(inferred)
    _check_architecture(file, architecture, name)
    classes, drop = _classes(file, inferred["num_classes"], num_classes, new_head)
    normalisation = choose(file, family, inferred, metadata, architecture, mean, std)
    net = _net(family, inferred | {"num_classes": classes}, normalisation)
    size = image_size or metadata.get("image_size") or _file_size(family, inferred)
    flat = _variables(file, family, inferred, net, drop, name)
    if new_head is not None:
        flat |= _new_head(new_head, family.HEAD, net, classes)
    if family is vit:
        flat = _resized(file, flat, inferred, size)
        name = vit.architecture(inferred | {"image_size": size})
    variables = jax.tree.map(jnp.asarray, unflatten_dict(flat))
    last = variables["params"][family.HEAD]
    shape = (size, size, inferred["channels"])
    return Classifier(
        net,
        variables,
        (np.asarray(last["kernel"]), np.asarray(last["bias"])),
        Partial(_checked(shape, family is vit, net), variables),
        Config(name, classes, shape, *normalisation),
    )


def describe(path: str | Path) -> dict[str, Any]:
    """The sizes of a file's network, from names and shapes, without building it.

    `architecture`, `image_size`, `width` of a feature, `depth`, `num_classes` (0: no head),
    `channels`; of a ViT also `patch`, `heads` and `mlp_ratio`.

    Raises:
      UserError: as `load_classifier`, if the architecture is unknown.
    """
    file = network(vit.without_root(read(path)))
    metadata = stated(file)
    family, sizes = _infer(file, metadata.get("heads"))
    names = ("depth", "num_classes", "channels", "patch", "heads", "mlp_ratio")
    return {
        "architecture": family.architecture(sizes),
        "image_size": metadata.get("image_size") or _file_size(family, sizes),
        "width": _net(family, sizes, UNIT).feature_width,
        **{name: sizes[name] for name in names if name in sizes},
    }


def _infer(file: TensorFile, heads: int | None) -> tuple[Any, dict[str, Any]]:
    """The module of the file's family, and the sizes that it infers."""
    if resnet.recognises(file.tensors):
        return resnet, resnet.infer(file)
    if vit.kind(file.tensors):
        return vit, vit.infer(file, heads)
    raise UserError(
        f"{file.path}: no ViT and no ResNet by its tensors' names"
        f" ({', '.join(sorted(file.tensors)[:3])}, ...)"
    )


def _check_architecture(file: TensorFile, required: str | None, actual: str) -> None:
    name = (required or actual).partition(".")[0]
    if actual.startswith("vit_") and re.match("^deit3?(_|$)", name):
        name = re.sub("^deit3?", "vit", name).replace("_distilled", "")
    if actual != name and not actual.startswith(f"{name}_"):
        raise UserError(f"{file.path} holds {actual}, not {required}")


def _classes(file, actual: int, required: int | None, new_head) -> tuple[int, bool]:
    """The number of classes, and whether the file's head is dropped."""
    if new_head is not None:
        if not (required or actual):
            raise UserError(f"{file.path} has no head; give num_classes with new_head")
        return required or actual, True
    if not actual:
        raise UserError(
            f"{file.path} has no head; give num_classes and new_head=KEY for a random one"
        )
    if required not in (None, actual):
        raise UserError(
            f"{file.path} has a head of {actual} classes, not {required}; give new_head=KEY for a"
            " random one"
        )
    return actual, False


def fields(net: nn.Module) -> dict[str, Any]:
    """JSON-serialisable constructor arguments of a network: its sizes and normalisation."""
    return {name: getattr(net, name) for name in (*_FILE_FIELDS[type(net)], "mean", "std")}


def _net(family, inferred: Mapping[str, Any], normalisation: Moments) -> nn.Module:
    module = ResNet if family is resnet else VisionTransformer
    fields = {name: value for name, value in inferred.items() if name in _FILE_FIELDS[module]}
    return module(**fields, mean=normalisation[0], std=normalisation[1])


_FILE_FIELDS = {
    ResNet: ("num_classes", "depth", "width", "stem"),
    VisionTransformer: (
        "num_classes",
        "patch",
        "width",
        "depth",
        "heads",
        "mlp_ratio",
        "qkv_bias",
        "layer_scale",
        "class_token",
        "pool",
        "registers",
    ),
}


def _file_size(family, inferred) -> int:
    return inferred["image_size"] if family is vit else resnet.default_size(inferred)


def _variables(file, family, inferred, net, drop_head, name) -> dict[tuple, np.ndarray]:
    size = _file_size(family, inferred)
    image = jnp.zeros((1, size, size, inferred["channels"]))
    expected = jax.eval_shape(partial(net.init, jax.random.key(0)), image)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(expected).items()}
    if family is vit:
        places, pre_logits = vit.places(shapes, file, inferred)
        unused = pre_logits if drop_head else []
    else:
        places, unused = resnet.places(shapes, file)
    if drop_head:
        head = [path for path in places if path[1] == family.HEAD]
        unused = [*unused, *(name for path in head for name in places.pop(path).names)]
    return fit(file, places, unused, name)


def _new_head(key, head: str, net, classes: int) -> dict[tuple, np.ndarray]:
    width = net.feature_width
    kernel = nn.initializers.lecun_normal()(key, (width, classes))
    bias = np.zeros(classes, np.float32)
    return {("params", head, "kernel"): kernel, ("params", head, "bias"): bias}


def _resized(file, flat, inferred, size: int) -> dict[tuple, np.ndarray]:
    patch, path = inferred["patch"], ("params", "pos_embed")
    if size % patch:
        raise UserError(f"{file.path}: image_size {size} is not a multiple of its {patch} px patch")
    if size == inferred["image_size"]:
        return flat
    resized = vit.resize_positions(
        flat[path], inferred["class_token"] and not inferred["registers"], size // patch
    )
    return flat | {path: resized}


# Cached, so that jit sees one function for equal arguments.
@cache
def _checked(shape: tuple[int, int, int], fixed_size: bool, net: nn.Module):
    return partial(_check_and_run, shape, fixed_size, net)


def _check_and_run(shape, fixed_size, net, variables, images):
    actual, expected = (images.shape[1:], shape) if fixed_size else (images.shape[3:], shape[2:])
    if images.ndim != 4 or actual != expected:
        axes = ", ".join(map(str, shape if fixed_size else ("h", "w", shape[2])))
        hint = "; image_size resizes the position embeddings" if fixed_size else ""
        raise UserError(f"images have shape {images.shape}, the network takes (n, {axes}){hint}")
    return with_maps(net, variables, images)


def export_timm(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any] | None, net: nn.Module
) -> dict[str, np.ndarray]:
    """A trained ResNet or ViT of `oal_jax.models` as PyTorch tensors by timm's names.

    timm's and torchvision's ResNets and timm's `VisionTransformer` of the same sizes take them with
    `strict=True`; for the 32 px stem their `conv1` and `maxpool` must be replaced first. Their
    images must be normalised by `net.mean` and `net.std`, which the weights do not include.

    Args:
      params, batch_stats: variables of `net.apply`; a ViT has no batch_stats.
      net: the module.

    Raises:
      UserError: timm has no such stem or module.
    """
    variables = {"params": params, "batch_stats": batch_stats or {}}
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(variables).items()}
    if isinstance(net, ResNet):
        return resnet.export(flat, net.stem)
    if isinstance(net, VisionTransformer):
        return vit.export(flat, net.patch, net.pool)
    raise UserError(f"a {type(net).__name__} is no ResNet and no VisionTransformer: not for timm")


def save_timm(
    path: str | Path,
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any] | None,
    net: nn.Module,
    image_size: int | None = None,
) -> Path:
    """Writes `export_timm` as a safetensors file, atomically.

    Normalisation, heads and `image_size` are in its metadata, which `load_classifier` reads.

    Returns:
      The file.

    Raises:
      UserError: as `export_timm`; a name that does not end in `.safetensors`.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: give a name that ends in .safetensors")
    tensors = export_timm(params, batch_stats, net)
    entry = {"mean": net.mean, "std": net.std, "image_size": image_size}
    entry |= {"heads": net.heads} if isinstance(net, VisionTransformer) else {}
    metadata = {"format": "pt", METADATA: json.dumps(entry)}
    artifacts.write_output(path, safetensors.numpy.save(tensors, metadata))
    return path
