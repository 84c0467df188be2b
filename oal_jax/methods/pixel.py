"""Pixel-space outlier exposure: DREAM-OOD's use (arXiv 2309.13415) of OAL's latents.

The latents are decoded to images, and the student is trained to predict the uniform distribution on
them (arXiv 1812.04606). It is added to distillation, so the method differs from `oal` in the use of
the outliers alone.
"""

from typing import Any

import jax.numpy as jnp

from oal_jax.methods import kd, losses
from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform, forward


def outlier_exposure(
    model: Any,
    image_shape: tuple[int, int, int],
    teacher_width: int,
    *,
    logit_weight: float,
    feature_weight: float,
    weight: float,
    ce_transform: Transform | None = None,
) -> Method:
    """Distillation plus `weight` times the uniform cross-entropy on `outlier_image`.

    ID images and outliers pass as one batch, normalised by the statistics of the ID images alone,
    which also move the running statistics. With outliers normalised by the running statistics the
    student separates them from ID by the kind of statistics. In evaluation ID images are normalised
    in that way too, and accuracy falls to that of guessing (measured).
    """

    def loss(params, model_state, batch, step, key):
        del step
        outputs, (outlier_logits, _), student = forward(
            model, params, model_state, key, batch["image"], batch["outlier_image"]
        )
        value, (new_state, metrics) = kd.terms(
            params,
            {**model_state, "student": student},
            batch,
            outputs,
            logit_weight=logit_weight,
            feature_weight=feature_weight,
            ce_transform=ce_transform,
        )
        exposure = jnp.mean(losses.uniform_cross_entropy(outlier_logits))
        metrics["outlier_exposure"] = exposure
        return value + weight * exposure, (new_state, metrics)

    return Method(lambda key: kd.init_groups(key, model, image_shape, teacher_width), loss)
