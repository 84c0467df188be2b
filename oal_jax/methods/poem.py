"""POEM: energy fine-tuning on the outliers nearest to a sampled boundary (arXiv 2206.13687).

A Bayesian linear regression on the features has the target -3.9 for ID and +3.9 for outliers.
Thompson sampling: beta is drawn from its posterior, and of a pool of outliers those with the
smallest |beta . f| are trained on. Posterior, for features Z and targets y:

    precision A = Z'Z / noise_variance + I / prior_variance,   mean = A^-1 Z'y / noise_variance.

The batch-wise form. The official code embeds a pool of 400 000 images and all images of its
replay buffer before every epoch. Here a batch brings `candidate_ratio` times as many outliers as
are trained on; they pass in evaluation mode, beta is drawn anew, and the best are kept: a step
costs about the forward passes of the candidates more, nothing is embedded apart, and selections
follow the net as it changes. The buffer holds features instead of images, at most
`buffer_size / batch` steps old. Other differences from the code:
- The buffer's position advances; the code's stays at the same 256 rows once it is full.
- The covariance is A^-1, the posterior's; the code scales it by prior_variance
  (`covariance_scale`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Key

from oal_jax.methods import class_queue
from oal_jax.methods.base import Method
from oal_jax.methods.outlier_exposure import hinge_terms
from oal_jax.methods.student import (
    Transform,
    forward,
    id_loss,
    init_student,
    join,
    output_sizes,
    separate,
)
from oal_jax.runtime.keys import named


def posterior_sampling(
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    weight: float = 0.1,
    margin_in: float = -25.0,
    margin_out: float = -7.0,
    candidate_ratio: int = 4,
    target: float = 3.9,
    noise_variance: float = 0.5,
    prior_variance: float = 20.0,
    covariance_scale: float = 1.0,
    buffer_size: int = 4096,
    refresh_steps: int = 20,
    shared_statistics: bool = False,
    ce_transform: Transform | None = None,
) -> Method:
    """The loss of `outlier_exposure.energy` on a chosen part of `outlier_image`.

    Group "student". State "poem": features of ID and of chosen outliers, the posterior, and the
    one draw of N(0, noise_variance) that is added to all targets (as in the code).

    Args:
      candidate_ratio: one in so many of a batch's outliers is trained on.
      covariance_scale: 1 for the posterior, `prior_variance` for the code's wider one.
      buffer_size: features kept, of ID and of outliers each.
      refresh_steps: steps between two estimates of the posterior.
    """
    _, width = output_sizes(model, image_shape)

    def init(key):
        params, model_state = init_student(key, model, image_shape)
        model_state["poem"] = {
            "buffer": class_queue.empty(2, buffer_size, width),  # 0: ID, 1: outliers
            "target_noise": jnp.sqrt(noise_variance) * jax.random.normal(named(key, "target")),
            "mean": jnp.zeros((width,)),
            "factor": jnp.eye(width) / jnp.sqrt(prior_variance),
        }
        return params, model_state

    def loss(params, model_state, batch, step, key):
        images, candidates = batch["image"], batch["outlier_image"]
        old = model_state["poem"]
        _, seen = jax.lax.stop_gradient(
            model.apply(
                {"params": params["student"], **model_state["student"]},
                join(images, candidates),
                train=False,
            )
        )
        id_features, features = separate(seen, images.shape[0])
        beta = sample_beta(named(key, "beta"), old["mean"], old["factor"], covariance_scale)
        distance = jnp.abs(features @ beta)
        count = candidates.shape[0] // candidate_ratio
        chosen = jax.lax.top_k(-distance, count)[1]
        (logits, _), (outlier_logits, _), student = forward(
            model,
            params,
            model_state,
            key,
            images,
            candidates[chosen],
            shared_statistics=shared_statistics,
        )
        part = batch.get("part")
        value, metrics = id_loss(logits, batch["label"], ce_transform, part)
        term, more = hinge_terms(logits, outlier_logits, margin_in, margin_out)
        metrics |= more | {
            "boundary_distance": jnp.mean(distance[chosen]),
            "candidate_distance": jnp.mean(distance),
        }
        sides = (jnp.full(len(rows), i, jnp.int32) for i, rows in enumerate((images, chosen)))
        buffer = class_queue.push(old["buffer"], join(id_features, features[chosen]), join(*sides))
        targets = old["target_noise"] + jnp.array([-target, target])
        due = step % refresh_steps == 0
        mean, factor = jax.lax.cond(
            due if part is None else due & part.last,
            lambda: posterior(buffer["rows"], targets, noise_variance, prior_variance),
            lambda: (old["mean"], old["factor"]),
        )
        poem = {**old, "buffer": buffer, "mean": mean, "factor": factor}
        return value + weight * term, (
            {**model_state, "student": student, "poem": poem},
            metrics,
        )

    return Method(init, loss)


def posterior(
    rows: Float[Array, "c q d"],
    targets: Float[Array, " c"],
    noise_variance: float,
    prior_variance: float,
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """The mean, and an upper triangular R with R'R = A; rows of zeros count for nothing.

    R is that of the QR decomposition of [Z / sqrt(noise); I / sqrt(prior)], with y as one more
    column: A itself, with eigenvalues from 1 / prior_variance to millions, has no Cholesky factor
    in float32, but its root has half the digits between its ends.
    """
    width = rows.shape[-1]
    features = rows.reshape(-1, width) / jnp.sqrt(noise_variance)
    y = jnp.broadcast_to(targets[:, None], rows.shape[:2]).reshape(-1, 1)
    data = jnp.concatenate([features, y / jnp.sqrt(noise_variance)], axis=1)
    prior = jnp.eye(width, width + 1) / jnp.sqrt(prior_variance)
    triangle = jnp.linalg.qr(jnp.concatenate([data, prior]), mode="r")
    factor = triangle[:width, :width]
    return solve_triangular(factor, triangle[:width, width]), factor


def sample_beta(
    key: Key[Array, ""], mean: Float[Array, " d"], factor: Float[Array, "d d"], scale: float
) -> Float[Array, " d"]:
    """A draw of N(mean, scale * (R'R)^-1)."""
    noise = jax.random.normal(key, mean.shape)
    return mean + jnp.sqrt(scale) * solve_triangular(factor, noise)
