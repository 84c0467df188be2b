"""Layers that the UNet and the autoencoder of Stable Diffusion share; the reader of their configs.

Feature maps are (B, h, w, c). Submodules have the names of diffusers' weight files, so that
`oal_jax.pretrained.torch_layout` finds a tensor by its path.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.errors import UserError

Maps = Float[Array, "B h w c"]


def from_config(
    cls: type[nn.Module],
    what: str,
    config: Mapping[str, Any],
    fixed: Mapping[str, tuple],
    blocks: Mapping[str, tuple[str, ...]],
    dtype: Any,
) -> nn.Module:
    """The module of a component's `config.json`.

    Args:
      cls: a module whose fields are named as the entries of the config; other entries are ignored.
      what: the component, for messages.
      config: content of the file.
      fixed: entries that the module fixes in code, and the values that it can express.
      blocks: entries that name one block per level, and the kinds of block that the module has.
      dtype: precision of the arithmetic.

    Raises:
      UserError: the config describes another network.
    """
    for key, values in fixed.items():
        if key in config and config[key] not in values:
            raise UserError(f"{what}: {key}={config[key]!r} is not supported")
    for key, kinds in blocks.items():
        for block in config.get(key) or ():
            if block not in kinds:
                raise UserError(f"{what}: {key} names {block!r}, which is not supported")
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    for name in ("parent", "name", "dtype"):
        del fields[name]
    module = cls(**read_fields(what, config, fields), dtype=dtype)
    for key in blocks:
        if len(getattr(module, key)) != len(module.block_out_channels):
            raise UserError(f"{what}: {key} and block_out_channels differ in length")
    return module


def read_fields(
    what: str, config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of a config that are among `defaults`, lists as tuples.

    Raises:
      UserError: a value is not of its default's type, or a number is negative.
    """
    values = {name: config[name] for name in defaults if name in config}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in values.items():
        if not _is_like(value, defaults[name]):
            raise UserError(f"{what}: {name}={value!r} is not possible")
    return values


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        is_list = isinstance(value, tuple) and bool(value)
        return is_list and all(v and _is_like(v, default[0]) for v in value)
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    numbers = (int, float) if isinstance(default, float) else int
    return isinstance(value, numbers) and not isinstance(value, bool) and value >= 0


def convolution(
    channels: int, dtype: Any, name: str, *, size: int = 3, stride: int = 1, padding: Any = None
) -> nn.Conv:
    """A square convolution; by default as many zeros on each side as keep the size at stride 1."""
    return nn.Conv(
        channels,
        (size, size),
        strides=(stride, stride),
        padding=size // 2 if padding is None else padding,
        dtype=dtype,
        name=name,
    )


def group_norm(groups: int, epsilon: float, dtype: Any, name: str) -> nn.GroupNorm:
    """Group normalisation, with statistics in float32."""
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """Two convolutions, each after group normalisation and SiLU, beside a shortcut.

    Between them, the embedding of the diffusion time is added to each channel.
    """

    channels: int
    groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps, time: Float[Array, "B t"] | None = None) -> Maps:
        """Maps of `channels` channels; without `time`, nothing is added."""
        hidden = x
        for number in (1, 2):
            norm = group_norm(self.groups, self.epsilon, self.dtype, f"norm{number}")
            conv = convolution(self.channels, self.dtype, f"conv{number}")
            hidden = conv(nn.silu(norm(hidden)))
            if number == 1 and time is not None:
                shift = nn.Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(time)
                hidden = hidden + shift[:, None, None, :]
        if x.shape[-1] != self.channels:
            x = convolution(self.channels, self.dtype, "conv_shortcut", size=1)(x)
        return x + hidden


class Downsample(nn.Module):
    """A convolution of stride 2; `padding` is that of the rows and of the columns."""

    channels: int
    padding: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps of half the size."""
        padding = (self.padding, self.padding)
        return convolution(self.channels, self.dtype, "conv", stride=2, padding=padding)(x)


class Upsample(nn.Module):
    """Each pixel twice in both directions, then a convolution."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps of twice the size."""
        count, height, width, channels = x.shape
        pairs = (count, height, 2, width, 2, channels)
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], pairs)
        doubled = doubled.reshape(count, 2 * height, 2 * width, channels)
        return convolution(self.channels, self.dtype, "conv")(doubled)
