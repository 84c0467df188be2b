"""Cross-entropy and distillation from the teacher's logits and features.

Source: the systematic part of OAL's loss (arXiv 2406.16525): CE + 4 KL(teacher || student) +
8 KL(softmax DT(teacher features) || softmax student features). DT is the feature projector. Its
only gradient comes from the target of the second KL, so it and the student adapt to each other.
"""

from typing import Any

import jax
import jax.numpy as jnp

from oal_jax.methods import losses
from oal_jax.methods.base import (
    Batch,
    Groups,
    Method,
    Metrics,
    apply_group,
    split_variables,
)
from oal_jax.methods.student import Outputs, Transform, forward, id_loss
from oal_jax.models.projector import FeatureProjector
from oal_jax.runtime.keys import named
from oal_jax.runtime.ops import unit


def distillation(
    model: Any,
    image_shape: tuple[int, int, int],
    teacher_width: int,
    *,
    logit_weight: float,
    feature_weight: float,
    ce_transform: Transform | None = None,
) -> Method:
    """The cross-entropy and both KL terms; groups "student" and "projector" (DT).

    The batch needs `teacher_logits` (B, K) and `teacher_features` (B, T).
    """

    def loss(params, model_state, batch, step, key):
        del step
        value, aux, _ = student_terms(
            params,
            model_state,
            batch,
            model,
            key=key,
            logit_weight=logit_weight,
            feature_weight=feature_weight,
            ce_transform=ce_transform,
        )
        return value, aux

    return Method(lambda key: init_groups(key, model, image_shape, teacher_width), loss)


def init_groups(
    key: jax.Array, model: Any, image_shape: tuple[int, int, int], teacher_width: int
) -> tuple[Groups, Groups]:
    """Fresh parameters and batch statistics of the groups "student" and "projector"."""
    student, student_state = split_variables(
        model.init(named(key, "student"), jnp.zeros((1, *image_shape)))
    )
    dt, dt_state = split_variables(
        FeatureProjector(model.feature_width).init(
            named(key, "projector"), jnp.zeros((1, teacher_width)), train=False
        )
    )
    return {"student": student, "projector": dt}, {"student": student_state, "projector": dt_state}


def student_terms(
    params: Groups,
    model_state: Groups,
    batch: Batch,
    model: Any,
    *,
    key: jax.Array,
    **options: Any,
) -> tuple[jax.Array, tuple[Groups, Metrics], Outputs]:
    """`(value, (model_state, metrics))` of CE and KD, and the student's (logits, features).

    `key` is the step's; `options` are those of `terms`.
    """
    outputs, _, student = forward(model, params, model_state, key, batch["image"])
    value, aux = terms(params, {**model_state, "student": student}, batch, outputs, **options)
    return value, aux, outputs


def terms(
    params: Groups,
    model_state: Groups,
    batch: Batch,
    outputs: Outputs,
    *,
    logit_weight: float,
    feature_weight: float,
    ce_transform: Transform | None = None,
    unit_features: bool = True,
) -> tuple[jax.Array, tuple[Groups, Metrics]]:
    """`(value, (model_state, metrics))` of CE and KD for the student's outputs of the ID images.

    Args:
      params: groups "student" and "projector".
      model_state: their batch statistics.
      batch: `label`, `teacher_logits`, `teacher_features`.
      outputs: the student's (logits, features).
      logit_weight: weight of the KL divergence of the logits.
      feature_weight: weight of the KL divergence of the features.
      ce_transform: maps the mean cross-entropy.
      unit_features: scale the teacher's features to unit norm before DT. The official code does
        not. Outliers are directions, so DT needs it where it maps outliers too.
    """
    logits, features = outputs
    teacher_features = batch["teacher_features"].astype(jnp.float32)
    target, dt_state = apply_group(
        FeatureProjector(features.shape[-1]),
        params,
        model_state,
        "projector",
        unit(teacher_features) if unit_features else teacher_features,
        train=True,
    )
    ce, metrics = id_loss(logits, batch["label"], ce_transform)
    teacher_logits = batch["teacher_logits"].astype(jnp.float32)
    kd_logits = jnp.mean(losses.kl_divergence(teacher_logits, logits))
    kd_features = jnp.mean(losses.kl_divergence(target, features))
    metrics |= {"kd_logits": kd_logits, "kd_features": kd_features}
    value = ce + logit_weight * kd_logits + feature_weight * kd_features
    return value, ({**model_state, "projector": dt_state}, metrics)
