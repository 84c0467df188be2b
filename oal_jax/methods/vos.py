"""VOS: virtual outliers from class Gaussians in feature space (Du et al., arXiv 2202.01197).

The latest features of every class are modelled by a Gaussian with a mean a class and one tied
covariance. Of many samples of a class those of the lowest likelihood are its virtual
outliers (section 3.1); they pass through the classifier's last layer, and a logistic loss on the
energy, logsumexp with a learned weight a class, tells them from ID (section 3.2).

Where this differs from the official code:
- The means of the loss over ID images and over outliers are summed, as in the paper; the code
  takes one mean over both, in which 10 outliers beside 128 images count for little.
- The logistic slope is positive, so that ID has the larger energy from the start, and a class
  weight stays above 1e-6, so that the logarithm is finite.
- The samples are drawn without drawing them all: see `least_likely`.
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
    """CE + `weight` * the energy's logistic loss, from `start_step` on and with full queues.

    Groups: "student"; "energy" (`class_weight` (K,), `scale`, `offset`). State "vos": the queues
    and the Gaussians' means and Cholesky factor. Defaults are the published ones for CIFAR;
    there the loss starts after 40 of 100 epochs.

    Args:
      queue_size: features kept a class. The Gaussians wait until every queue is full.
      samples: samples a class and step, of which the `per_class` least likely are the outliers.
      ridge: added to the covariance's diagonal.
      refresh: steps between two estimates of the Gaussians. One estimate costs
        K * queue_size * d^2 multiplications; 1 is as published.
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
            "ready": jnp.zeros((), bool),  # whether the Gaussians have ever been estimated
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

    A draw is mean + L e with e standard normal, and its density falls with |e| alone. The length
    and the direction of e are independent: so the lengths of all draws (chi with d degrees of
    freedom) are drawn, and directions only for those that are kept. The same distribution as
    drawing, weighing and sorting all samples, without their (K, samples, d) numbers.
    """
    classes, width = means.shape
    key_length, key_direction = jax.random.split(key)
    squares = 2 * jax.random.gamma(key_length, width / 2, (classes, samples))
    lengths = jnp.sqrt(jax.lax.top_k(squares, per_class)[0])
    noise = jax.random.normal(key_direction, (classes, per_class, width))
    noise *= lengths[..., None] / jnp.linalg.norm(noise, axis=-1, keepdims=True)
    return (means[:, None] + noise @ factor.T).reshape(classes * per_class, width)
