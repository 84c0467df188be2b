"""The Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) with timm's names and numerics."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.models.conv import sow_map
from oal_jax.models.normalise import normalise

# Input of the head: the class token after the last norm, the mean of the patches after it, the norm
# of their mean (timm's `fc_norm`), the class token and the first register (DeiT's distillation
# token), or the class token and the mean of the patches (DINOv2).
POOLS = ("token", "norm_mean", "mean_norm", "token_pair", "token_mean")


@jax.custom_vjp
def narrow_product(
    x: Float[Array, "*b n d"], y: Float[Array, "d e"] | Float[Array, "*b d e"]
) -> Float[Array, "*b n e"]:
    """`x @ y` and its gradients, each summed in float32 and rounded to the inputs' type once.

    Accelerators do so by default. A CPU with matrix instructions for bfloat16 uses them only for a
    float32 result: ViT-B/16 then takes 0.4 times the time of float32.
    """

    def on_cpu(x, y):
        return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=jnp.matmul)


def _product_forward(x, y):
    return narrow_product(x, y), (x, y)


def _product_backward(inputs, slope):
    x, y = inputs
    x_slope = narrow_product(slope, jnp.swapaxes(y, -1, -2))
    if y.ndim == 2:  # one matrix for all rows of all batches
        x, slope = (a.reshape(-1, a.shape[-1]) for a in (x, slope))
    return x_slope, narrow_product(jnp.swapaxes(x, -1, -2), slope)


narrow_product.defvjp(_product_forward, _product_backward)


def _dense(features: int, dtype: Any, name: str, use_bias: bool = True) -> nn.Dense:
    def product(x, kernel, dimensions, precision=None):
        del dimensions, precision  # those of `nn.Dense`: the last axis of x
        return narrow_product(x, kernel)

    narrow = None if dtype == jnp.float32 else product
    return nn.Dense(features, use_bias, dtype, dot_general=narrow, name=name)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    heads: int
    qkv_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Every token attends to all tokens of its image."""
        b, n, d = x.shape
        qkv = _dense(3 * d, self.dtype, "qkv", self.qkv_bias)(x)
        qkv = qkv.reshape(b, n, 3, self.heads, d // self.heads)
        # Heads next to the batch axis: a batched matrix product, several times faster on CPU than
        # the contraction with the heads in the middle.
        q, k, v = jnp.transpose(qkv, (2, 0, 3, 1, 4))
        scores = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * (d // self.heads) ** -0.5, axis=-1).astype(self.dtype)
        product = jnp.matmul if self.dtype == jnp.float32 else narrow_product
        mixed = jnp.swapaxes(product(weights, v), 1, 2).reshape(b, n, d)
        return _dense(d, self.dtype, "proj")(mixed)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU MLP, each with a residual.

    `layer_scale` multiplies both residuals channel by channel (arXiv 2103.17239).
    """

    heads: int
    mlp_ratio: float
    qkv_bias: bool = True
    layer_scale: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Tokens to tokens of the same shape."""
        d = x.shape[-1]
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x)
        h = Attention(self.heads, self.qkv_bias, self.dtype, name="attn")(h)
        x = x + self._scaled("ls1", h)
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        h = _dense(int(d * self.mlp_ratio), self.dtype, "mlp_fc1")(h)
        h = _dense(d, self.dtype, "mlp_fc2")(nn.gelu(h, approximate=False))
        return x + self._scaled("ls2", h)

    def _scaled(self, name: str, h: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        if not self.layer_scale:
            return h
        gamma = self.param(f"{name}_gamma", nn.initializers.constant(1e-5), h.shape[-1:])
        return h * gamma.astype(self.dtype)[None, None]


class VisionTransformer(nn.Module):
    """Images in [0, 1] to (logits, features); features are the CLS token after the last norm.

    `mean` and `std` (one value per channel) normalise the input. `pool`, one of `POOLS`, gives
    other features; "norm_mean" and "mean_norm" need no `class_token`. `registers` are tokens
    between it and the patches; with them, position embeddings are those of the patches alone. Maps
    are sown as `maps`: stage0 is the grid of embedded patches, then one per block, all without the
    other tokens. `dtype`: see `models.conv`; logits and features are float32. With `remat` the
    backward pass recomputes the activations of each block. `head` is the name of the last layer's
    parameters.
    """

    num_classes: int
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    qkv_bias: bool = True
    layer_scale: bool = False
    class_token: bool = True
    pool: str = "token"
    dtype: Any = jnp.float32
    remat: bool = False
    head: str = "head"
    registers: int = 0

    @property
    def feature_width(self) -> int:
        """Number of features per image."""
        return self.width * (2 if self.pool in ("token_pair", "token_mean") else 1)

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False, statistics: Any = None
    ) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
        """`train` and `statistics` have no effect: no dropout, no batch statistics."""
        del train, statistics
        b, h, w, c = images.shape
        p, first = self.patch, self.class_token + self.registers
        x = normalise(images, self.mean, self.std)
        # A convolution with stride = kernel is a matrix product of flattened patches. The product
        # is several times faster in XLA's CPU backend, its gradients above all.
        x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        x = _dense(self.width, self.dtype, "patch_embed")(x.reshape(b, -1, p * p * c))
        if self.class_token and not self.registers:
            x = self._with_tokens(x, cls_token=1)
        places = (1, x.shape[1], self.width)
        x = x + self.param("pos_embed", nn.initializers.normal(0.02), places).astype(x.dtype)
        if self.registers:
            x = self._with_tokens(x, cls_token=int(self.class_token), reg_token=self.registers)
        grid = (b, h // p, w // p, self.width)
        sow_map(self, 0, x[:, first:].reshape(grid))
        block = nn.remat(Block) if self.remat else Block
        sizes = (self.heads, self.mlp_ratio, self.qkv_bias, self.layer_scale)
        for i in range(self.depth):
            x = block(*sizes, self.dtype, name=f"blocks_{i}")(x)
            sow_map(self, i + 1, x[:, first:].reshape(grid))
        norm = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")
        if self.pool == "token":
            features = norm(x[:, 0])  # the other tokens are not read
        elif self.pool == "token_pair":
            features = norm(x[:, :2]).reshape(b, -1)
        elif self.pool == "mean_norm":
            features = norm(jnp.mean(x[:, first:].astype(jnp.float32), axis=1))
        else:
            x = norm(x)
            features = jnp.mean(x[:, first:], axis=1)
            if self.pool == "token_mean":
                features = jnp.concatenate([x[:, 0], features], axis=1)
        return nn.Dense(self.num_classes, name=self.head)(features), features

    def _with_tokens(self, x: Float[Array, "b n d"], **counts: int) -> Float[Array, "b m d"]:
        """`x` after learned tokens, by name and number."""
        tokens = [
            self.param(name, nn.initializers.normal(0.02), (1, count, self.width))
            for name, count in counts.items()
            if count
        ]
        shape = (x.shape[0], sum(counts.values()), self.width)
        tokens = jnp.concatenate(tokens, axis=1).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(tokens, shape), x], axis=1)
