"""OAL: distillation plus a term that knows of outliers ("MICL"), in three forms.

`reference`  both CLUB terms as the official code has them: outliers paired at random with the
             student's ID features, q trained by the same minimisation. No outlier passes through
             the student, and over all pairings of a batch the gradient to the student is zero: the
             step logs its norm (`club_expected_gradient_*`) beside that of the pairing at hand
             (`club_gradient_*`).
`alternate`  CLUB as published: q is fitted by likelihood, the student minimises the bound.
`energy`     the default: outliers are mapped into the student's feature space and pass through
             its head under an energy loss, so that they change what the detector reads.

Source: arXiv 2406.16525; CLUB: arXiv 2006.12013; energy as in VOS, arXiv 2202.01197.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from oal_jax import losses
from oal_jax.keys import named
from oal_jax.methods import kd
from oal_jax.methods.base import Method, apply_group, split_variables
from oal_jax.methods.student import Transform
from oal_jax.models.mutual_information import GaussianPredictor
from oal_jax.models.projector import LatentAdapter, Projector
from oal_jax.outliers.knn import unit


def energy(
    model: Any,
    image_shape: tuple[int, int, int],
    teacher_width: int,
    latent_shape: tuple[int, int, int] | None,
    *,
    logit_weight: float,
    feature_weight: float,
    energy_weight: float,
    adapter_weight: float,
    ramp_steps: tuple[float, float],
    feature_outliers: bool,
    ce_transform: Transform | None = None,
) -> Method:
    """The sound default: E = logsumexp of the student's logits tells ID from mapped outliers.

    Feature outliers `outlier` (B, T) reach the student's head through DT, latents
    `outlier_latent` (B, h, w, c) through an adapter that regresses the student's features from
    the latents of ID images (`latent`). Mapped outliers carry no gradient to either map, and
    the batch statistics of DT never see one. Without any outliers the ID side alone is trained,
    with scale and offset held fixed.

    Args:
      latent_shape: (h, w, c) of a latent, or None where there are no latent outliers.
      ramp_steps: the energy loss's weight rises linearly between these two steps.
      feature_outliers: whether the batch has `outlier`.
    """
    projector, adapter = Projector(model.feature_width), LatentAdapter(model.feature_width)

    def init(key):
        params, model_state = kd.init_groups(key, model, image_shape, teacher_width)
        params["energy"] = {"scale": jnp.zeros(()), "offset": jnp.zeros(())}
        if latent_shape:
            variables = adapter.init(named(key, "adapter"), jnp.zeros((1, *latent_shape)))
            params["adapter"], _ = split_variables(variables)
        return params, model_state

    def mapped_outliers(params, model_state, batch) -> dict[str, jax.Array]:
        mapped = {}
        if feature_outliers:
            outliers = unit(batch["outlier"])
            mapped["feature"], _ = apply_group(
                projector, params, model_state, "projector", outliers, train=False
            )
        if latent_shape:
            mapped["latent"] = adapter.apply({"params": params["adapter"]}, batch["outlier_latent"])
        return jax.lax.stop_gradient(mapped)

    def loss(params, model_state, batch, step, key):
        value, (new_state, metrics), (logits, features) = kd.student_terms(
            params,
            model_state,
            batch,
            model,
            key=key,
            logit_weight=logit_weight,
            feature_weight=feature_weight,
            ce_transform=ce_transform,
        )
        weight = energy_weight * losses.ramp(step, *ramp_steps)
        head = params["student"]["fc"]
        id_energy = jax.nn.logsumexp(logits, axis=-1)
        scale, offset = params["energy"]["scale"], params["energy"]["offset"]
        mapped = mapped_outliers(params, model_state, batch)
        for name, outlier_features in mapped.items():
            outlier_logits = outlier_features @ head["kernel"] + head["bias"][None]
            outlier_energy = jax.nn.logsumexp(outlier_logits, axis=-1)
            id_loss, outlier_loss = losses.energy_logistic(id_energy, outlier_energy, scale, offset)
            separation = jnp.mean(id_loss) + jnp.mean(outlier_loss)
            value += weight * separation
            metrics[f"energy_{name}"] = separation
            metrics[f"outlier_energy_{name}"] = jnp.mean(outlier_energy)
        if not mapped:
            # With nothing opposite, a learned offset would take the loss to zero by itself.
            fixed = jax.lax.stop_gradient((scale, offset))
            id_loss, _ = losses.energy_logistic(id_energy, id_energy, *fixed)
            value += weight * jnp.mean(id_loss)
            metrics["energy_id"] = jnp.mean(id_loss)
        metrics["id_energy"] = jnp.mean(id_energy)
        if latent_shape:
            predicted = adapter.apply({"params": params["adapter"]}, batch["latent"])
            error = jnp.sum((predicted - jax.lax.stop_gradient(features)) ** 2, axis=-1)
            value += adapter_weight * jnp.mean(error)
            metrics["adapter_error"] = jnp.mean(error)
        return value, (new_state, metrics)

    return Method(init, loss)


def club(
    model: Any,
    image_shape: tuple[int, int, int],
    teacher_width: int,
    latent_width: int,
    *,
    logit_weight: float,
    feature_weight: float,
    knn_weight: float,
    latent_weight: float,
    alternate: bool,
    ce_transform: Transform | None = None,
) -> Method:
    """Both CLUB terms, as shipped or (`alternate`) with q fitted by likelihood.

    The batch needs `outlier` (B, T) and `outlier_latent` (B, latent_width), paired at random
    with the ID images. DT gets the teacher's features as they are, as shipped. `alternate`: the
    student's gradient comes from CLUB with q held fixed, q's from the likelihood with the
    features held fixed, in the same step.
    """
    hidden: dict[str, Sequence[int]] = {"outlier": (256,), "outlier_latent": (32, 16, 256)}
    widths = {"outlier": teacher_width, "outlier_latent": latent_width}
    weights = {"outlier": knn_weight, "outlier_latent": latent_weight}
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
    """Norms of d CLUB / d features: of this pairing, and of the mean over all pairings.

    The mean over pairings separates into products of batch means, so it costs O(B d); it is zero
    but for rounding, whatever q says.
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
