"""Names and array layouts of PyTorch checkpoints, derived from a Flax parameter tree.

The modules of `oal_jax.generator` have the structure of diffusers' and transformers' PyTorch ones,
so the PyTorch name of every leaf follows from its path in the Flax tree. Three things differ:

- numbered submodules: `down_blocks_0` in Flax is `down_blocks.0` in PyTorch;
- leaf names: `kernel`, `scale` and `embedding` are all `weight` in PyTorch;
- array layout: a dense kernel is (in, out) in Flax and (out, in) in PyTorch; a convolution kernel
  is (h, w, in, out) against (out, in, h, w).
"""

import re
from collections.abc import Sequence

import numpy as np

Path = tuple[str, ...]

# Module lists. Only after these is a trailing number an index (`linear_1` is a plain name).
_LISTS = (
    "attentions|down_blocks|downsamplers|net|resnets|to_out|transformer_blocks|up_blocks|upsamplers"
)
_INDEXED = re.compile(rf"^({_LISTS})_(\d+)$")

# The attention of the autoencoder. The Flax class has the names of early checkpoints.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def torch_names(path: Path) -> tuple[str, ...]:
    """The names a Flax leaf may have in a PyTorch checkpoint, the current one first.

    Args:
      path: keys from the root of the Flax tree to the leaf, for example
        `("down_blocks_0", "resnets_1", "conv1", "kernel")`.

    Returns:
      One name, or two if older checkpoints used another.
    """
    *modules, leaf = path
    parts = [_INDEXED.sub(r"\1.\2", module) for module in modules]
    names = [".".join([*parts, _LEAVES[leaf]])]
    if parts and parts[-1] in _VAE_ATTENTION:
        current = [*parts[:-1], _VAE_ATTENTION[parts[-1]], _LEAVES[leaf]]
        names.insert(0, ".".join(current))
    return tuple(names)


def torch_shape(path: Path, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in a PyTorch checkpoint of a Flax leaf of shape `shape`."""
    if path[-1] == "kernel" and len(shape) == 2:
        return shape[1], shape[0]
    if path[-1] == "kernel" and len(shape) == 4:
        return shape[3], shape[2], shape[0], shape[1]
    return tuple(shape)


def same_weights(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes are equal, or those of a dense kernel and of a 1 x 1 convolution.

    The attention of early autoencoders, and `proj_in` and `proj_out`, exist as both.
    """
    shape, expected = tuple(shape), tuple(expected)
    shorter, longer = sorted((shape, expected), key=len)
    return shape == expected or (len(shorter) == 2 and longer == (*shorter, 1, 1))


def to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """A Flax leaf in PyTorch's layout, contiguous."""
    if path[-1] == "kernel" and array.ndim == 2:
        array = array.T
    elif path[-1] == "kernel" and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(array)


def from_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """A PyTorch tensor in Flax's layout, as a view."""
    if path[-1] == "kernel" and array.ndim == 2:
        return array.T
    if path[-1] == "kernel" and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array
