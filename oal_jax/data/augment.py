"""Augmentation inside jit. A view of an image is the same in every batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from oal_jax.runtime.ops import to_unit


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    indices: Int[Array, " b"],
    views: Int[Array, " b"],
    *,
    shift: int,
    flip: bool,
) -> Float[Array, "b h w c"]:
    """Random shift (zeros enter) and horizontal flip; float32 in [0, 1].

    The draw of an image depends only on the key, its index in the data set and the number of the
    view, so cached teacher outputs of a view belong to exactly what the student sees.
    """
    _, h, w, c = images.shape

    def one(image, index, view):
        k = jax.random.fold_in(jax.random.fold_in(key, view), index)
        k_shift, k_flip = jax.random.split(k)
        dy, dx = jax.random.randint(k_shift, (2,), 0, 2 * shift + 1)
        padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)))
        image = jax.lax.dynamic_slice(padded, (dy, dx, 0), (h, w, c))
        if flip:
            image = jnp.where(jax.random.bernoulli(k_flip), image[:, ::-1], image)
        return image

    return to_unit(jax.vmap(one)(images, indices, views))
