"""Cross-entropy alone: the plain classifier, and the teacher's own training."""

from typing import Any

import jax.numpy as jnp

from oal_jax import losses
from oal_jax.methods.base import Method, accuracy, apply_group, split_variables


def cross_entropy(model: Any, image_shape: tuple[int, int, int]) -> Method:
    """Train `model` (group "student") by the mean cross-entropy on ID images."""

    def init(key):
        params, rest = split_variables(model.init(key, jnp.zeros((1, *image_shape))))
        return {"student": params}, {"student": rest}

    def loss(params, model_state, batch, step, key):
        del step, key
        (logits, _), rest = apply_group(
            model, params, model_state, "student", batch["image"], train=True
        )
        value = jnp.mean(losses.cross_entropy(logits, batch["label"]))
        metrics = {"ce": value, "accuracy": accuracy(logits, batch["label"])}
        return value, ({"student": rest}, metrics)

    return Method(init, loss)
