"""Outlier exposure and energy fine-tuning: the two basic losses on outlier images.

`exposure`  trains a uniform prediction on outliers (Hendrycks et al., arXiv 1812.04606).
`energy`    separates the energies of ID and outliers by squared hinges (Liu et al., arXiv
            2010.03759, section 3.3).

Both are meant to fine-tune a trained classifier: arXiv 2306.03715 trains 10 epochs at a learning
rate of 0.01, with as many outliers as ID images in a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from oal_jax.methods import losses
from oal_jax.methods.base import Method, Metrics
from oal_jax.methods.student import Transform, forward, id_loss, init_student


def exposure(
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    weight: float = 0.5,
    shared_statistics: bool = False,
    ce_transform: Transform | None = None,
) -> Method:
    """CE + `weight` * mean[logsumexp(z) - mean z] over the logits z of `outlier_image`.

    Args:
      model: the student.
      image_shape: of an image.
      weight: weight of the uniform cross-entropy.
      shared_statistics: take batch statistics over ID and outlier images, as published;
        `student.forward` says why the default is ID alone.
      ce_transform: maps the mean ID cross-entropy.
    """

    def loss(params, model_state, batch, step, key):
        del step
        (logits, _), (outlier_logits, _), student = forward(
            model,
            params,
            model_state,
            key,
            batch["image"],
            batch["outlier_image"],
            shared_statistics=shared_statistics,
        )
        value, metrics = id_loss(logits, batch["label"], ce_transform)
        term = jnp.mean(losses.uniform_cross_entropy(outlier_logits))
        metrics["outlier_exposure"] = term
        return value + weight * term, ({**model_state, "student": student}, metrics)

    return Method(lambda key: init_student(key, model, image_shape), loss)


def energy(
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    weight: float = 0.1,
    margin_in: float = -25.0,
    margin_out: float = -7.0,
    shared_statistics: bool = False,
    ce_transform: Transform | None = None,
) -> Method:
    """CE + `weight` * (mean relu(E_in - margin_in)^2 + mean relu(margin_out - E_out)^2).

    E = -logsumexp(z) is low for ID. The margins are in units of the logits; the defaults are those
    published for CIFAR. For another network choose them by the metrics `id_energy` and
    `outlier_energy`, the means of E.
    """

    def loss(params, model_state, batch, step, key):
        del step
        (logits, _), (outlier_logits, _), student = forward(
            model,
            params,
            model_state,
            key,
            batch["image"],
            batch["outlier_image"],
            shared_statistics=shared_statistics,
        )
        value, metrics = id_loss(logits, batch["label"], ce_transform)
        term, more = hinge_terms(logits, outlier_logits, margin_in, margin_out)
        return value + weight * term, ({**model_state, "student": student}, metrics | more)

    return Method(lambda key: init_student(key, model, image_shape), loss)


def hinge_terms(
    logits: jax.Array, outlier_logits: jax.Array, margin_in: float, margin_out: float
) -> tuple[jax.Array, Metrics]:
    """The sum of both mean squared hinges, and the metrics of energy fine-tuning."""
    id_energy, outlier_energy = (-jax.nn.logsumexp(z, axis=-1) for z in (logits, outlier_logits))
    id_hinge, outlier_hinge = (
        jnp.mean(h) for h in losses.energy_hinges(id_energy, outlier_energy, margin_in, margin_out)
    )
    metrics = {
        "id_hinge": id_hinge,
        "outlier_hinge": outlier_hinge,
        "id_energy": jnp.mean(id_energy),
        "outlier_energy": jnp.mean(outlier_energy),
    }
    return id_hinge + outlier_hinge, metrics
