"""Projectors into the student's feature space, from the teacher's features and from latents.

They are always float32: they cost next to nothing beside the student.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.models.conv import Conv
from oal_jax.models.mutual_information import TorchDense


class FeatureProjector(nn.Module):
    """DT of OAL: BatchNorm, Linear, ReLU, BatchNorm, from teacher to student features.

    Source: arXiv 2406.16525 and its code; the ReLU stands before the last BatchNorm.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t"], train: bool) -> Float[Array, "b d"]:
        """`train`: normalise by the batch and update the running statistics."""
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="bn1")(x)
        x = nn.relu(TorchDense(self.width, name="linear")(x))
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="bn2")(
            x
        )


class LatentProjector(nn.Module):
    """A of OAL: convolutions and an MLP, from latents to student features.

    It has no batch statistics, so the output for a latent depends on that latent alone.
    """

    width: int
    hidden: int = 64

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """A student feature for each latent."""
        x = nn.gelu(Conv(self.hidden // 2, 3, 1, name="conv1")(latents))
        x = nn.gelu(Conv(self.hidden, 3, 2, name="conv2")(x))
        while x.shape[1] > 4:  # also the 64 x 64 latents of Stable Diffusion end at 4 x 4
            x = nn.gelu(Conv(self.hidden, 3, 2, name=f"down_{x.shape[1]}")(x))
        x = jnp.reshape(x, (x.shape[0], -1))
        x = nn.gelu(nn.Dense(2 * self.width, name="fc1")(x))
        return nn.Dense(self.width, name="fc2")(x)
