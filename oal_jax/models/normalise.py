"""Input normalisation, inside the model so that no caller can forget it."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def normalise(
    images: Float[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """(images - mean) / std, a value a channel."""
    shape = (1, 1, 1, len(mean))
    return (images - jnp.reshape(jnp.array(mean, images.dtype), shape)) / jnp.reshape(
        jnp.array(std, images.dtype), shape
    )
