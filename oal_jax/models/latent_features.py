"""A_t: maps from latents to the teacher's features, which stand for decoder and teacher.

They have no batch statistics, so that what they say of a latent depends on that latent alone.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.models.conv import Conv, patches_product
from oal_jax.models.projector import LatentAdapter

LAST = "fc2"  # the layer, of either architecture, that gives the features
_GROUPS = 8  # of channels that are normalised together


class _Block(nn.Module):
    """Pre-activation residual block with group normalisation."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Height and width shrink by `stride`, rounded up."""
        groups = lambda name: nn.GroupNorm(min(_GROUPS, self.channels // 2), name=name)
        h = nn.gelu(groups("norm1")(x))
        short = x
        if self.stride > 1 or x.shape[-1] != self.channels:
            short = Conv(self.channels, 1, self.stride, name="short")(h)
        h = Conv(self.channels, 3, self.stride, fan="fan_in", name="conv1")(h)
        h = nn.gelu(groups("norm2")(h))
        return short + Conv(self.channels, 3, 1, fan="fan_in", name="conv2")(h)


class ResidualAdapter(nn.Module):
    """Residual blocks, then the mean over positions and a linear layer.

    Normalised activations and the mean keep its features bounded where latents are far from those
    it has learned from.
    """

    width: int
    hidden: int = 64

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """A feature for each latent."""
        x = Conv(self.hidden // 2, 3, 1, name="stem")(latents)
        x = _Block(self.hidden // 2, 1, name="block_0")(x)
        x = _Block(self.hidden, 2, name="block_1")(x)
        while x.shape[1] > 4:  # 64 x 64 latents of full-size Stable Diffusion come down to 4 x 4
            x = _Block(self.hidden, 2, name=f"down_{x.shape[1]}")(x)
        x = _Block(self.hidden, 1, name="block_2")(x)
        x = nn.gelu(nn.GroupNorm(min(_GROUPS, self.hidden // 2), name="norm")(x))
        return nn.Dense(self.width, name=LAST)(jnp.mean(x, axis=(1, 2)))


ARCHITECTURES = {"conv": LatentAdapter, "residual": ResidualAdapter}


def make(architecture: str, width: int, hidden: int) -> nn.Module:
    """The map to features of `width`, a key of `ARCHITECTURES`."""
    return ARCHITECTURES[architecture](width, hidden)


def apply_in_loop(
    module: nn.Module, params: Any, latents: Float[Array, "b h w c"]
) -> Float[Array, "b d"]:
    """`module.apply` for the body of a compiled loop that takes gradients.

    On CPU the gradient of a convolution inside a loop is about a hundred times slower than outside:
    there the convolutions are computed as products of patches.
    """
    if jax.default_backend() != "cpu":
        return module.apply({"params": params}, latents)
    with nn.intercept_methods(_as_products):
        return module.apply({"params": params}, latents)


def _as_products(next_fun, args, kwargs, context):
    conv = context.module
    if not isinstance(conv, Conv) or context.method_name != "__call__" or conv.kernel == 1:
        return next_fun(*args, **kwargs)
    kernel = conv.get_variable("params", "kernel")
    return patches_product(args[0], kernel, conv.stride, (conv.kernel - 1) // 2)
