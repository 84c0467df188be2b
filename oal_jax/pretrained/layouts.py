"""The network in a file of weights: wrappers' prefixes removed, Hugging Face's names translated.

What comes out has the names of timm (ViT) or torchvision (ViT, ResNet), which `pretrained.vit` and
`pretrained.resnet` read. Tensors outside of the network are left out, which a line on stderr says.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from oal_jax.errors import UserError
from oal_jax.pretrained.tensor_files import TensorFile, listed

# A name that each kind of network has, after the prefix of what wraps it (`DataParallel`,
# `torch.compile`, Lightning, averaged weights).
_ANCHORS = (
    r"blocks\.0\.norm1\.weight",
    r"encoder\.layers\.encoder_layer_0\.ln_1\.weight",
    r"layer1\.0\.conv1\.weight",
    r"(?:(?:vit|deit|dinov2|dinov2_with_registers)\.)?encoder\.layer\.0\."
    r"(?:layernorm_before|norm1)\.weight",
    r"(?:resnet\.)?encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight",
)
_PREFIX = re.compile(rf"^((?:.+?\.)??)(?:{'|'.join(_ANCHORS)})$")
# The first layer's names, which a network has beside its blocks.
_STEM = re.compile(
    r"(?:patch_embed\.proj|pos_embed|conv_proj|conv1|(?:\w+\.)?embeddings|(?:resnet\.)?embedder)\b"
)
# Key of a file's metadata: the library and model whose names the tensors had.
ORIGIN = "oal_jax.origin"
POOL = "oal_jax.pool"

_ORIGINS = re.compile(r"^(vit|deit|dinov2|dinov2_with_registers|resnet)\.")
_VIT = (
    (re.compile(r"^embeddings\.cls_token"), "cls_token"),
    (re.compile(r"^embeddings\.distillation_token"), "dist_token"),
    (re.compile(r"^embeddings\.register_tokens"), "reg_token"),
    (re.compile(r"^embeddings\.position_embeddings"), "pos_embed"),
    (re.compile(r"^embeddings\.patch_embeddings\.projection"), "patch_embed.proj"),
    (re.compile(r"^encoder\.layer\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"\.attention\.output\.dense\."), ".attn.proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"\.output\.dense\."), ".mlp.fc2."),
    (re.compile(r"\.layernorm_before\."), ".norm1."),
    (re.compile(r"\.layernorm_after\."), ".norm2."),
    (re.compile(r"\.layer_scale(\d)\.lambda1$"), r".ls\1.gamma"),
    (re.compile(r"^layernorm\."), "norm."),
    (re.compile(r"^(cls_)?classifier\."), "head."),
    (re.compile(r"^distillation_classifier\."), "head_dist."),
)
_RESNET = (
    (re.compile(r"^embedder\.embedder\.convolution"), "conv1"),
    (re.compile(r"^embedder\.embedder\.normalization"), "bn1"),
    (re.compile(r"\.shortcut\.convolution"), ".downsample.0"),
    (re.compile(r"\.shortcut\.normalization"), ".downsample.1"),
    (re.compile(r"^classifier\.1\."), "fc."),
)
_STAGE = re.compile(r"^encoder\.stages\.(\d)\.layers\.(\d+)\.")
_LAYER = re.compile(r"\.layer\.(\d)\.(convolution|normalization)")
_QKV = re.compile(r"^(blocks\.\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$")
# Parts that classify nothing: the target of masked patches, the pooler, the decoder of an MAE.
_UNUSED = re.compile(r"^(embeddings\.mask_token$|pooler\.|decoder\.)")


def network(file: TensorFile) -> TensorFile:
    """The tensors of the file's network, by the names that the readers know.

    Raises:
      UserError: the file holds several networks.
    """
    tensors = unwrapped(file.tensors, str(file.path))
    origin = _origin(tensors)
    if origin is None:
        return _with_tokens(file._replace(tensors=dict(tensors)))
    rename = _resnet if origin == "resnet" else _vit
    metadata = file.metadata | {ORIGIN: origin}
    return _with_tokens(file._replace(tensors=rename(tensors), metadata=metadata))


def unwrapped(tensors: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The tensors of the one network among these, without the prefix of what wraps it.

    Where no known network is among them, they are returned as they are.

    Raises:
      UserError: several networks; names `where` and their prefixes.
    """
    prefixes = sorted({match[1] for match in map(_PREFIX.match, tensors) if match})
    # A Swin transformer has such blocks in each of its stages.
    prefixes = [p for p in prefixes if any(_starts(name, p) for name in tensors)]
    if len(prefixes) > 1:
        names = ", ".join(repr(prefix) for prefix in prefixes)
        raise UserError(f"{where} holds several networks, under {names}; write one to its own file")
    if not any(prefixes):
        return tensors
    (prefix,) = prefixes
    others = [name for name in tensors if not name.startswith(prefix)]
    if others:
        print(
            f"oal_jax: {where}: left out, outside of {prefix!r}: {listed(others)}",
            file=sys.stderr,
        )
    start = len(prefix)
    return {name[start:]: x for name, x in tensors.items() if name.startswith(prefix)}


def _starts(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and _STEM.match(name, len(prefix)) is not None


def _origin(names: Iterable[str]) -> str | None:
    """Hugging Face's name of the model whose names these are, or None."""
    for name in names:
        if match := _ORIGINS.match(name):
            return match[1]
    if any(name.startswith("encoder.layer.0.") for name in names):
        return "dinov2" if "encoder.layer.0.layer_scale1.lambda1" in names else "vit"
    return "resnet" if any(name.startswith("embedder.embedder.") for name in names) else None


def _renamed(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _vit(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed, parts = {}, {}
    for name, tensor in tensors.items():
        name = _ORIGINS.sub("", name)
        if _UNUSED.match(name):
            continue
        name = _renamed(name, _VIT)
        if match := _QKV.match(name):
            parts.setdefault((match[1], match[3]), {})[match[2]] = tensor
        else:
            renamed[name] = tensor
    for (block, leaf), of in parts.items():
        if len(of) == 3:
            joined = np.concatenate([of[part] for part in ("query", "key", "value")])
            renamed[f"{block}.attn.qkv.{leaf}"] = joined
        else:  # the reader then says what is missing
            renamed |= {f"{block}.attention.{part}.{leaf}": x for part, x in of.items()}
    return renamed


def _resnet(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    kinds = {"convolution": "conv", "normalization": "bn"}

    def stage(match):
        return f"layer{int(match[1]) + 1}.{match[2]}."

    def layer(match):
        return f".{kinds[match[2]]}{int(match[1]) + 1}"

    renamed = {}
    for name, tensor in tensors.items():
        name = _STAGE.sub(stage, _ORIGINS.sub("", name))
        renamed[_renamed(_LAYER.sub(layer, name), _RESNET)] = tensor
    return renamed


def _with_tokens(file: TensorFile) -> TensorFile:
    """One form of the class, distillation and register tokens of timm's names.

    Position embeddings are those of the patches and, without registers, of the class token. A
    distillation token becomes the first register, and its head a part of the one head: DeiT's
    logits are the mean of both.
    """
    t = dict(file.tensors)
    if not {"cls_token", "pos_embed", "blocks.0.norm1.weight"} <= t.keys():
        return file
    width, metadata = t["cls_token"].shape[-1], dict(file.metadata)
    names = [name for name in ("dist_token", "reg_token") if name in t]
    extra = [np.asarray(t.pop(name), np.float32) for name in names]
    positions = np.asarray(t["pos_embed"], np.float32)
    if positions.ndim != 3 or any(x.ndim != 3 for x in extra):
        return file  # the reader refuses their shapes
    registers = sum(x.shape[1] for x in extra)
    if not registers:
        if not _is_square(positions.shape[1] - 1) and _is_square(positions.shape[1]):
            t["pos_embed"] = np.concatenate([np.zeros((1, 1, width), np.float32), positions], 1)
        return file._replace(tensors=t, metadata=_pooled(t, width, metadata))
    # timm's models with registers have positions of the patches alone, Hugging Face's of the class
    # token too, DeiT of all tokens.
    counts = [n for n in (0, 1, 1 + registers) if _is_square(positions.shape[1] - n)]
    if not counts:
        return file
    count = max(counts) if "dist_token" in names else counts[0]
    tokens = np.concatenate([np.asarray(t["cls_token"], np.float32), *extra], axis=1)
    tokens[:, :count] += positions[:, :count]
    t |= {"cls_token": tokens[:, :1], "reg_token": tokens[:, 1:]}
    t["pos_embed"] = positions[:, count:]
    if {"head.weight", "head_dist.weight"} <= t.keys() and "dist_token" in names:
        for leaf, join in (("weight", lambda x: np.concatenate(x, axis=1) / 2), ("bias", _mean)):
            both = [np.asarray(t.pop(f"{name}.{leaf}"), np.float32) for name in _HEADS]
            t[f"head.{leaf}"] = join(both)
        metadata[POOL] = "token_pair"
    return file._replace(tensors=t, metadata=_pooled(t, width, metadata))


_HEADS = ("head", "head_dist")


def _mean(arrays: list[np.ndarray]) -> np.ndarray:
    return sum(arrays) / len(arrays)


def _pooled(tensors: Mapping[str, np.ndarray], width: int, metadata: dict[str, str]):
    """The metadata with the pool of DINOv2's head, which reads the class token and the mean."""
    head = tensors.get("head.weight")
    is_wide = head is not None and head.ndim == 2 and head.shape[1] == 2 * width
    return metadata | {POOL: "token_mean"} if is_wide and POOL not in metadata else metadata


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
