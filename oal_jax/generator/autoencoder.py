"""The autoencoder of Stable Diffusion (arXiv 2112.10752): diffusers' `AutoencoderKL`.

Images are (B, H, W, channels) in about [-1, 1], latents (B, h, w, C), not scaled.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from oal_jax.generator import attention
from oal_jax.generator.layers import (
    Downsample,
    Maps,
    ResidualBlock,
    Upsample,
    convolution,
    from_config,
    group_norm,
)

_EPSILON = 1e-6
_LOG_VARIANCES = -30.0, 20.0
_DOWN = ("DownEncoderBlock2D",)
_UP = ("UpDecoderBlock2D",)
_FIXED = {
    "_class_name": ("AutoencoderKL", "FlaxAutoencoderKL"),
    "act_fn": ("silu",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std"), (None,)),
}


class Autoencoder(nn.Module):
    """Encoder and decoder; the fields are entries of `vae/config.json`."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = _DOWN
    up_block_types: tuple[str, ...] = _UP
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes both halves, and the 1 x 1 convolutions between them."""
        sizes = self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.dtype
        self.encoder = _Encoder(2 * self.latent_channels, *sizes)
        self.decoder = _Decoder(self.out_channels, *sizes)
        self.quant_conv = convolution(2 * self.latent_channels, self.dtype, None, size=1)
        self.post_quant_conv = convolution(self.latent_channels, self.dtype, None, size=1)

    def encode(self, images: Maps) -> tuple[Maps, Maps]:
        """Mean and log variance of the latents of images."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return mean, jnp.clip(log_variance, *_LOG_VARIANCES)

    def decode(self, latents: Maps) -> Maps:
        """Images of latents."""
        return self.decoder(self.post_quant_conv(latents))

    def __call__(self, images: Maps) -> Maps:
        """Images decoded from their mean latents, for `init`."""
        return self.decode(self.encode(images)[0])


def make(
    config: Mapping[str, Any], dtype: Any = jnp.float32, cls: type[Autoencoder] = Autoencoder
) -> Autoencoder:
    """The autoencoder of a `vae/config.json`; `UserError` if it is of another architecture."""
    blocks = {"down_block_types": _DOWN, "up_block_types": _UP}
    return from_config(cls, "autoencoder", config, _FIXED, blocks, dtype)


class _Half(nn.Module):
    """Fields of the encoder or the decoder, which gives `outputs` channels."""

    outputs: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: Any

    def output(self, x: Maps) -> Maps:
        x = nn.silu(group_norm(self.groups, _EPSILON, self.dtype, "conv_norm_out")(x))
        return convolution(self.outputs, self.dtype, "conv_out")(x)


class _Encoder(_Half):
    @nn.compact
    def __call__(self, images: Maps) -> Maps:
        last = len(self.channels) - 1
        x = convolution(self.channels[0], self.dtype, "conv_in")(images)
        for i, channels in enumerate(self.channels):
            parts = channels, self.layers, self.groups, i < last, self.dtype
            x = _Down(*parts, name=f"down_blocks_{i}")(x)
        return self.output(_Middle(self.groups, self.dtype, name="mid_block")(x))


class _Decoder(_Half):
    @nn.compact
    def __call__(self, latents: Maps) -> Maps:
        last = len(self.channels) - 1
        x = convolution(self.channels[last], self.dtype, "conv_in")(latents)
        x = _Middle(self.groups, self.dtype, name="mid_block")(x)
        for i, channels in enumerate(self.channels[::-1]):
            parts = channels, self.layers + 1, self.groups, i < last, self.dtype
            x = _Up(*parts, name=f"up_blocks_{i}")(x)
        return self.output(x)


class _Level(nn.Module):
    """Fields of a level of the encoder or the decoder."""

    channels: int
    layers: int
    groups: int
    resizes: bool
    dtype: Any

    def residual_blocks(self, x: Maps) -> Maps:
        for i in range(self.layers):
            block = self.channels, self.groups, _EPSILON, self.dtype
            x = ResidualBlock(*block, name=f"resnets_{i}")(x)
        return x


class _Down(_Level):
    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        x = self.residual_blocks(x)
        if not self.resizes:
            return x
        # Zeros at the end of rows and columns only.
        return Downsample(self.channels, (0, 1), self.dtype, name="downsamplers_0")(x)


class _Up(_Level):
    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        x = self.residual_blocks(x)
        return Upsample(self.channels, self.dtype, name="upsamplers_0")(x) if self.resizes else x


class _Middle(nn.Module):
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        block = x.shape[-1], self.groups, _EPSILON, self.dtype
        x = ResidualBlock(*block, name="resnets_0")(x)
        x = _Attention(self.groups, self.dtype, name="attentions_0")(x)
        return ResidualBlock(*block, name="resnets_1")(x)


class _Attention(nn.Module):
    """Attention of one head among the pixels of a map, beside a shortcut."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        count, *_, width = x.shape
        tokens = group_norm(self.groups, _EPSILON, self.dtype, "group_norm")(x)
        tokens = tokens.reshape(count, -1, width)
        dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)
        parts = (dense(name)(tokens)[:, :, None, :] for name in ("query", "key", "value"))
        mixed = attention.attend(*parts)[:, :, 0]
        return x + dense("proj_attn")(mixed).reshape(x.shape)
