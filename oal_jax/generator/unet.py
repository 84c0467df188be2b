"""The UNet of Stable Diffusion v1 and v2 (arXiv 2112.10752): diffusers' `UNet2DConditionModel`.

A level of the map has residual blocks, each followed by a transformer block where the level
attends to the text. The way up gets the outputs of the way down.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.errors import UserError
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

Tokens = Float[Array, "B n c"]

_GROUPS = 32
_EPSILON = 1e-5
_MAX_PERIOD = 10_000.0  # of the sines of the diffusion time (arXiv 1706.03762, section 3.5)
_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
# Entries that v1 and v2 have in common. Another value describes another network.
_FIXED = {
    "_class_name": ("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "act_fn": ("silu",),
    "norm_num_groups": (_GROUPS,),
    "norm_eps": (_EPSILON,),
    "conv_in_kernel": (3, None),
    "conv_out_kernel": (3, None),
    "dual_cross_attention": (False,),
    "only_cross_attention": (False,),
    "transformer_layers_per_block": (1, None),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "downsample_padding": (1,),
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    **dict.fromkeys(("addition_embed_type", "encoder_hid_dim_type", "num_class_embeds"), (None,)),
    **dict.fromkeys(("time_cond_proj_dim", "timestep_post_act", "cross_attention_norm"), (None,)),
    "class_embed_type": (None,),
}


class UNet(nn.Module):
    """Predicts noise or velocity; the fields are entries of `unet/config.json`.

    `attention_head_dim` is the number of heads of each level: old configs call it by this name.
    """

    sample_size: int = 32
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (*_DOWN[:1] * 3, _DOWN[1])
    up_block_types: tuple[str, ...] = (_UP[1], *_UP[:1] * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: Maps, times: Float[Array, " B"], states: Tokens) -> Maps:
        """The prediction in `dtype`.

        Args:
          latents: (B, h, w, C).
          times: (B,) in training steps, 0 to 999; int32 or float32.
          states: (B, L, width) text states.
        """
        channels, levels = self.block_out_channels, len(self.block_out_channels)
        heads, size, dtype = self.attention_head_dim, self.layers_per_block, self.dtype
        latents, states = latents.astype(dtype), states.astype(dtype)
        time = time_embedding(times, channels[0], self.flip_sin_to_cos, self.freq_shift)
        time = _TimeMLP(4 * channels[0], dtype, name="time_embedding")(time.astype(dtype))
        time = nn.silu(time)  # each residual block begins with it

        x = convolution(channels[0], dtype, "conv_in")(latents)
        skips = [x]
        for i, kind in enumerate(self.down_block_types):
            attends = heads[i] if kind == _DOWN[0] else 0
            parts = channels[i], size, attends, self.use_linear_projection, i < levels - 1, dtype
            x, outputs = _Down(*parts, name=f"down_blocks_{i}")(x, time, states)
            skips += outputs
        middle = _Middle(heads[-1], self.use_linear_projection, dtype, name="mid_block")
        x = middle(x, time, states)
        for i, kind in enumerate(self.up_block_types):
            level = levels - 1 - i
            attends = heads[level] if kind == _UP[0] else 0
            parts = channels[level], size + 1, attends, self.use_linear_projection, level > 0, dtype
            skips, outputs = skips[: -size - 1], skips[-size - 1 :]
            x = _Up(*parts, name=f"up_blocks_{i}")(x, outputs[::-1], time, states)
        x = nn.silu(group_norm(_GROUPS, _EPSILON, dtype, "conv_norm_out")(x))
        return convolution(self.out_channels, dtype, "conv_out")(x)


def make(config: Mapping[str, Any], dtype: Any = jnp.float32, cls: type[UNet] = UNet) -> UNet:
    """The UNet of a `unet/config.json`; `UserError` if it is of another architecture."""
    blocks = {"down_block_types": _DOWN, "up_block_types": _UP}
    heads = config.get("attention_head_dim", 8)
    if not isinstance(heads, list):  # of all levels
        heads = [heads] * len(config.get("down_block_types") or UNet.down_block_types)
    config = {**config, "attention_head_dim": heads}
    module = from_config(cls, "UNet", config, _FIXED, blocks, dtype)
    if len(heads) != len(module.block_out_channels):
        raise UserError("UNet: attention_head_dim and block_out_channels differ in length")
    return module


def time_embedding(
    times: Float[Array, " B"], width: int, cosines_first: bool, shift: float
) -> Float[Array, "B {width}"]:
    """Sines and cosines of the time, with periods in geometric progression, in float32."""
    half = width // 2
    rates = _MAX_PERIOD ** (-jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = times.astype(jnp.float32)[:, None] * rates[None, :]
    parts = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate(parts[::-1] if cosines_first else parts, axis=-1)


class _TimeMLP(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, time: Float[Array, "B t"]) -> Float[Array, "B t"]:
        hidden = nn.silu(nn.Dense(self.width, dtype=self.dtype, name="linear_1")(time))
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(hidden)


class _Level(nn.Module):
    """Fields of a level on the way down or up; with `heads=0` it does not attend."""

    channels: int
    layers: int
    heads: int
    linear: bool
    resizes: bool
    dtype: Any

    def layer(self, i: int, x: Maps, time: Array, states: Tokens) -> Maps:
        x = ResidualBlock(self.channels, _GROUPS, _EPSILON, self.dtype, name=f"resnets_{i}")(
            x, time
        )
        if self.heads:
            x = _Transformer(self.heads, self.linear, self.dtype, name=f"attentions_{i}")(x, states)
        return x


class _Down(_Level):
    @nn.compact
    def __call__(self, x: Maps, time: Array, states: Tokens) -> tuple[Maps, list[Maps]]:
        outputs = []
        for i in range(self.layers):
            x = self.layer(i, x, time, states)
            outputs.append(x)
        if self.resizes:
            x = Downsample(self.channels, (1, 1), self.dtype, name="downsamplers_0")(x)
            outputs.append(x)
        return x, outputs


class _Up(_Level):
    @nn.compact
    def __call__(self, x: Maps, skips: Sequence[Maps], time: Array, states: Tokens) -> Maps:
        for i in range(self.layers):
            x = self.layer(i, jnp.concatenate([x, skips[i]], axis=-1), time, states)
        return Upsample(self.channels, self.dtype, name="upsamplers_0")(x) if self.resizes else x


class _Middle(nn.Module):
    heads: int
    linear: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps, time: Array, states: Tokens) -> Maps:
        block = x.shape[-1], _GROUPS, _EPSILON, self.dtype
        x = ResidualBlock(*block, name="resnets_0")(x, time)
        x = _Transformer(self.heads, self.linear, self.dtype, name="attentions_0")(x, states)
        return ResidualBlock(*block, name="resnets_1")(x, time)


class _Transformer(nn.Module):
    """A transformer block on the pixels of a map, beside a shortcut.

    Its projections are dense layers in v2 (`linear`), 1 x 1 convolutions in v1.
    """

    heads: int
    linear: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps, states: Tokens) -> Maps:
        width = x.shape[-1]

        def project(name: str) -> nn.Module:
            if self.linear:
                return nn.Dense(width, dtype=self.dtype, name=name)
            return convolution(width, self.dtype, name, size=1)

        hidden = group_norm(_GROUPS, _EPSILON, self.dtype, "norm")(x)
        hidden = project("proj_in")(hidden).reshape(x.shape[0], -1, width)
        block = _TransformerBlock(self.heads, self.dtype, name="transformer_blocks_0")
        hidden = block(hidden, states).reshape(x.shape)
        return x + project("proj_out")(hidden)


class _TransformerBlock(nn.Module):
    """Attention to the map, attention to the text, a gated MLP."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens, states: Tokens) -> Tokens:
        norm = lambda i: nn.LayerNorm(_EPSILON, self.dtype, name=f"norm{i}")
        own = norm(1)(x)
        x = x + _Attention(self.heads, self.dtype, name="attn1")(own, own)
        x = x + _Attention(self.heads, self.dtype, name="attn2")(norm(2)(x), states)
        return x + _FeedForward(self.dtype, name="ff")(norm(3)(x))


class _Attention(nn.Module):
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens, states: Tokens) -> Tokens:
        def project(tokens: Tokens, name: str) -> Array:
            dense = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name=name)
            return dense(tokens).reshape(*tokens.shape[:2], self.heads, -1)

        query, key, value = project(x, "to_q"), project(states, "to_k"), project(states, "to_v")
        mixed = attention.attend(query, key, value).reshape(x.shape)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="to_out_0")(mixed)


class _FeedForward(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        gated = _GatedGELU(4 * width, self.dtype, name="net_0")(x)
        return nn.Dense(width, dtype=self.dtype, name="net_2")(gated)


class _GatedGELU(nn.Module):
    """GEGLU with the exact GELU (arXiv 2002.05202)."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        both = nn.Dense(2 * self.width, dtype=self.dtype, name="proj")(x)
        value, gate = jnp.split(both, 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)
