"""Cross-entropy alone: a plain classifier, and the training of a teacher."""

from typing import Any

import jax.numpy as jnp

from oal_jax.methods.base import Method, split_variables
from oal_jax.methods.student import Transform, forward, id_loss


def cross_entropy(
    model: Any, image_shape: tuple[int, int, int], *, ce_transform: Transform | None = None
) -> Method:
    """The mean cross-entropy on ID images; group "student".

    `ce_transform` maps that mean, for example `unleashing_mask.transform`.
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
