"""ResNets (He et al., arXiv 1512.03385) laid out as torchvision's, for 224 px, 32 px and less."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oal_jax.models.conv import Conv, batch_norm, rematerialised, sow_map
from oal_jax.models.normalise import normalise

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
# kernel, stride, pool: torchvision's stem, OpenOOD's 32 px stem, and a cheap one for 28 px.
STEMS = {"imagenet": (7, 2, True), "cifar": (3, 1, False), "small": (3, 2, False)}


class ResNetBlock(nn.Module):
    """Basic (two 3 x 3) or bottleneck (1 x 1, 3 x 3, 1 x 1) residual block."""

    channels: int
    stride: int
    bottleneck: bool
    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, mask: Bool[Array, "b 1 1 1"] | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """`train`: normalise by the batch, or by its rows in `mask`."""
        norm = batch_norm(train, self.affine, self.dtype)
        conv = partial(Conv, dtype=self.dtype)
        out = self.channels * (4 if self.bottleneck else 1)
        if self.bottleneck:
            h = conv(self.channels, 1, name="conv1")(x)
            h = nn.relu(norm(name="bn1")(h, mask=mask))
            h = conv(self.channels, 3, self.stride, name="conv2")(h)
            h = nn.relu(norm(name="bn2")(h, mask=mask))
            h = norm(name="bn3")(conv(out, 1, name="conv3")(h), mask=mask)
        else:
            h = conv(self.channels, 3, self.stride, name="conv1")(x)
            h = nn.relu(norm(name="bn1")(h, mask=mask))
            h = norm(name="bn2")(conv(out, 3, name="conv2")(h), mask=mask)
        if x.shape != h.shape:
            shortcut = conv(out, 1, self.stride, name="downsample_conv")(x)
            x = norm(name="downsample_bn")(shortcut, mask=mask)
        return nn.relu(x + h)


class ResNet(nn.Module):
    """Images in [0, 1] to (logits, features); features are the global average pool.

    `width` is the number of channels of the first stage (64 in the paper); with `affine_bn=False`
    the batch normalisation has no scale and offset. Maps are sown as `maps`: stage0 after the
    stem, then one per stage. `dtype`: see `models.conv`; logits and features are float32. With
    `remat` the backward pass recomputes the activations of each block.
    """

    num_classes: int
    depth: int = 18
    width: int = 64
    stem: str = "cifar"
    affine_bn: bool = True
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def feature_width(self) -> int:
        """Number of features per image."""
        return self.width * 8 * (4 if self.depth >= 50 else 1)

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"],
        train: bool = False,
        statistics: Bool[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
        """`train`: normalise by the batch and update the running statistics.

        `statistics` marks the images that batch statistics are taken over (None: all). The others
        are normalised by the same statistics, so they differ by their pixels alone.
        """
        mask = None if statistics is None else statistics[:, None, None, None]
        sizes: Sequence[int] = STAGES[self.depth]
        kernel, stride, pool = STEMS[self.stem]
        x = normalise(images, self.mean, self.std)
        x = Conv(self.width, kernel, stride, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(batch_norm(train, self.affine_bn, self.dtype)(name="bn1")(x, mask=mask))
        sow_map(self, 0, x)
        if pool:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = rematerialised(ResNetBlock) if self.remat else ResNetBlock
        for i, blocks in enumerate(sizes):
            for j in range(blocks):
                x = block(
                    channels=self.width * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    bottleneck=self.depth >= 50,
                    affine=self.affine_bn,
                    dtype=self.dtype,
                    name=f"layer{i + 1}_{j}",
                )(x, train, mask)
            sow_map(self, i + 1, x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.num_classes, name="fc")(features), features
