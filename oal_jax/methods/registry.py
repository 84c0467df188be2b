"""Every training method by name: how it is made of a config, and what it reads.

A new method is one file beside this one, a function here, and a line in `METHODS` (and its name
in `config.METHOD_STAGES`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from oal_jax.config import DECODED, Config, sees_images, unleashed
from oal_jax.methods import (
    ce,
    doe,
    kd,
    logitnorm,
    masking,
    npos,
    oal,
    outlier_exposure,
    pixel,
    poem,
    unleashing_mask,
    vos,
    woods,
)
from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform

# What a source gives to the two outlier terms of OAL: feature outliers, latents.
SOURCES = {
    "knn": ("pool", None),
    "diffusion": ("pool", "pool"),
    "random": ("random", "random"),
    "mixed": ("half", "half"),
    "latents": ("random", "pool"),
    "latents_mixed": ("random", "half"),
    "half_random": ("random", "half random"),  # half as many random latents: a control
    "none": (None, None),  # the energy loss on the ID side alone: a control
}


class Parts(NamedTuple):
    """What a method may be made of."""

    config: Config
    net: Any  # the student
    image_shape: tuple[int, int, int]
    shapes: Mapping[str, tuple[int, ...]]  # of the arrays that the batches are drawn from
    steps: int  # of the whole training
    epoch_steps: int
    start_loss: float | None  # mean cross-entropy of the start, where stage `estimate_loss` ran
    ce_transform: Transform | None  # of the ID cross-entropy


class Recipe(NamedTuple):
    """How a method is made, and what its batches hold beside images and labels.

    Attributes:
      build: the method of the parts.
      teacher: whether the batches hold the teacher's outputs.
      arrays: of a config, the name in the batch to the content, a key of `stages.batches.READERS`.
      outliers_per_image: of a config, how many outliers a batch holds for each of its images.
    """

    build: Callable[[Parts], Method]
    teacher: bool = False
    arrays: Callable[[Config], dict[str, str]] = lambda config: {}
    outliers_per_image: Callable[[Config], int] = lambda config: 1


# Contents that are made of the latents that were sampled.
_SAMPLED = {"latents", "reduced latents", DECODED["decoded"], DECODED["decoded_half"]}


def reads_sampled(config: Config) -> bool:
    """Whether the training reads sampled latents, or what they decode to."""
    return bool(_SAMPLED & set(METHODS[config.method.name].arrays(config).values()))


def make(parts: Parts, constraint: float | None) -> Method:
    """The method of the config; `constraint`: of Unleashing Mask's loss, where the config asks."""
    method_config = parts.config.method
    recipe = METHODS[method_config.name]
    if not unleashed(parts.config):
        return recipe.build(parts)
    transform = unleashing_mask.transform(constraint, method_config.beta)
    method = recipe.build(parts._replace(ce_transform=transform))
    return unleashing_mask.with_constraint(method, constraint)


def _cross_entropy(parts: Parts) -> Method:
    return ce.cross_entropy(parts.net, parts.image_shape, ce_transform=parts.ce_transform)


def _masked(parts: Parts) -> Method:
    m = parts.config.method
    return masking.with_mask(_cross_entropy(parts), m.mask_keep, freeze=m.freeze)


def _distilled(parts: Parts) -> tuple[tuple, dict[str, Any]]:
    """The arguments that all methods with a teacher share."""
    m = parts.config.method
    options = {"logit_weight": m.logit_kd, "feature_weight": m.feature_kd}
    options["ce_transform"] = parts.ce_transform
    return (parts.net, parts.image_shape, parts.config.teacher.width), options


def _kd(parts: Parts) -> Method:
    positional, options = _distilled(parts)
    return kd.distillation(*positional, **options)


def _pixel(parts: Parts) -> Method:
    positional, options = _distilled(parts)
    return pixel.outlier_exposure(*positional, **options, pixel_weight=parts.config.method.pixel)


def _oal(parts: Parts) -> Method:
    m, (positional, options) = parts.config.method, _distilled(parts)
    if m.micl != "energy":
        return oal.club(
            *positional,
            parts.shapes["outlier_latent"][1],
            **options,
            knn_weight=m.knn_club,
            latent_weight=m.latent_club,
            alternate=m.micl == "alternate",
        )
    feature, latent = SOURCES[parts.config.outliers.source]
    return oal.energy(
        *positional,
        parts.shapes["latents"][1:] if latent else None,
        **options,
        energy_weight=m.energy,
        adapter_weight=m.adapter,
        ramp_steps=(m.ramp_start * parts.steps, m.ramp_end * parts.steps),
        feature_outliers=feature is not None,
        image_outliers=sees_images(parts.config),
        adaptation=oal.Adaptation(m.adapt.of, m.adapt.steps, m.adapt.rate),
        latent_stage=m.latent_stage,
    )


def _oal_arrays(config: Config) -> dict[str, str]:
    if config.method.micl != "energy":
        return {"outlier": "knn", "outlier_latent": "reduced latents"}
    feature, latent = SOURCES[config.outliers.source]
    arrays = {"outlier": "knn"} if feature in ("pool", "half") else {}
    if latent in ("pool", "half"):
        arrays["outlier_latent"] = "latents"
    arrays |= {"latents": "latents of ID images"} if latent else {}
    return arrays | (_outlier_images(config) if sees_images(config) else {})


def _exposure(parts: Parts) -> Method:
    e = parts.config.method.exposure
    return outlier_exposure.exposure(*_student(parts), weight=e.weight, **_shared(parts))


def _energy(parts: Parts) -> Method:
    return outlier_exposure.energy(*_student(parts), **_hinges(parts), **_shared(parts))


def _poem(parts: Parts) -> Method:
    e = parts.config.method.exposure
    return poem.posterior_sampling(
        *_student(parts),
        candidate_ratio=e.poem_ratio,
        covariance_scale=e.poem_covariance,
        buffer_size=e.poem_buffer,
        refresh_steps=e.poem_refresh,
        **_hinges(parts),
        **_shared(parts),
    )


def _doe(parts: Parts) -> Method:
    e = parts.config.method.exposure
    return doe.worst_perturbation(
        *_student(parts),
        start_step=e.doe_start * parts.steps,
        weight=e.doe,
        ascend=e.doe_ascend,
        **_shared(parts),
    )


def _woods(parts: Parts) -> Method:
    w = parts.config.method.wild
    return woods.wild_mixture(
        *_student(parts),
        epoch_steps=parts.epoch_steps,
        ce_limit=w.ce_tolerance * parts.start_loss,
        id_limit=w.id_limit,
        multiplier_rate=w.multiplier_rate,
        penalty_growth=w.penalty_growth,
        **_shared(parts),
    )


def _student(parts: Parts) -> tuple[Any, tuple[int, int, int]]:
    return parts.net, parts.image_shape


def _shared(parts: Parts) -> dict[str, Any]:
    """What all methods with outlier images share."""
    shared = parts.config.method.exposure.shared_statistics
    return {"shared_statistics": shared, "ce_transform": parts.ce_transform}


def _hinges(parts: Parts) -> dict[str, float]:
    e = parts.config.method.exposure
    return {"weight": e.hinge, "margin_in": e.margin_in, "margin_out": e.margin_out}


def _vos(parts: Parts) -> Method:
    v = parts.config.method.virtual
    return vos.virtual_outliers(
        *_student(parts),
        start_step=v.start * parts.steps,
        weight=v.weight,
        queue_size=v.queue,
        samples=v.samples,
        keep=v.keep,
        refresh_steps=v.refresh,
        ce_transform=parts.ce_transform,
    )


def _npos(parts: Parts) -> Method:
    v = parts.config.method.virtual
    return npos.boundary_outliers(
        *_student(parts),
        start_step=v.start * parts.steps,
        weight=v.weight,
        queue_size=v.queue,
        neighbour=v.neighbour,
        boundary=v.boundary,
        anchors=v.anchors,
        sigma=v.sigma,
        candidates=v.candidates,
        keep=v.npos_keep,
        refresh_steps=v.refresh,
        contrastive_weight=v.contrastive,
        ce_transform=parts.ce_transform,
    )


def _logitnorm(parts: Parts) -> Method:
    return logitnorm.normalised_cross_entropy(
        *_student(parts),
        temperature=parts.config.method.logit_temperature,
        ce_transform=parts.ce_transform,
    )


def _outlier_images(config: Config) -> dict[str, str]:
    return {"outlier_image": DECODED.get(config.outliers.images, "outlier images")}


def _wild_images(config: Config) -> dict[str, str]:
    return _outlier_images(config) | {"wild_image": "unlabelled images"}


METHODS: dict[str, Recipe] = {
    "ce": Recipe(_cross_entropy),
    "kd": Recipe(_kd, teacher=True),
    "oal": Recipe(_oal, teacher=True, arrays=_oal_arrays),
    "pixel": Recipe(_pixel, teacher=True, arrays=lambda c: {"outlier_image": "decoded latents"}),
    "um": Recipe(_cross_entropy),
    "umap": Recipe(_masked),
    "oe": Recipe(_exposure, arrays=_outlier_images),
    "energy": Recipe(_energy, arrays=_outlier_images),
    "poem": Recipe(
        _poem,
        arrays=_outlier_images,
        outliers_per_image=lambda config: config.method.exposure.poem_ratio,
    ),
    "doe": Recipe(_doe, arrays=_outlier_images),
    "woods": Recipe(_woods, arrays=_wild_images),
    "vos": Recipe(_vos),
    "npos": Recipe(_npos),
    "logitnorm": Recipe(_logitnorm),
}
