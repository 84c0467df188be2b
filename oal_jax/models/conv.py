"""Parts of all classifiers: convolution, batch normalisation with PyTorch's constants, maps.

A classifier's `dtype`, float32 or bfloat16, is the type of its convolutions, matrix products and
activations. Always float32 are parameters and gradients, the arithmetic of batch and layer
normalisation, the softmax of attention, the pooled features and the head. So scores that apply the
head to features get the classifier's own logits. float16 is not offered: its gradients underflow
without a scale on the loss.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# XLA's CPU convolution to a 2 x 2 map takes 20 times as long as the product of patches (measured,
# batch 128, 128 channels). To a 4 x 4 map and larger ones it is faster.
_TINY_MAP = 9  # pixels of the output


def patches_product(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c d"], stride: int, pad: int
) -> Float[Array, "b h2 w2 d"]:
    """The convolution as one product of gathered patches and the flattened kernel."""
    kh, kw, c, d = kernel.shape
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    h = (x.shape[1] - kh) // stride + 1
    w = (x.shape[2] - kw) // stride + 1
    columns = [
        x[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(columns, axis=-1) @ kernel.reshape(kh * kw * c, d)


def batch_norm(train: bool, affine: bool, dtype: Any = jnp.float32) -> partial[nn.BatchNorm]:
    """`nn.BatchNorm` with PyTorch's constants; its caller gives the name.

    Args:
      train: normalise by the batch, and update the running statistics.
      affine: with scale and offset.
      dtype: of the output. It computes in float32.
    """
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        use_scale=affine,
        use_bias=affine,
        dtype=dtype,
    )


class Conv(nn.Module):
    """Convolution without bias; odd square kernel, padding (kernel - 1) / 2 as in PyTorch.

    "SAME" would pad strided convolutions on the other side. The parameters are those of `nn.Conv`,
    drawn from N(0, 2 / fan) with `fan` "fan_out" (torchvision's ResNet) or "fan_in". Where XLA's
    own convolution is slow, a matrix product takes its place.
    """

    channels: int
    kernel: int
    stride: int = 1
    fan: str = "fan_out"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Height and width shrink by `stride`, rounded up."""
        pad = (self.kernel - 1) // 2
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        init = nn.initializers.variance_scaling(2.0, self.fan, "normal")
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.kernel == 1:
            return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        if -(-x.shape[1] // self.stride) * -(-x.shape[2] // self.stride) <= _TINY_MAP:
            return patches_product(x, kernel, self.stride, pad)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def rematerialised(block: type[nn.Module]) -> type[nn.Module]:
    """A block, called with (x, train, mask), whose backward pass recomputes its activations."""
    return nn.remat(block, static_argnums=(2,))  # `train`; the module itself counts as the first


def with_maps(net: nn.Module, variables: Any, images: Float[Array, "n h w c"]) -> tuple:
    """(logits, features, feature maps from first to last) in evaluation mode."""
    (logits, features), sown = net.apply(variables, images, train=False, mutable=["maps"])
    maps = sown.get("maps", {})
    # stage2 before stage10.
    ordered = [maps[name][0] for name in sorted(maps, key=lambda name: (len(name), name))]
    return logits, features, ordered


def sow_map(module: nn.Module, stage: int, x: Float[Array, "b h w c"]) -> None:
    """Sow a feature map into the collection `maps`. Free unless the caller makes it mutable."""
    if not module.is_initializing():  # there it would become one of the module's variables
        module.sow("maps", f"stage{stage}", x)
