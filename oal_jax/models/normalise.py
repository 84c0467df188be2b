"""Input normalisation, part of the model so that no caller can forget it."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Moments = tuple[tuple[float, ...], tuple[float, ...]]

# Mean and standard deviation of the pixels in [0, 1] per channel, by the start of the image set's
# name. CIFAR: those of Unleashing Mask (arXiv 2306.03715), for both sets.
_MOMENTS: dict[str, Moments] = {
    "fashion": ((0.33,), (0.35,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar": (
        (125.3 / 255, 123.0 / 255, 113.9 / 255),
        (63.0 / 255, 62.1 / 255, 66.7 / 255),
    ),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def moments(id_set: str) -> Moments:
    """(mean, std) of an image set per channel; one pair for all channels of an unknown set."""
    for start, known in _MOMENTS.items():
        if id_set.startswith(start):
            return known
    return (0.5,), (0.25,)


def normalise(
    images: Float[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """(images - mean) / std, with one value per channel or one for all."""
    shape = (1, 1, 1, len(mean))
    return (images - jnp.reshape(jnp.array(mean, images.dtype), shape)) / jnp.reshape(
        jnp.array(std, images.dtype), shape
    )
