"""LogitNorm: cross-entropy on logits of unit norm (Wei et al., arXiv 2205.09310).

In ordinary training the norm of the logits keeps growing, which makes the classifier overconfident
on any input. Dividing by the norm trains the direction alone. Scores read the logits themselves,
not the normalised ones, as in the official code.
"""

from typing import Any

import jax.numpy as jnp

from oal_jax.methods import losses
from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform, forward, id_loss, init_student


def normalised_cross_entropy(
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    temperature: float = 0.04,
    ce_transform: Transform | None = None,
) -> Method:
    """Cross-entropy of softmax(z / (temperature * |z|)).

    `temperature` (tau) is 0.04 as published for CIFAR-10. With K classes the loss of an image is at
    least log(1 + (K - 1) exp(-sqrt(K / (K - 1)) / tau)), so a large tau leaves a gradient on
    images that are already classified correctly. The metric `logit_norm` is the mean |z|.
    """

    def loss(params, model_state, batch, step, key):
        del step
        (logits, _), _, student = forward(model, params, model_state, key, batch["image"])
        directions = losses.unit_rows(logits) / temperature
        value, metrics = id_loss(directions, batch["label"], ce_transform)
        metrics["logit_norm"] = jnp.mean(jnp.linalg.norm(logits, axis=-1))
        return value, ({**model_state, "student": student}, metrics)

    return Method(lambda key: init_student(key, model, image_shape), loss)
