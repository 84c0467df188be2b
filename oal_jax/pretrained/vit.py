"""Vision Transformers between the names of timm, torchvision and Google and `models.vit`.

As in timm, GELU is exact and layer norms have epsilon 1e-6, for Google's files as well.
"""

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oal_jax.errors import UserError
from oal_jax.pretrained import torch_layout
from oal_jax.pretrained.layouts import POOL
from oal_jax.pretrained.tensor_files import Place, TensorFile

HEAD = "head"

# (width, depth): name and heads.
_SIZES = {
    (64, 6): ("test", 2),
    (192, 12): ("tiny", 3),
    (384, 12): ("small", 6),
    (512, 12): ("medium", 8),
    (768, 12): ("base", 12),
    (1024, 24): ("large", 16),
    (1280, 32): ("huge", 16),
    (1408, 40): ("giant", 16),
    (1664, 48): ("gigantic", 16),
}

_TIMM = (
    (re.compile(r"^blocks_(\d+)"), r"blocks.\1"),
    (re.compile(r"mlp_fc"), "mlp.fc"),
    (re.compile(r"^patch_embed"), "patch_embed.proj"),
    (re.compile(r"_gamma$"), ".gamma"),
    (re.compile(r"(kernel|scale)$"), "weight"),
)
# From timm's names.
_TORCHVISION = (
    (re.compile(r"^blocks\.(\d+)"), r"encoder.layers.encoder_layer_\1"),
    (re.compile(r"\.norm(\d)"), r".ln_\1"),
    (re.compile(r"attn\.qkv\."), "self_attention.in_proj_"),
    (re.compile(r"attn\.proj"), "self_attention.out_proj"),
    (re.compile(r"^norm"), "encoder.ln"),
    (re.compile(r"^head"), "heads.head"),
    (re.compile(r"^cls_token"), "class_token"),
    (re.compile(r"^pos_embed"), "encoder.pos_embedding"),
    (re.compile(r"^patch_embed\.proj"), "conv_proj"),
)
_MLP = {True: (("mlp.fc1", "mlp.linear_1"), ("mlp.fc2", "mlp.linear_2")),  # published files
        False: (("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"))}  # fmt: skip
# From paths in the Flax tree.
_GOOGLE = (
    (re.compile(r"^blocks_(\d+)"), r"Transformer/encoderblock_\1"),
    (re.compile(r"norm1"), "LayerNorm_0"),
    (re.compile(r"norm2"), "LayerNorm_2"),
    (re.compile(r"attn/qkv"), "MultiHeadDotProductAttention_1/{}"),
    (re.compile(r"attn/proj"), "MultiHeadDotProductAttention_1/out"),
    (re.compile(r"mlp_fc1"), "MlpBlock_3/Dense_0"),
    (re.compile(r"mlp_fc2"), "MlpBlock_3/Dense_1"),
    (re.compile(r"^norm"), "Transformer/encoder_norm"),
    (re.compile(r"^cls_token"), "cls"),
    (re.compile(r"^pos_embed"), "Transformer/posembed_input/pos_embedding"),
    (re.compile(r"^patch_embed"), "embedding"),
)
# The first layer of a head of two layers.
_PRE_LOGITS = re.compile(r"^pre_logits[./]")
_KINDS = {
    "timm": re.compile(r"^(patch_embed|blocks)\."),
    "torchvision": re.compile(r"^(conv_proj|encoder\.layers)\."),
    "google": re.compile(r"^(opt/target/|params/)?(embedding|Transformer)/"),
}
_BLOCK = re.compile(r"^(?:blocks\.|encoder\.layers\.encoder_layer_|Transformer/encoderblock_)(\d+)")


def kind(names: Iterable[str]) -> str | None:
    """The source of these names: "timm", "torchvision", "google", or None."""
    for whose, pattern in _KINDS.items():
        if any(map(pattern.match, names)):
            return whose
    return None


def without_root(file: TensorFile) -> TensorFile:
    """The weights of a Google training checkpoint, which also holds the optimizer's state.

    Other files are returned as they are.
    """
    for root in ("opt/target/", "params/"):
        if f"{root}embedding/kernel" in file.tensors:
            weights = {
                name.removeprefix(root): array
                for name, array in file.tensors.items()
                if not name.startswith("opt/state/")
            }
            return file._replace(tensors=weights)
    return file


def infer(file: TensorFile, heads: int | None) -> dict[str, Any]:
    """Sizes, options, channels, image_size and num_classes (0: no head), from names and shapes.

    PyTorch files do not hold the number of heads: it is `heads`, or that of a known size, or width
    / 64. Nor do tensors show whether blocks are pre-norm with exact GELU: timm's "rpn" models
    (norms after the residual branch) and those with tanh GELU have the same, and would be misread.

    Raises:
      UserError: a tensor that determines the architecture is missing or has an unknown shape.
    """
    whose = kind(file.tensors)
    names = {
        "timm": ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "head.weight"),
        "torchvision": (
            "conv_proj.weight",
            "encoder.pos_embedding",
            _torchvision("blocks.0.mlp.fc1.weight", file),
            "heads.head.weight",
        ),
        "google": (
            "embedding/kernel",
            "Transformer/posembed_input/pos_embedding",
            "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel",
            "head/kernel",
        ),
    }[whose]
    patches, positions, hidden = file.shape(names[0], 4), file.shape(names[1], 3), names[2]
    if whose == "google":
        patch, _, channels, width = patches
        hidden = file.shape(hidden, 2)[1]
        query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
        heads = heads or file.shape(query, 3)[1]
    else:
        width, channels, patch, _ = patches
        hidden = file.shape(hidden, 2)[0]
    depth = len({match[1] for match in map(_BLOCK.match, file.tensors) if match})
    class_token = any(name in file.tensors for name in ("cls_token", "class_token", "cls"))
    registers = file.tensors["reg_token"].shape[1] if "reg_token" in file.tensors else 0
    patch_count = positions[1] - (class_token and not registers)
    side = math.isqrt(patch_count)
    if side * side != patch_count:
        raise UserError(
            f"{file.path}: {names[1]} {positions} is no square grid with"
            f" {'a' if class_token else 'no'} class token"
        )
    heads = heads or _heads(file, width, depth, class_token)
    if width % heads:
        raise UserError(f"{file.path}: {heads} heads do not share a width of {width} evenly")
    head = file.tensors.get(names[3])
    pool = "mean_norm" if "fc_norm.weight" in file.tensors else file.metadata.get(POOL, "token")
    if not class_token and pool == "token":
        pool = "norm_mean"
    return {
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": _ratio(hidden, width),
        "qkv_bias": whose != "timm" or "blocks.0.attn.qkv.bias" in file.tensors,
        "layer_scale": "blocks.0.ls1.gamma" in file.tensors,
        "class_token": class_token,
        "pool": pool,
        "registers": registers,
        "channels": channels,
        "image_size": side * patch,
        "num_classes": 0 if head is None else head.shape[-1 if whose == "google" else 0],
    }


def _heads(file: TensorFile, width: int, depth: int, class_token: bool) -> int:
    # timm has ViT-Base without a class token with 12 and with 16 heads, so they are not guessed.
    if class_token and (width, depth) in _SIZES:
        return _SIZES[width, depth][1]
    if width % 64 or not class_token:
        raise UserError(
            f"{file.path}: the heads of a ViT of width {width} with{'' if class_token else 'out'}"
            " class token are in no tensor's shape; give heads"
        )
    return width // 64


def _ratio(hidden: int, width: int) -> float:
    """The ratio whose product with `width`, rounded down, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def architecture(inferred: Mapping[str, Any]) -> str:
    """timm's name, "vit_base_patch16_224"; sizes without one by width and depth, "vit_96x4_..."."""
    width, depth = inferred["width"], inferred["depth"]
    size, _ = _SIZES.get((width, depth), (f"{width}x{depth}", 0))
    pooled = "" if inferred["class_token"] else "gap_"
    return f"vit_{size}_patch{inferred['patch']}_{pooled}{inferred['image_size']}"


def timm_name(path: tuple[str, ...], pool: str) -> str:
    """timm's name of a parameter: `("params", "blocks_0", "attn", "qkv", "kernel")`."""
    name = _renamed(".".join(path[1:]), _TIMM)
    return f"fc_{name}" if name.startswith("norm.") and pool == "mean_norm" else name


def _renamed(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _torchvision(name: str, file: TensorFile) -> str:
    published = "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in file.tensors
    for timm, theirs in _MLP[published]:
        name = name.replace(timm, theirs)
    return _renamed(name, _TORCHVISION)


def places(
    shapes: Mapping[tuple, tuple[int, ...]], file: TensorFile, inferred: Mapping[str, Any]
) -> tuple[dict[tuple, Place], list[str]]:
    """The place of each parameter in the file; and the names of other tensors of its head."""
    whose = kind(file.tensors)

    def place(path, shape):
        if whose == "google":
            return _google_place(path, shape, inferred)
        name = timm_name(path, inferred["pool"])
        name = _torchvision(name, file) if whose == "torchvision" else name
        if path[1:] == ("patch_embed", "kernel"):
            p, c = inferred["patch"], inferred["channels"]
            return Place((name,), (shape[1], c, p, p), _flat_patches)
        return Place((name,), torch_layout.torch_shape(path, shape), partial(_load, path))

    pre_logits = [name for name in file.tensors if _PRE_LOGITS.match(name)]
    return {path: place(path, shape) for path, shape in shapes.items()}, pre_logits


def _load(path, arrays) -> np.ndarray:
    return torch_layout.from_torch(path, arrays[0])


def _flat_patches(arrays) -> np.ndarray:
    """The kernel of a convolution with stride = kernel as that of a dense layer."""
    return arrays[0].transpose(2, 3, 1, 0).reshape(-1, arrays[0].shape[0])


def _google_place(path, shape, inferred) -> Place:
    name = _renamed("/".join(path[1:]), _GOOGLE)
    width, heads, load = inferred["width"], inferred["heads"], partial(_joined, shape)
    split = (heads, width // heads)
    if "{}" in name:  # queries, keys and values are three tensors, with an axis for the heads
        names = tuple(name.format(part) for part in ("query", "key", "value"))
        return Place(names, (width, *split) if path[-1] == "kernel" else split, load)
    if path[-3:-1] == ("attn", "proj") and path[-1] == "kernel":
        return Place((name,), (*split, width), load)
    if path[1:] == ("patch_embed", "kernel"):
        p, c = inferred["patch"], inferred["channels"]
        return Place((name,), (p, p, c, width), load)
    return Place((name,), shape, load)


def _joined(shape, arrays) -> np.ndarray:
    parts = (*shape[:-1], shape[-1] // len(arrays))
    return np.concatenate([array.reshape(parts) for array in arrays], axis=-1)


def resize_positions(embedding: np.ndarray, class_token: bool, side: int) -> np.ndarray:
    """Position embeddings (1, n, d) for a grid of side x side patches: bicubic, as timm."""
    first, grid = np.split(embedding, [int(class_token)], axis=1)
    old, width = math.isqrt(grid.shape[1]), grid.shape[2]
    grid = jnp.reshape(grid, (1, old, old, width))
    grid = jax.image.resize(grid, (1, side, side, width), "bicubic")
    return np.concatenate([first, np.reshape(grid, (1, side * side, width))], axis=1)


def export(variables: Mapping[tuple, np.ndarray], patch: int, pool: str) -> dict[str, np.ndarray]:
    """timm's tensors of a trained network's parameters; `UserError` where timm has no such head."""
    if pool in ("token_pair", "token_mean"):
        raise UserError(f"timm's VisionTransformer has no head on the pool {pool}")
    tensors = {}
    for path, array in variables.items():
        if path[1:] == ("patch_embed", "kernel"):
            square = array.reshape(patch, patch, -1, array.shape[1])
            array = np.ascontiguousarray(square.transpose(3, 2, 0, 1))
        else:
            array = torch_layout.to_torch(path, array)
        tensors[timm_name(path, pool)] = array
    return tensors
