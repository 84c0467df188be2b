"""What the classifiers share: convolution, batch normalisation with PyTorch's constants, maps.

A classifier's `dtype`, float32 or bfloat16, is that of its convolutions and matrix products, and
of the activations between them. Everything else is float32 whatever it is: parameters and so
gradients, the moments of batch and layer normalisation and what is done with them, the softmax of
attention, and, from the pooled features on, the head: whoever applies it to features by hand, as
some scores do, gets the logits that the classifier gives. float16 is not offered: its gradients
underflow without a scale on the loss.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# XLA's CPU convolution to a 2 x 2 map takes 20 times as long as the same product of patches
# (measured, batch 128, 128 channels); to 4 x 4 and more it is the faster of the two.
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
    """`nn.BatchNorm` with PyTorch's constants, to be named; `affine`: with scale and offset.

    `dtype` is that of its output; it computes in float32.
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

    "SAME" would pad strided convolutions on the other side. Parameters are those of `nn.Conv`.
    Where XLA's own convolution is slow it is computed as a matrix product.
    It starts as N(0, 2 / fan); `fan` is "fan_out" (torchvision's ResNet) or "fan_in".
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
    """A block of a student, called with (x, train, mask), that keeps nothing but its input."""
    return nn.remat(block, static_argnums=(2,))  # `train`; the module itself counts as the first


def with_maps(net: nn.Module, variables: Any, images: Float[Array, "n h w c"]) -> tuple:
    """(logits, features, feature maps from the input's side to the last) in evaluation mode."""
    (logits, features), sown = net.apply(variables, images, train=False, mutable=["maps"])
    maps = sown.get("maps", {})
    # stage2 before stage10.
    ordered = [maps[name][0] for name in sorted(maps, key=lambda name: (len(name), name))]
    return logits, features, ordered


def sow_map(module: nn.Module, stage: int, x: Float[Array, "b h w c"]) -> None:
    """Sow a feature map into the collection `maps`: free unless the caller makes it mutable."""
    if not module.is_initializing():  # else it would become one of the module's variables
        module.sow("maps", f"stage{stage}", x)
