"""What each latent of stage `latents` is made of: an outlier, an ID latent, both or neither."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, UInt32

from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.generator import samplers
from oal_jax.runtime.keys import named
from oal_jax.stages import generator, outliers
from oal_jax.stages.context import Context

STARTED = ("partial", "mixture")  # kinds that begin at noised ID latents
_CONDITIONED = ("outliers", *STARTED)  # kinds with an outlier in place of the class word
_FROM_ID = ("noised", *STARTED)  # kinds that read ID latents
_STREAMED = 256  # images of a stream that are read at once


class Inputs(NamedTuple):
    """One row a latent that is to be sampled: evenly of all classes, classes in turn.

    Attributes:
        labels: the class of each.
        outlier_rows: which outlier of its class conditions it.
        indices: folded into the key for its noise.
        outliers: these outliers; None where none is injected.
        clean: latents of ID images to begin at, (n, C, h, w); None where all begins at noise.
    """

    labels: Int32[np.ndarray, " n"]
    outlier_rows: Int32[np.ndarray, " n"]
    indices: UInt32[np.ndarray, " n"]
    outliers: Float[np.ndarray, "n d"] | None
    clean: Float[np.ndarray, "n c h w"] | None

    def at(self, rows) -> "Inputs":
        """These rows of all columns."""
        return Inputs(*(column if column is None else column[rows] for column in self))


def draw(context: Context, sd, params, classes: int, per_class: int) -> Inputs:
    """The inputs of `per_class` latents of each class, as `latents.kind` wants them."""
    config, key = context.config, named(context.key, "latents")
    labels = np.tile(np.arange(classes, dtype=np.int32), per_class)
    pool = outliers.per_class(config)
    rows = np.asarray(jax.random.randint(named(key, "rows"), labels.shape, 0, pool), np.int32)
    indices = np.arange(len(labels), dtype=np.uint32)
    vectors = clean = None
    if config.latents.kind in _CONDITIONED:
        vectors = outliers.of_classes(context, labels, rows)
    if config.latents.kind in _FROM_ID:
        clean = _id_latents_of(context, sd, params, labels, named(key, "id rows"))
    if config.latents.kind == "mixture":
        others = _other_classes(labels, classes, named(key, "other classes"))
        more = _id_latents_of(context, sd, params, others, named(key, "other id rows"))
        clean = interpolate(clean, more, config.latents.interpolation)
    return Inputs(labels, rows, indices, vectors, clean)


def noised(context: Context, inputs: Inputs) -> Float[np.ndarray, "n c h w"]:
    """ID latents plus noise, without any generator: the control `latents.kind=noised`."""
    key = named(context.key, "noise")
    shape = inputs.clean.shape[1:]
    noise = np.asarray(samplers.initial_noise(key, inputs.indices, shape))
    return inputs.clean + np.float32(context.config.latents.noise) * noise


def encode_rows(
    context: Context, sd, params: Any, data: ImageSet | Streamed, rows, dtype=jnp.float32
) -> Float[np.ndarray, "n c h w"]:
    """Scaled VAE latents of some images of a set."""
    if isinstance(data, ImageSet):
        images = data.images[rows]
    else:
        images = (chunk.images for chunk in data.chunks(_STREAMED, rows))
    return generator.encode(context, sd, params, images, dtype)


def interpolate(
    a: Float[np.ndarray, "n c h w"], b: Float[np.ndarray, "n c h w"], how: str
) -> Float[np.ndarray, "n c h w"]:
    """The middle between latents: "linear", or "spherical" along the arc between them.

    Spherical: sin(angle / 2) / sin(angle) = 1 / (2 cos(angle / 2)) of either (Shoemake 1985), which
    keeps the norm of latents of one norm; the mean of independent ones loses about 30 % of it.
    """
    middle = (a + b) / 2
    if how == "linear":
        return middle
    axes = tuple(range(1, a.ndim))
    norms = [np.sqrt(np.sum(x**2, axis=axes, keepdims=True)) for x in (a, b)]
    cosine = np.sum(a * b, axis=axes, keepdims=True) / np.maximum(norms[0] * norms[1], 1e-12)
    half = np.sqrt(np.maximum((1 + cosine) / 2, 1e-6))  # cos(angle / 2)
    return middle / half


def _id_latents_of(context: Context, sd, params, labels, key) -> Float[np.ndarray, "n c h w"]:
    """The latent of a random ID training image of each label."""
    data = context.train_images()
    draws = np.asarray(jax.random.uniform(key, labels.shape))
    rows = np.empty(labels.shape, np.int64)
    for c in np.unique(labels):
        of_class, wanted = np.flatnonzero(data.labels == c), labels == c
        # A float32 below 1 times a count of 2^24 or more could round up to the count.
        drawn = np.minimum(draws[wanted] * len(of_class), len(of_class) - 1)
        rows[wanted] = of_class[drawn.astype(np.int64)]
    found, where = np.unique(rows, return_inverse=True)
    return encode_rows(context, sd, params, data, found)[where]


def _other_classes(labels, classes: int, key) -> Int32[np.ndarray, " n"]:
    """Of each label another one."""
    further = np.asarray(jax.random.randint(key, labels.shape, 1, classes))
    return ((labels + further) % classes).astype(np.int32)
