"""Small Stable Diffusions for the tests: weights drawn by NumPy, the same ones everywhere."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from oal_jax.generator import create
from oal_jax.generator import stable_diffusion as stable
from oal_jax.pretrained import torch_layout

WORDS = ("cat", "aquarium_fish", "pickup_truck")
# A model with every kind of layer of v1.
SMALL = {
    "text_encoder": {"intermediate_size": 64},
    "unet": {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": 16,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "scaling_factor": 0.18215,
    },
}


def draw(name: str, *shape: int) -> np.ndarray:
    """Standard normal values that depend on the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def write_weights(directory: Path) -> Path:
    """Safetensors files for the configs of a directory."""
    shapes = stable.param_shapes(stable.build(directory), directory)
    for component, tree in shapes.items():
        tensors = {}
        for path, leaf in traverse_util.flatten_dict(tree).items():
            name = torch_layout.torch_names(path)[0]
            drawn = draw(name, *torch_layout.torch_shape(path, leaf.shape))
            if path[-1] == "kernel":
                tensors[name] = drawn / np.float32(np.sqrt(np.prod(drawn.shape[1:])))
            else:
                tensors[name] = np.float32(0.1) * drawn + np.float32(path[-1] == "scale")
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        file = directory / component / f"{stem}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


def write_small(directory: Path, words: Sequence[str] = WORDS) -> Path:
    """A whole one: tokenizer that has these words as tokens, configs, weights."""
    create.create(directory, words, width=32, overrides=SMALL)
    return write_weights(directory)
