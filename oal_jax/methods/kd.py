"""Cross-entropy and distillation from the teacher's logits and features.

Source: the systematic part of OAL's loss (arXiv 2406.16525): CE + 4 KL(teacher || student) +
8 KL(softmax DT(teacher features) || softmax student features). DT learns through the target of
the second KL alone, so that it and the student adapt to each other.
"""

from typing import Any

import jax
import jax.numpy as jnp

from oal_jax import losses
from oal_jax.keys import named
from oal_jax.methods.base import Method, accuracy, apply_group, split_variables
from oal_jax.models.projector import Projector


def normalise(features: jax.Array) -> jax.Array:
    """Unit L2 norm, so that DT sees ID features and outliers (directions) on one scale."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def distillation(
    model: Any,
    image_shape: tuple[int, int, int],
    teacher_width: int,
    *,
    logit_weight: float,
    feature_weight: float,
) -> Method:
    """Groups "student" and "projector" (DT). Metrics keep the student's outputs under no name.

    The batch needs `teacher_logits` (B, K) and `teacher_features` (B, T).
    """
    projector = Projector(model.feature_width)

    def init(key):
        student, student_state = split_variables(
            model.init(named(key, "student"), jnp.zeros((1, *image_shape)))
        )
        variables = projector.init(
            named(key, "projector"), jnp.zeros((1, teacher_width)), train=False
        )
        dt, dt_state = split_variables(variables)
        params = {"student": student, "projector": dt}
        return params, {"student": student_state, "projector": dt_state}

    def loss(params, model_state, batch, step, key):
        value, (model_state, metrics), _ = student_terms(
            params, model_state, batch, model, projector, logit_weight, feature_weight
        )
        del step, key
        return value, (model_state, metrics)

    return Method(init, loss)


def student_terms(
    params, model_state, batch, model, projector, logit_weight, feature_weight
) -> tuple[jax.Array, tuple[dict, dict], tuple[jax.Array, jax.Array]]:
    """The CE and KD terms; also the student's (logits, features) for further terms."""
    (logits, features), student_state = apply_group(
        model, params, model_state, "student", batch["image"], train=True
    )
    target, dt_state = apply_group(
        projector,
        params,
        model_state,
        "projector",
        normalise(batch["teacher_features"].astype(jnp.float32)),
        train=True,
    )
    ce = jnp.mean(losses.cross_entropy(logits, batch["label"]))
    teacher_logits = batch["teacher_logits"].astype(jnp.float32)
    kd_logits = jnp.mean(losses.kl_divergence(teacher_logits, logits))
    kd_features = jnp.mean(losses.kl_divergence(target, features))
    metrics = {
        "ce": ce,
        "kd_logits": kd_logits,
        "kd_features": kd_features,
        "accuracy": accuracy(logits, batch["label"]),
    }
    value = ce + logit_weight * kd_logits + feature_weight * kd_features
    state = {**model_state, "student": student_state, "projector": dt_state}
    return value, (state, metrics), (logits, features)
