"""The normalisation of a file's images: asked for, stated in the file or beside it, or assumed."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from oal_jax.errors import UserError
from oal_jax.models.normalise import Moments, moments
from oal_jax.pretrained import resnet, vit
from oal_jax.pretrained.layouts import ORIGIN
from oal_jax.pretrained.tensor_files import TensorFile

METADATA = "oal_jax"  # key of our own entry in a file's metadata
# What timm's and Hugging Face's repositories hold beside the weights, whatever these are called.
_CARDS = ("config.json", "preprocessor_config.json")
# OpenOOD's constants for CIFAR-10 and CIFAR-100, by the number of classes.
_CIFAR: dict[int, Moments] = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_HALF: Moments = ((0.5,) * 3, (0.5,) * 3)
UNIT: Moments = ((0.0,) * 3, (1.0,) * 3)
# Architectures and timm's tags of weights that were trained with ImageNet's constants.
_IMAGENET = re.compile(r"^deit|[._](mae|dino|dinov2|fb_in1k|fb_in22k)(\b|_)")


def stated(file: TensorFile) -> dict[str, Any]:
    """mean, std, heads, image_size and architecture of the file's metadata or the cards beside it.

    Raises:
      UserError: they can't be read, or state an activation other than GELU.
    """
    try:
        if METADATA in file.metadata:
            return _typed(json.loads(file.metadata[METADATA]))
        content: dict[str, Any] = {}
        for name in _CARDS:
            card = file.path.with_name(name)
            if card.is_file():
                content |= _of_card(card)
        return _typed(content)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file.path}: its metadata, or config.json beside it, can't be read ({error})"
        ) from None


def _of_card(card: Path) -> dict[str, Any]:
    content = json.loads(card.read_text("utf-8-sig"))
    activation = content.get("hidden_act", "gelu")
    if "num_attention_heads" in content and activation != "gelu":
        raise UserError(f"{card} has hidden_act {activation}; only ViTs with gelu are supported")
    of_timm = content.get("pretrained_cfg") or {}
    result = {name: of_timm.get(name) for name in ("mean", "std")}
    result |= {"architecture": content.get("architecture")}
    if "image_mean" in content and content.get("do_normalize", True):
        result |= {"mean": content["image_mean"], "std": content.get("image_std")}
    elif content.get("do_normalize") is False:
        result |= {"mean": UNIT[0], "std": UNIT[1]}
    result |= {"heads": content.get("num_attention_heads")}
    return {name: value for name, value in result.items() if value is not None}


def _typed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    types = {"mean": _floats, "std": _floats, "heads": int, "image_size": int, "architecture": str}
    return {name: types[name](metadata[name]) for name in types if metadata.get(name) is not None}


def _floats(values: Any) -> tuple[float, ...]:
    """One value per channel, of a list or of one number for all."""
    return tuple(float(value) for value in np.atleast_1d(np.asarray(values, np.float64)))


def choose(
    file: TensorFile,
    family: Any,
    inferred: Mapping[str, Any],
    metadata: Mapping[str, Any],
    architecture: str | None,
    mean: Any,
    std: Any,
) -> Moments:
    """Mean and standard deviation of pixels in [0, 1], one value per channel or one for all.

    The first of: `mean` and `std`; those of `metadata`; what `architecture`, or that of the
    metadata, was trained with; what the layout is trained with. An assumption that the tensors
    can't confirm is said on stderr.

    Raises:
      UserError: unknown, or no normalisation.
    """
    if (mean is None) != (std is None):
        raise UserError("give both of mean and std, or neither")
    channels = inferred["channels"]
    if mean is not None:
        try:
            result = _floats(mean), _floats(std)
        except (TypeError, ValueError):
            raise UserError(f"mean {mean!r} and std {std!r} are no numbers per channel") from None
    elif "mean" in metadata and "std" in metadata:
        result = metadata["mean"], metadata["std"]
    elif _IMAGENET.search(architecture or metadata.get("architecture", "")):
        result = moments("imagenet")
    else:
        result = _of_layout(file, family, inferred)
    if result is None or any(len(values) not in (1, channels) for values in result):
        raise UserError(
            f"{file.path}: the normalisation of its {channels}-channel images is not known; give"
            " mean and std"
        )
    if not np.isfinite([*result[0], *result[1]]).all() or min(result[1]) <= 0:
        raise UserError(f"{file.path}: mean {result[0]} and std {result[1]} are no normalisation")
    if max(result[0]) > 2 or max(result[1]) > 2:
        scaled = [[round(value / 255, 4) for value in values] for values in result]
        raise UserError(
            f"{file.path}: mean {result[0]} and std {result[1]} are of pixels in 0 to 255; give"
            f" mean={scaled[0]}, std={scaled[1]}"
        )
    if len(result[0]) != len(result[1]):  # one of them holds for all channels
        return tuple(values * (channels // len(values)) for values in result)
    return result


def _of_layout(file: TensorFile, family: Any, inferred: Mapping[str, Any]) -> Moments | None:
    if family is resnet:
        is_cifar = inferred["stem"] == "cifar"
        return _CIFAR.get(inferred["num_classes"]) if is_cifar else moments("imagenet")
    origin = file.metadata.get(ORIGIN)
    if origin == "vit":
        return _HALF
    if inferred["layer_scale"] and inferred["class_token"]:  # DINOv2 and DeiT-3
        return moments("imagenet")
    if vit.kind(file.tensors) == "torchvision" or origin:
        return moments("imagenet")
    if inferred["pool"] == "token_pair":  # DeiT's distilled models alone have two heads
        return moments("imagenet")
    if not inferred["qkv_bias"]:
        return UNIT
    # timm's backbones without a head have several normalisations.
    if not inferred["num_classes"] or inferred["channels"] != 3:
        return None
    if vit.kind(file.tensors) == "timm":
        print(
            f"oal_jax: {file.path} states no normalisation: mean and std 0.5 are assumed, as of"
            " timm's augreg ViTs; for a DeiT or MAE give architecture='deit' or mean and std",
            file=sys.stderr,
        )
    return _HALF
