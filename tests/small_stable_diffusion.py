"""Small Stable Diffusions for the tests: weights drawn by NumPy, the same ones everywhere."""

import functools
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

import oal_jax.pretrained
from oal_jax.generator import create
from oal_jax.generator import stable_diffusion as stable
from oal_jax.pretrained import diffusers_directory, torch_layout

SHIPPED = Path(oal_jax.pretrained.__file__).parent / "weights" / "fashion_sd"
WORDS = ("cat", "aquarium_fish", "pickup_truck")
# The shipped model's layers, narrow: latents of 4 x 4, images of 16 px with one channel.
TINY = {
    "unet": {"block_out_channels": [32, 32], "sample_size": 4},
    "vae": {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "sample_size": 16},
}
# Every kind of layer of v1: latents of 8 x 8, images of 16 px with three channels.
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

# What v2 changes: linear projections, heads per level, velocities, the exact GELU, "!" as padding.
SMALL_V2 = {
    "text_encoder": {"intermediate_size": 64, "hidden_act": "gelu"},
    "unet": SMALL["unet"] | {"attention_head_dim": [2, 4], "use_linear_projection": True},
    "vae": SMALL["vae"],
}


def draw(name: str, *shape: int) -> np.ndarray:
    """Standard normal values that depend on the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def write_weights(directory: Path) -> Path:
    """Writes safetensors files for the configs of a directory."""
    shapes = stable.param_shapes(stable.build(directory), directory)
    for component, tree in shapes.items():
        tensors = {}
        for path, leaf in traverse_util.flatten_dict(tree).items():
            name = torch_layout.torch_names(path)[0]
            noise = draw(name, *torch_layout.torch_shape(path, leaf.shape))
            if path[-1] == "kernel":
                tensors[name] = noise / np.float32(np.sqrt(np.prod(noise.shape[1:])))
            else:
                tensors[name] = np.float32(0.1) * noise + np.float32(path[-1] == "scale")
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        file = directory / component / f"{stem}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


def write_tiny(directory: Path) -> Path:
    """The directory of a `TINY` model: tokenizer with two words, configs, weights."""
    create.create(directory, ("cat", "dog"), width=32, overrides=TINY)
    return write_weights(directory)


@functools.cache
def tiny():
    """(static part, parameters) of the `TINY` model; loaded once a process."""
    with tempfile.TemporaryDirectory() as directory:
        return stable.load(write_tiny(Path(directory)))


@functools.cache
def shipped():
    """(static part, parameters) of the shipped model; loaded once a process."""
    return stable.load(SHIPPED)


def write_small(directory: Path, words: Sequence[str] = WORDS) -> Path:
    """The directory of a `SMALL` model: tokenizer with these words, configs, weights."""
    create.create(directory, words, width=32, overrides=SMALL)
    return write_weights(directory)


def write_small_v2(directory: Path, words: Sequence[str] = WORDS) -> Path:
    """The directory of a `SMALL_V2` model."""
    create.create(directory, words, width=32, overrides=SMALL_V2)
    schedule = create.SCHEDULER | {"prediction_type": "v_prediction"}
    diffusers_directory.write_json(directory / "scheduler" / "scheduler_config.json", schedule)
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    diffusers_directory.write_json(directory / "tokenizer" / "special_tokens_map.json", marks)
    return write_weights(directory)
