"""OAL: distillation plus a contrastive term against outliers, with one of three objectives.

`energy`            The default. Outliers are mapped into the student's feature space and pass
                    through its head under an energy loss, so they train the logits that scores
                    read.
`club`              Both CLUB terms as in the official code. Outliers are paired at random with the
                    student's ID features, and the same minimisation trains q. No outlier passes
                    through the student. The mean over all pairings of a batch gives the student no
                    gradient: the metrics have the norm of that mean gradient
                    (`club_expected_gradient_*`) and of the actual one (`club_gradient_*`).
`club_alternate`    CLUB as published: q is fitted by likelihood, and the student minimises the
                    bound.

Source: arXiv 2406.16525; CLUB: arXiv 2006.12013; energy as in VOS, arXiv 2202.01197.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from oal_jax.methods import kd, losses
from oal_jax.methods.base import Groups, Method, apply_group, split_variables
from oal_jax.methods.student import Transform, forward
from oal_jax.models.mutual_information import GaussianPredictor
from oal_jax.models.projector import FeatureProjector, LatentProjector
from oal_jax.runtime.keys import named
from oal_jax.runtime.ops import unit


def energy(
    model: Any,
    image_shape: tuple[int, int, int],
    teacher_width: int,
    latent_shape: tuple[int, int, int] | None,
    *,
    logit_weight: float,
    feature_weight: float,
    energy_weight: float,
    latent_projector_weight: float,
    ramp_steps: tuple[float, float],
    feature_outliers: bool,
    image_outliers: bool = False,
    ce_transform: Transform | None = None,
) -> Method:
    """Distillation and a logistic loss on the energies of ID images and outliers.

    Feature outliers `outlier` (B, T) reach the student's head through the feature projector.
    Latents `outlier_latent` (B, h, w, c) reach it through a latent projector, which regresses the
    student's features from the latents of ID images (`latent`). Outliers train neither projector,
    and the batch statistics of the feature projector never include one. Images `outlier_image`
    (m, h, w, c) pass through the whole student beside the ID images, and train all of it. Without
    outliers only the ID term is trained, with scale and offset held fixed.

    Args:
      latent_shape: (h, w, c) of a latent, or None where there are no latent outliers.
      ramp_steps: the energy loss's weight rises linearly between these two steps.
      feature_outliers: whether the batch has `outlier`.
      image_outliers: whether it has `outlier_image`.
    """

    def init(key):
        params, model_state = kd.init_groups(key, model, image_shape, teacher_width)
        params["energy"] = {"scale": jnp.zeros(()), "offset": jnp.zeros(())}
        if latent_shape:
            variables = LatentProjector(model.feature_width).init(
                named(key, "adapter"), jnp.zeros((1, *latent_shape))
            )
            params["adapter"], _ = split_variables(variables)
        return params, model_state

    def loss(params, model_state, batch, step, key):
        images = batch["outlier_image"] if image_outliers else None
        (logits, features), (image_logits, _), student = forward(
            model, params, model_state, key, batch["image"], images
        )
        value, (new_state, metrics) = kd.terms(
            params,
            {**model_state, "student": student},
            batch,
            (logits, features),
            logit_weight=logit_weight,
            feature_weight=feature_weight,
            ce_transform=ce_transform,
        )
        outlier_logits = {
            kind: head_logits(params, jax.lax.stop_gradient(mapped))
            for kind, mapped in map_outliers(
                model.feature_width,
                params,
                model_state,
                batch["outlier"] if feature_outliers else None,
                batch["outlier_latent"] if latent_shape else None,
            ).items()
        }
        if image_outliers:
            outlier_logits["image"] = image_logits
        weight = energy_weight * losses.ramp(step, *ramp_steps)
        id_neg_energy = jax.nn.logsumexp(logits, axis=-1)
        scale, offset = params["energy"]["scale"], params["energy"]["offset"]
        for kind, z in outlier_logits.items():
            neg_energy = jax.nn.logsumexp(z, axis=-1)
            id_loss, outlier_loss = losses.energy_logistic(id_neg_energy, neg_energy, scale, offset)
            separation = jnp.mean(id_loss) + jnp.mean(outlier_loss)
            value += weight * separation
            metrics[f"energy_{kind}"] = separation
            metrics[f"outlier_neg_energy_{kind}"] = jnp.mean(neg_energy)
        if not outlier_logits:
            # Without outliers a learned offset alone would bring the loss to zero.
            fixed = jax.lax.stop_gradient((scale, offset))
            id_loss, _ = losses.energy_logistic(id_neg_energy, id_neg_energy, *fixed)
            value += weight * jnp.mean(id_loss)
            metrics["energy_id"] = jnp.mean(id_loss)
        metrics["id_neg_energy"] = jnp.mean(id_neg_energy)
        if latent_shape:
            predicted = LatentProjector(model.feature_width).apply(
                {"params": params["adapter"]}, batch["latent"]
            )
            error = jnp.sum((predicted - jax.lax.stop_gradient(features)) ** 2, axis=-1)
            value += latent_projector_weight * jnp.mean(error)
            metrics["latent_projector_error"] = jnp.mean(error)
        return value, (new_state, metrics)

    return Method(init, loss)


def map_outliers(
    feature_width: int,
    params: Groups,
    model_state: Groups,
    features: jax.Array | None,
    latents: jax.Array | None,
) -> dict[str, jax.Array]:
    """Outliers as student features (n, d) by kind: "feature" and "latent", or one of them.

    Args:
      feature_width: d, of the student.
      features: outliers (n, T) in the teacher's feature space, of any length.
      latents: outliers (n, h, w, c) as latents.
    """
    mapped = {}
    if features is not None:
        mapped["feature"], _ = apply_group(
            FeatureProjector(feature_width),
            params,
            model_state,
            "projector",
            unit(features),
            train=False,
        )
    if latents is not None:
        mapped["latent"] = LatentProjector(feature_width).apply(
            {"params": params["adapter"]}, latents
        )
    return mapped


def head_logits(params: Groups, features: jax.Array) -> jax.Array:
    """The student's logits of features (n, d)."""
    head = params["student"]["fc"]
    return features @ head["kernel"] + head["bias"][None]


def club(
    model: Any,
    image_shape: tuple[int, int, int],
    teacher_width: int,
    latent_width: int,
    *,
    logit_weight: float,
    feature_weight: float,
    knn_club_weight: float,
    latent_club_weight: float,
    alternate: bool,
    ce_transform: Transform | None = None,
) -> Method:
    """Both CLUB terms as in the official code, or (`alternate`) with q fitted by likelihood.

    The batch needs `outlier` (B, T) and `outlier_latent` (B, latent_width), paired at random with
    the ID images. The feature projector reads the teacher's features without normalisation, as in
    the official code. With `alternate` one step gives the student the gradient of CLUB with q
    fixed, and q that of the likelihood with the features fixed.
    """
    hidden: dict[str, Sequence[int]] = {"outlier": (256,), "outlier_latent": (32, 16, 256)}
    widths = {"outlier": teacher_width, "outlier_latent": latent_width}
    weights = {"outlier": knn_club_weight, "outlier_latent": latent_club_weight}
    predictors = {name: GaussianPredictor(model.feature_width, hidden[name]) for name in hidden}

    def init(key):
        params, model_state = kd.init_groups(key, model, image_shape, teacher_width)
        params["club"] = {
            name: q.init(named(key, name), jnp.zeros((1, widths[name])))["params"]
            for name, q in predictors.items()
        }
        return params, model_state

    def loss(params, model_state, batch, step, key):
        del step
        value, (new_state, metrics), (_, features) = kd.student_terms(
            params,
            model_state,
            batch,
            model,
            key=key,
            logit_weight=logit_weight,
            feature_weight=feature_weight,
            ce_transform=ce_transform,
            unit_features=False,
        )
        for name, q in predictors.items():
            q_params = params["club"][name]
            fixed = jax.lax.stop_gradient(q_params) if alternate else q_params
            mean, log_variance = q.apply({"params": fixed}, batch[name])
            estimate = jnp.mean(losses.club(mean, log_variance, features))
            value += weights[name] * estimate
            metrics[f"club_{name}"] = estimate
            one_draw, expected = _gradient_norms(mean, log_variance, features)
            metrics[f"club_gradient_{name}"] = one_draw
            metrics[f"club_expected_gradient_{name}"] = expected
            if alternate:
                mean, log_variance = q.apply({"params": q_params}, batch[name])
                likelihood = losses.gaussian_log_likelihood(
                    mean, log_variance, jax.lax.stop_gradient(features)
                )
                value -= jnp.mean(likelihood)
                metrics[f"likelihood_{name}"] = jnp.mean(likelihood)
        return value, (new_state, metrics)

    return Method(init, loss)


def _gradient_norms(
    mean: jax.Array, log_variance: jax.Array, features: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Norms of d CLUB / d features for this pairing, and for the mean over all pairings.

    The mean over all pairings is a sum of products of batch means, so it costs O(B d). It is zero
    up to rounding for any q.
    """
    mean, log_variance, features = jax.lax.stop_gradient((mean, log_variance, features))

    def paired(y):
        return jnp.mean(losses.club(mean, log_variance, y))

    def averaged(y):
        precision = jnp.exp(-log_variance)
        centred = y - jnp.mean(y, axis=0, keepdims=True)
        squares = y**2 - jnp.mean(y**2, axis=0, keepdims=True)
        return jnp.sum(
            jnp.mean(precision * mean, axis=0) * jnp.mean(centred, axis=0)
            - jnp.mean(precision, axis=0) / 2 * jnp.mean(squares, axis=0)
        )

    return tuple(jnp.linalg.norm(jax.grad(f)(features)) for f in (paired, averaged))
