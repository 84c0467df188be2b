"""Cross-entropy alone: the plain classifier, and the teacher's own training."""

from typing import Any

import jax.numpy as jnp

from oal_jax.methods.base import Method, split_variables
from oal_jax.methods.student import Transform, forward, id_loss


def cross_entropy(
    model: Any, image_shape: tuple[int, int, int], *, ce_transform: Transform | None = None
) -> Method:
    """Train `model` (group "student") by the mean cross-entropy on ID images.

    `ce_transform` is of that mean, such as `unleashing_mask.transform`.
    """

    def init(key):
        params, rest = split_variables(model.init(key, jnp.zeros((1, *image_shape))))
        return {"student": params}, {"student": rest}

    def loss(params, model_state, batch, step, key):
        del step
        (logits, _), _, student = forward(model, params, model_state, key, batch["image"])
        value, metrics = id_loss(logits, batch["label"], ce_transform)
        return value, ({"student": student}, metrics)

    return Method(init, loss)
