"""DenseNet-BC (Huang et al., arXiv 1608.06993), in the form that Unleashing Mask trains."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oal_jax.models.conv import Conv, batch_norm, rematerialised, sow_map
from oal_jax.models.mutual_information import TorchDense
from oal_jax.models.normalise import normalise


class DenseLayer(nn.Module):
    """BN-ReLU-1 x 1 to 4 `growth` channels, BN-ReLU-3 x 3 to `growth`, appended to the input."""

    growth: int
    affine: bool
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, mask: Bool[Array, "b 1 1 1"] | None = None
    ) -> Float[Array, "b h w c2"]:
        """`train`: normalise by the batch, or by its rows in `mask`; drop outputs."""
        norm = batch_norm(train, self.affine, self.dtype)
        conv = partial(Conv, fan="fan_in", dtype=self.dtype)
        h = nn.relu(norm(name="bn1")(x, mask=mask))
        h = conv(4 * self.growth, 1, name="conv1")(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = nn.relu(norm(name="bn2")(h, mask=mask))
        h = conv(self.growth, 3, name="conv2")(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return jnp.concatenate([x, h], axis=-1)


class DenseNet(nn.Module):
    """Images in [0, 1] to (logits, features): three dense blocks, half the channels between two.

    Features are the global average pool. With depth 100, growth 12, 10 classes and no scale and
    offset in the batch normalisation (`affine_bn=False`, as in arXiv 2306.03715) it has 745,174
    parameters. `dropout` follows every convolution but the first and needs the random stream
    "dropout" in training. Maps are sown as `maps`: stage0 after the first convolution, one after
    each transition, and the input of the pool. `dtype`: see `models.conv`; logits and features are
    float32. With `remat` the backward pass recomputes the activations of each layer.
    """

    num_classes: int
    depth: int = 100
    growth: int = 12
    affine_bn: bool = True
    dropout: float = 0.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def feature_width(self) -> int:
        """Number of features per image."""
        width, added = 2 * self.growth, self._layers * self.growth
        for _ in range(2):
            width = (width + added) // 2
        return width + added

    @property
    def _layers(self) -> int:
        """Layers per block: each has two convolutions, and four are outside of the blocks."""
        return (self.depth - 4) // 6

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"],
        train: bool = False,
        statistics: Bool[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
        """`train`: normalise by the batch, or by its rows in `statistics`; drop outputs."""
        mask = None if statistics is None else statistics[:, None, None, None]
        norm = batch_norm(train, self.affine_bn, self.dtype)
        conv = partial(Conv, fan="fan_in", dtype=self.dtype)
        dense_layer = rematerialised(DenseLayer) if self.remat else DenseLayer
        x = normalise(images, self.mean, self.std)
        x = conv(2 * self.growth, 3, name="conv1")(x)
        sow_map(self, 0, x)
        for i in range(1, 4):
            for j in range(self._layers):
                layer = dense_layer(
                    self.growth, self.affine_bn, self.dropout, self.dtype, name=f"block{i}_{j}"
                )
                x = layer(x, train, mask)
            x = nn.relu(norm(name=f"bn{i}")(x, mask=mask))
            if i < 3:
                x = conv(x.shape[-1] // 2, 1, name=f"trans{i}")(x)
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
                x = nn.avg_pool(x, (2, 2), (2, 2))
            sow_map(self, i, x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return TorchDense(self.num_classes, name="fc")(features), features
