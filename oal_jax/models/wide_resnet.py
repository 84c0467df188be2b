"""Wide ResNet (Zagoruyko and Komodakis, arXiv 1605.07146), pre-activation, for 32 px."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oal_jax.models.conv import Conv, batch_norm, rematerialised, sow_map
from oal_jax.models.mutual_information import TorchDense
from oal_jax.models.normalise import normalise


class WideBlock(nn.Module):
    """BN-ReLU-3 x 3, BN-ReLU-dropout-3 x 3, and the shortcut.

    Where the number of channels changes, the shortcut is a 1 x 1 convolution of the activated
    input; elsewhere it is the input itself.
    """

    channels: int
    stride: int
    affine: bool
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, mask: Bool[Array, "b 1 1 1"] | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """`train`: normalise by the batch, or by its rows in `mask`; drop outputs."""
        norm = batch_norm(train, self.affine, self.dtype)
        conv = partial(Conv, fan="fan_in", dtype=self.dtype)
        active = nn.relu(norm(name="bn1")(x, mask=mask))
        h = conv(self.channels, 3, self.stride, name="conv1")(active)
        h = nn.relu(norm(name="bn2")(h, mask=mask))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.channels, 3, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.stride, name="shortcut")(active)
        return x + h


class WideResNet(nn.Module):
    """Images in [0, 1] to (logits, features): three stages of 16, 32 and 64 times `widen`.

    Features are the global average pool. Depth 40 and `widen` 4 give WRN-40-4. `dropout` needs the
    random stream "dropout" in training. Maps are sown as `maps`: stage0 after the first
    convolution, one after each of the first two stages, and the normalised and activated input of
    the pool. `dtype`: see `models.conv`; logits and features are float32. With `remat` the backward
    pass recomputes the activations of each block.
    """

    num_classes: int
    depth: int = 40
    widen: int = 4
    affine_bn: bool = True
    dropout: float = 0.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def feature_width(self) -> int:
        """Number of features per image."""
        return 64 * self.widen

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"],
        train: bool = False,
        statistics: Bool[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
        """`train`: normalise by the batch, or by its rows in `statistics`; drop outputs."""
        mask = None if statistics is None else statistics[:, None, None, None]
        x = normalise(images, self.mean, self.std)
        x = Conv(16, 3, fan="fan_in", dtype=self.dtype, name="conv1")(x)
        block = rematerialised(WideBlock) if self.remat else WideBlock
        for i in range(3):
            sow_map(self, i, x)
            for j in range((self.depth - 4) // 6):
                x = block(
                    channels=16 * 2**i * self.widen,
                    stride=2 if i > 0 and j == 0 else 1,
                    affine=self.affine_bn,
                    dropout=self.dropout,
                    dtype=self.dtype,
                    name=f"layer{i + 1}_{j}",
                )(x, train, mask)
        x = nn.relu(batch_norm(train, self.affine_bn, self.dtype)(name="bn")(x, mask=mask))
        sow_map(self, 3, x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return TorchDense(self.num_classes, name="fc")(features), features
