"""Modules of Stable Diffusion v1 at its published sizes, without weights or tokenizer.

Source: the config files of CompVis's v1-1 to v1-4 in diffusers' layout, which v1-5 shares
(arXiv 2112.10752; text encoder: CLIP ViT-L/14, arXiv 2103.00020). 860 M parameters in the UNet.
"""

from typing import Any

import jax.numpy as jnp

from oal_jax.generator.schedule import NoiseSchedule
from oal_jax.generator.stable_diffusion import StableDiffusion, modules

_TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,  # the number of heads, which old configs call by this name
    "cross_attention_dim": 768,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_VAE = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
}
_SCALING_FACTOR = 0.18215


def build(dtype: Any = jnp.float32, backend: str = "native") -> StableDiffusion:
    """The modules; UNet and text encoder compute in `dtype`. `tokenizer` is None."""
    configs = {"text_encoder": _TEXT_ENCODER, "unet": UNET, "vae": _VAE}
    parts = modules(configs, dtype, backend)
    return StableDiffusion(None, *parts, NoiseSchedule(), _SCALING_FACTOR)
