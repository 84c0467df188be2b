"""Steering a sampler away from ID, by the gradient of a loss of features at the clean prediction.

After GOOD (arXiv 2510.17131), which takes the gradients of the classifier's log-partition in pixels
and of k-NN distances in features. Here both pass through one small map A_t from latents to the
teacher's features, so that nothing is decoded. The gradient's length says nothing across steps and
samples; its direction alone is used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.generator.samplers import Guide
from oal_jax.generator.schedule import NoiseSchedule
from oal_jax.runtime.ops import kth_largest, unit

Features = Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b d"]]


class Steering(NamedTuple):
    """What a guide reads: arrays, so that one compiled program serves all values."""

    params: Any  # of A_t
    kernel: Float[Array, "d k"]  # of the teacher's head
    bias: Float[Array, " k"]
    bank: Float[Array, "n d"]  # unit features of ID images
    strength: Float[Array, ""]  # 0: samples are those without a guide


def log_partition(
    features: Float[Array, "b d"], steering: Steering, neighbour: int
) -> Float[Array, " b"]:
    """logsumexp of the teacher's logits: high for ID (the negative energy of arXiv 2010.03759)."""
    del neighbour
    return jax.nn.logsumexp(features @ steering.kernel + steering.bias[None], axis=-1)


def closeness(
    features: Float[Array, "b d"], steering: Steering, neighbour: int
) -> Float[Array, " b"]:
    """Mean cosine to the `neighbour` nearest of the bank: 1 less half the mean squared distance."""
    cosines = steering.bank @ unit(features).T
    count = min(neighbour, steering.bank.shape[0])
    nearest = cosines >= kth_largest(jax.lax.stop_gradient(cosines), count)[None]
    return jnp.sum(jnp.where(nearest, cosines, 0), axis=0) / jnp.sum(nearest, axis=0)


# What each kind of guidance lowers.
LOSSES = {"energy": (log_partition,), "knn": (closeness,), "both": (log_partition, closeness)}


def make_guide(
    features: Features,
    schedule: NoiseSchedule,
    by: str,
    start: float = 0.0,
    end: float = 1.0,
    neighbour: int = 50,
) -> Guide:
    """A guide for `samplers.make_sampler`, whose `aux` is a `Steering`.

    At a time with coefficients alpha and sigma the predicted noise gets alpha * strength * |noise|
    times the unit gradient, sample by sample. To the velocity alpha * noise - sigma * clean, at a
    fixed point, that adds strength * |noise| times the unit gradient, and the predicted clean
    latent moves by sigma * strength * |noise|: as much as its own size at most, however noisy the
    point is.

    Args:
        features: A_t, `(params, latents with channels last) -> features`.
        schedule: the noise process of the sampler.
        by: a key of `LOSSES`; of several losses the unit gradients are added.
        start: fraction of the way from noise to clean at which the guide begins.
        end: fraction at which it ends.
        neighbour: see `closeness`.
    """
    alphas = jnp.asarray(schedule.alphas_cumprod() ** 0.5, jnp.float32)

    def guide(clean, noise, time, steering):
        of_latents = lambda z: features(steering.params, jnp.moveaxis(z, 1, -1))
        found, pull = jax.vjp(of_latents, clean)
        direction = jnp.zeros_like(clean)
        for loss in LOSSES[by]:
            gradient = jax.grad(lambda f, loss=loss: jnp.sum(loss(f, steering, neighbour)))(found)
            direction += _unit(pull(gradient)[0])
        progress = 1 - time / schedule.train_steps
        acts = (start <= progress) & (progress < end)
        length = jnp.where(acts, alphas[time] * steering.strength, 0) * _norm(noise)
        return length * _unit(direction)

    return guide


def _norm(x: Float[Array, "b c h w"]) -> Float[Array, "b 1 1 1"]:
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3), keepdims=True))


def _unit(x: Float[Array, "b c h w"]) -> Float[Array, "b c h w"]:
    return x / jnp.maximum(_norm(x), 1e-12)
