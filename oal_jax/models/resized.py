"""A classifier with images resized to its input size inside the model, and so inside jit."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Resized(nn.Module):
    """`net` on images resized to `size` x `size` bilinearly, gray images repeated to `channels`.

    Enlarging is PyTorch's `interpolate(mode="bilinear", align_corners=False)`; reducing is
    antialiased as Pillow's. Images of this size stay unchanged. The variables are those of `net`,
    by the same names.
    """

    net: nn.Module
    size: int
    channels: int = 3

    @property
    def feature_width(self) -> int:
        """Number of features per image."""
        return self.net.feature_width

    def setup(self) -> None:
        """The wrapper adds no level to the names."""
        nn.share_scope(self, self.net)

    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False, **options: Any
    ) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
        """(logits, features) of `net`."""
        b, h, w, c = images.shape
        if (h, w) != (self.size, self.size):
            images = jax.image.resize(images, (b, self.size, self.size, c), "bilinear")
        if c == 1 and self.channels > 1:
            images = jnp.broadcast_to(images, (*images.shape[:3], self.channels))
        return self.net(images, train, **options)
