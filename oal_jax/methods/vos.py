"""VOS: virtual outliers from class Gaussians in feature space (Du et al., arXiv 2202.01197).

A Gaussian per class, with one covariance for all, models the latest features of each class. The
samples of lowest likelihood among many are the virtual outliers of a class (section 3.1). They pass
through the classifier's last layer, and a logistic loss separates them from ID by -E, the logsumexp
with a learned weight per class (section 3.2).

It differs from the official code:
- The means of the loss over ID images and over outliers are summed, as in the paper. The code takes
  one mean over both, in which 10 outliers beside 128 images have little weight.
- The logistic slope is positive, so that -E of ID is the larger one from the start. A class weight
  stays above 1e-6, so that the logarithm is finite.
- The outliers are sampled without sampling all candidates (see `least_likely`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from oal_jax.methods import class_queue, losses
from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform, forward, id_loss, init_student, output_sizes
from oal_jax.runtime.keys import named


def virtual_outliers(
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    start_step: float,
    weight: float = 0.1,
    queue_size: int = 1000,
    samples: int = 10_000,
    per_class: int = 1,
    ridge: float = 1e-4,
    refresh: int = 1,
    ce_transform: Transform | None = None,
) -> Method:
    """CE + `weight` * logistic loss of the energies, from `start_step` on and with full queues.

    Groups: "student"; "energy" (`class_weight` (K,), `scale`, `offset`). State "vos": the queues,
    and the means and the Cholesky factor of the Gaussians. The defaults are those published for
    CIFAR, where the loss starts after 40 of 100 epochs.

    Args:
      model: the student.
      image_shape: of an image.
      start_step: first step with the logistic loss.
      weight: weight of the logistic loss.
      queue_size: features per class. The Gaussians wait until every queue is full.
      samples: samples per class and step.
      per_class: the least likely samples of a class, which are its outliers.
      ridge: added to the diagonal of the covariance.
      refresh: steps between two estimates of the Gaussians; 1 is as published. One estimate costs
        K * queue_size * d^2 multiplications.
      ce_transform: maps the mean ID cross-entropy.
    """
    classes, width = output_sizes(model, image_shape)

    def init(key):
        params, model_state = init_student(key, model, image_shape)
        params["energy"] = {
            "class_weight": jax.random.uniform(named(key, "class_weight"), (classes,)),
            "scale": jnp.zeros(()),
            "offset": jnp.zeros(()),
        }
        model_state["vos"] = {
            "queue": class_queue.empty(classes, queue_size, width),
            "means": jnp.zeros((classes, width)),
            "factor": jnp.eye(width),
            "ready": jnp.zeros((), bool),  # whether the Gaussians have been estimated
        }
        return params, model_state

    def loss(params, model_state, batch, step, key):
        (logits, features), _, student = forward(model, params, model_state, key, batch["image"])
        value, metrics = id_loss(logits, batch["label"], ce_transform)
        old = model_state["vos"]
        queue = class_queue.push(old["queue"], features, batch["label"])
        active = (step >= start_step) & class_queue.is_full(queue)
        due = active & (~old["ready"] | (step % refresh == 0))
        means, factor = jax.lax.cond(
            due,
            lambda: gaussians(queue["rows"], ridge),
            lambda: (old["means"], old["factor"]),
        )
        outliers = jax.lax.cond(
            active,
            lambda: least_likely(named(key, "vos"), means, factor, samples, per_class),
            lambda: jnp.zeros((classes * per_class, width)),
        )
        head, energy = params["student"]["fc"], params["energy"]
        outlier_logits = outliers @ head["kernel"] + head["bias"][None]
        class_weight = jnp.maximum(energy["class_weight"], 1e-6)
        id_neg_energy, outlier_neg_energy = (
            jax.nn.logsumexp(z, axis=-1, b=jnp.broadcast_to(class_weight[None], z.shape))
            for z in (logits, outlier_logits)
        )
        terms = losses.energy_logistic(
            id_neg_energy, outlier_neg_energy, energy["scale"], energy["offset"]
        )
        separation = jnp.where(active, sum(jnp.mean(t) for t in terms), 0.0)
        metrics |= {
            "energy_virtual": separation,
            "id_neg_energy": jnp.mean(id_neg_energy),
            "outlier_neg_energy": jnp.where(active, jnp.mean(outlier_neg_energy), 0.0),
        }
        vos = {"queue": queue, "means": means, "factor": factor, "ready": old["ready"] | due}
        return value + weight * separation, (
            {**model_state, "student": student, "vos": vos},
            metrics,
        )

    return Method(init, loss)


def gaussians(
    rows: Float[Array, "k q d"], ridge: float
) -> tuple[Float[Array, "k d"], Float[Array, "d d"]]:
    """Class means, and the Cholesky factor of the tied covariance plus `ridge`."""
    means = jnp.mean(rows, axis=1)
    centred = (rows - means[:, None]).reshape(-1, rows.shape[-1])
    # Full float32: the factor must exist, and TF32 products may leave a negative eigenvalue.
    products = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
    covariance = products / centred.shape[0] + ridge * jnp.eye(rows.shape[-1])
    return means, jnp.linalg.cholesky(covariance)


def least_likely(
    key: Key[Array, ""],
    means: Float[Array, "k d"],
    factor: Float[Array, "d d"],
    samples: int,
    per_class: int,
) -> Float[Array, "m d"]:
    """The `per_class` draws of lowest density among `samples` from each N(mean, L L^T).

    A draw is mean + L e with e standard normal, and its density depends on |e| alone. Length and
    direction of e are independent. So the lengths of all draws are sampled (chi with d degrees of
    freedom), and directions only for the longest. The distribution is that of sampling and sorting
    all draws, without their (K, samples, d) numbers.
    """
    classes, width = means.shape
    key_length, key_direction = jax.random.split(key)
    squares = 2 * jax.random.gamma(key_length, width / 2, (classes, samples))
    lengths = jnp.sqrt(jax.lax.top_k(squares, per_class)[0])
    noise = jax.random.normal(key_direction, (classes, per_class, width))
    noise *= lengths[..., None] / jnp.linalg.norm(noise, axis=-1, keepdims=True)
    return (means[:, None] + noise @ factor.T).reshape(classes * per_class, width)
