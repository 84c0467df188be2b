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

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from oal_jax.methods import kd, losses
from oal_jax.methods.base import Groups, Method, apply_group, split_variables
from oal_jax.methods.student import Transform, forward, separate
from oal_jax.models.mutual_information import GaussianPredictor
from oal_jax.models.projector import LatentAdapter, LatentMap, Projector
from oal_jax.runtime.keys import named
from oal_jax.runtime.ops import unit


class Adaptation(NamedTuple):
    """How a step's latent outliers follow the student that is trained on them.

    Attributes:
      of: of so many at a time the one that the student finds most like ID is kept; 1: all are.
      steps: of the gradient by which latents are moved before; 0: as they were sampled.
      rate: length of such a step, in units of a latent's own length; towards the student's ID where
        positive, away from it where negative.
    """

    of: int = 1
    steps: int = 0
    rate: float = 0.05


_UNCHANGED = Adaptation()


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
    image_outliers: bool = False,
    adaptation: Adaptation = _UNCHANGED,
    latent_stage: int = 0,
    ce_transform: Transform | None = None,
) -> Method:
    """The sound default: E = logsumexp of the student's logits tells ID from outliers.

    Feature outliers `outlier` (B, T) reach the student's head through DT, latents
    `outlier_latent` (B, h, w, c) through an adapter that regresses the student's features, or the
    map of one of its stages, from the latents of ID images (`latent`). Mapped outliers carry no
    gradient to either map, and the batch statistics of DT never see one. Images `outlier_image`
    (m, h, w, c) pass through the whole student beside the ID images, and their gradient does too.
    Without any outliers the ID side alone is trained, with scale and offset held fixed.

    Args:
      latent_shape: (h, w, c) of a latent, or None where there are no latent outliers.
      ramp_steps: the energy loss's weight rises linearly between these two steps.
      feature_outliers: whether the batch has `outlier`.
      image_outliers: whether it has `outlier_image`.
      adaptation: of latent outliers to the student at hand.
      latent_stage: of a ResNet, after which latents enter it, normalised there by the running
        statistics; 0: as pooled features, before the head.
    """
    projector = Projector(model.feature_width)
    adapter = make_adapter(model, image_shape, latent_stage)

    def init(key):
        params, model_state = kd.init_groups(key, model, image_shape, teacher_width)
        params["energy"] = {"scale": jnp.zeros(()), "offset": jnp.zeros(())}
        if latent_shape:
            variables = adapter.init(named(key, "adapter"), jnp.zeros((1, *latent_shape)))
            params["adapter"], _ = split_variables(variables)
        return params, model_state

    def energies(params, model_state, batch) -> dict[str, jax.Array]:
        """E of the mapped outliers of a batch."""
        found = {}

        def energy_of(mapped, stage):
            logits, _ = outputs_of_mapped(model, params, model_state, mapped, stage)
            return jax.nn.logsumexp(logits, axis=-1)

        if feature_outliers:
            mapped, _ = apply_group(
                projector, params, model_state, "projector", unit(batch["outlier"]), train=False
            )
            found["feature"] = energy_of(jax.lax.stop_gradient(mapped), 0)
        if latent_shape:

            def map_latents(latents):
                return adapter.apply({"params": params["adapter"]}, latents)

            latents = _adapted(
                lambda z: energy_of(map_latents(z), latent_stage),
                batch["outlier_latent"],
                adaptation,
            )
            mapped = jax.lax.stop_gradient(map_latents(latents))
            found["latent"] = energy_of(mapped, latent_stage)
        return found

    def loss(params, model_state, batch, step, key):
        shown = batch["outlier_image"] if image_outliers else None
        kept = ("batch_stats", "maps") if latent_shape and latent_stage else ("batch_stats",)
        (logits, features), (image_logits, _), student = forward(
            model, params, model_state, key, batch["image"], shown, mutable=kept
        )
        maps, student = student.get("maps"), {k: v for k, v in student.items() if k != "maps"}
        value, (new_state, metrics) = kd.terms(
            params,
            {**model_state, "student": student},
            batch,
            (logits, features),
            logit_weight=logit_weight,
            feature_weight=feature_weight,
            ce_transform=ce_transform,
        )
        weight = energy_weight * losses.ramp(step, *ramp_steps)
        id_energy = jax.nn.logsumexp(logits, axis=-1)
        scale, offset = params["energy"]["scale"], params["energy"]["offset"]
        outliers = energies(params, model_state, batch)
        if image_outliers:
            outliers["image"] = jax.nn.logsumexp(image_logits, axis=-1)
        for name, outlier_energy in outliers.items():
            id_loss, outlier_loss = losses.energy_logistic(id_energy, outlier_energy, scale, offset)
            separation = jnp.mean(id_loss) + jnp.mean(outlier_loss)
            value += weight * separation
            metrics[f"energy_{name}"] = separation
            metrics[f"outlier_energy_{name}"] = jnp.mean(outlier_energy)
        if not outliers:
            # With nothing opposite, a learned offset would take the loss to zero by itself.
            fixed = jax.lax.stop_gradient((scale, offset))
            id_loss, _ = losses.energy_logistic(id_energy, id_energy, *fixed)
            value += weight * jnp.mean(id_loss)
            metrics["energy_id"] = jnp.mean(id_loss)
        metrics["id_energy"] = jnp.mean(id_energy)
        if latent_shape:
            predicted = adapter.apply({"params": params["adapter"]}, batch["latent"])
            target = features
            if maps:
                target, _ = separate(maps[f"stage{latent_stage}"][0], len(features))
            error = jnp.sum((predicted - jax.lax.stop_gradient(target)) ** 2, axis=-1)
            value += adapter_weight * jnp.mean(error)
            metrics["adapter_error"] = jnp.mean(error)
        return value, (new_state, metrics)

    return Method(init, loss)


def make_adapter(model: Any, image_shape: tuple[int, int, int], stage: int) -> nn.Module:
    """A: from latents to the student's pooled features, or to its map after a stage."""
    if not stage:
        return LatentAdapter(model.feature_width)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    _, left = jax.eval_shape(partial(model.apply, mutable=["maps"]), variables, images)
    return LatentMap(left["maps"][f"stage{stage}"][0].shape[1:])


def outputs_of_mapped(
    model: Any, params: Groups, model_state: Groups, mapped: jax.Array, stage: int
) -> tuple[jax.Array, jax.Array]:
    """The student's (logits, features) of what enters it after a stage, or (0) as features."""
    if stage:
        variables = {"params": params["student"], **model_state["student"]}
        return model.apply(variables, mapped, after=stage)
    head = params["student"]["fc"]
    return mapped @ head["kernel"] + head["bias"][None], mapped


def _adapted(
    energies: Callable[[jax.Array], jax.Array], latents: jax.Array, adaptation: Adaptation
) -> jax.Array:
    """The latents moved along the gradient of their E; of each `of` neighbours the highest."""
    axes = tuple(range(1, latents.ndim))
    length = jnp.sqrt(jnp.sum(latents**2, axis=axes, keepdims=True))
    for _ in range(adaptation.steps):
        slope = jax.grad(lambda z: jnp.sum(energies(z)))(latents)
        norm = jnp.sqrt(jnp.sum(slope**2, axis=axes, keepdims=True))
        latents = latents + adaptation.rate * length * slope / jnp.maximum(norm, 1e-12)
    if adaptation.of > 1:
        # Among neighbours, not in the whole batch: the devices need not send each other any.
        groups = latents.shape[0] // adaptation.of
        hardest = jnp.argmax(energies(latents).reshape(groups, adaptation.of), axis=1)
        pieces = latents.reshape(groups, adaptation.of, *latents.shape[1:])
        chosen = jax.nn.one_hot(hardest, adaptation.of, dtype=pieces.dtype)
        latents = jnp.einsum("gn,gn...->g...", chosen, pieces)
    return jax.lax.stop_gradient(latents)


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
