"""Every training method by name: its construction, its inputs, and the rates of its groups.

A new method is one file beside this one, its options in `config.methods`, and an entry of
`METHODS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from oal_jax.config import Config, unleashed
from oal_jax.errors import UserError
from oal_jax.methods import (
    ce,
    kd,
    logitnorm,
    masking,
    npos,
    oal,
    outlier_exposure,
    pixel,
    unleashing_mask,
    vos,
    woods,
)
from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform
from oal_jax.outliers import pools
from oal_jax.outliers.pools import OutlierPool


class Parts(NamedTuple):
    """Inputs of the construction of a method."""

    config: Config
    net: Any  # the student
    image_shape: tuple[int, int, int]
    shapes: Mapping[str, Any]  # of the pools' arrays, by their names
    steps: int  # of the whole training
    epoch_steps: int
    start_loss: float | None  # mean cross-entropy of the start, where stage `estimate_loss` ran
    ce_transform: Transform | None  # of the ID cross-entropy

    @property
    def student(self) -> tuple[Any, tuple[int, int, int]]:
        """The first two arguments of every method."""
        return self.net, self.image_shape

    def options(self, section: str, *without: str) -> dict[str, Any]:
        """The options of a section of `config.method` except some, and `ce_transform`."""
        options = dataclasses.asdict(getattr(self.config.method, section))
        options = {name: value for name, value in options.items() if name not in without}
        return options | {"ce_transform": self.ce_transform}


class Recipe(NamedTuple):
    """The construction of a method, and its inputs beside ID images and labels.

    Attributes:
      build: the method of the parts.
      pools: the outlier pools that a config's method draws from.
      rates: learning rates of the groups beside "student" and "mask".
      teacher: whether the batches hold the teacher's outputs.
      reads_start_loss: whether it reads the mean cross-entropy of the start.
      label_every: the student sees the labels of every n-th ID image.
      whole_batch: the setting that makes the loss a function of batch means, so that microbatches
        do not add up to it; empty where it is a mean over examples.
      objective: what the report calls the method's objective; empty where there is one only.
      map_outliers: `oal.map_outliers` where the method maps outliers to student features.
    """

    build: Callable[[Parts], Method]
    pools: Callable[[Config], tuple[OutlierPool, ...]] = lambda config: ()
    rates: Callable[[Config], dict[str, float]] = lambda config: {}
    teacher: bool = False
    reads_start_loss: bool = False
    label_every: int = 1
    whole_batch: Callable[[Config], str] = lambda config: ""
    objective: Callable[[Config], str] = lambda config: ""
    map_outliers: Callable[[Config], Callable | None] = lambda config: None


def build(parts: Parts, constraint: float | None) -> Method:
    """The method of the config; `constraint` is Unleashing Mask's where the config uses it."""
    recipe = METHODS[parts.config.method.name]
    if not unleashed(parts.config):
        return recipe.build(parts)
    transform = unleashing_mask.transform(constraint, parts.config.method.um.beta)
    method = recipe.build(parts._replace(ce_transform=transform))
    return unleashing_mask.with_constraint(method, constraint)


def check(config: Config) -> None:
    """Raise `UserError` where the method can't be trained as the config says.

    A pool checks its own options when it is made.
    """
    recipe = recipe_of(config)
    recipe.pools(config)
    whole = "method.unleash=True" if config.method.unleash else recipe.whole_batch(config)
    if whole and config.train.accumulate > 1:
        raise UserError(
            f"config {whole} needs the whole batch at once:"
            f" train.accumulate={config.train.accumulate} must be 1"
        )


def recipe_of(config: Config) -> Recipe:
    """The recipe of the config's method."""
    return METHODS[config.method.name]


def files_read(config: Config) -> set[tuple[str, str]]:
    """(stage, file) of everything that the method's pools read."""
    return {read for pool in recipe_of(config).pools(config) for read in pool.reads}


def reads_estimate(config: Config) -> bool:
    """Whether the method reads what stage `estimate_loss` writes."""
    estimated = unleashed(config) and config.method.um.constraint < 0
    return estimated or recipe_of(config).reads_start_loss


def rates(config: Config) -> dict[str, float]:
    """The learning rate of every group that the method may have; 0 freezes the student."""
    frozen = config.method.name == "umap" and config.method.umap.freeze
    student = 0.0 if frozen else config.train.learning_rate
    own = recipe_of(config).rates(config)
    return {"student": student, "mask": config.train.learning_rate, **own}


def _cross_entropy(parts: Parts) -> Method:
    return ce.cross_entropy(*parts.student, ce_transform=parts.ce_transform)


def _masked(parts: Parts) -> Method:
    options = parts.config.method.umap
    return masking.with_mask(_cross_entropy(parts), options.mask_density, freeze=options.freeze)


def _distillation(parts: Parts) -> tuple[tuple, dict[str, Any]]:
    positional = (*parts.student, parts.config.teacher.width)
    return positional, parts.options("kd", "projector_rate")


def _kd(parts: Parts) -> Method:
    positional, options = _distillation(parts)
    return kd.distillation(*positional, **options)


def _pixel(parts: Parts) -> Method:
    positional, options = _distillation(parts)
    return pixel.outlier_exposure(*positional, **options, weight=parts.config.method.pixel.weight)


def _oal(parts: Parts) -> Method:
    o, (positional, options) = parts.config.method.oal, _distillation(parts)
    if o.objective != "energy":
        return oal.club(
            *positional,
            parts.shapes["outlier_latent"][1],
            **options,
            knn_club_weight=o.knn_club_weight,
            latent_club_weight=o.latent_club_weight,
            alternate=o.objective == "club_alternate",
        )
    names = {pool.name for pool in _oal_pools(parts.config)}
    return oal.energy(
        *positional,
        parts.shapes["latent"][1:] if "latent" in names else None,
        **options,
        energy_weight=o.energy_weight,
        latent_projector_weight=o.latent_projector_weight,
        ramp_steps=(o.ramp_start * parts.steps, o.ramp_end * parts.steps),
        feature_outliers="outlier" in names,
        image_outliers="outlier_image" in names,
    )


def _oal_pools(config: Config) -> tuple[OutlierPool, ...]:
    if config.method.oal.objective != "energy":
        return pools.knn_features(), pools.reduced_latents()
    of_source = {
        "knn": lambda: (pools.knn_features(),),
        "diffusion": lambda: (
            pools.knn_features(),
            pools.sampled_latents(),
            pools.id_latents(),
        ),
        "random": lambda: (
            pools.random_features(config.teacher.width),
            pools.random_latents(),
            pools.id_latents(),
        ),
        "none": lambda: (),
    }
    outliers = of_source[config.outliers.source]()
    if config.outliers.image_share:
        outliers += (pools.images(config, config.outliers.image_share),)
    return outliers


def _oal_rates(config: Config) -> dict[str, float]:
    o = config.method.oal
    return {
        "projector": config.method.kd.projector_rate,
        "adapter": o.latent_projector_rate,
        "club": o.club_rate,
        "energy": o.energy_rate,
    }


def _oal_objective(config: Config) -> str:
    objective = config.method.oal.objective
    if objective != "energy":
        return objective
    return f"energy, {config.outliers.source} outliers"


def _oal_whole_batch(config: Config) -> str:
    objective = config.method.oal.objective
    return "" if objective == "energy" else f"method.oal.objective='{objective}'"


def _by_name(config: Config) -> str:
    return f"method.name='{config.method.name}'"


def _oal_map(config: Config) -> Callable | None:
    return oal.map_outliers if config.method.oal.objective == "energy" else None


def _woods(parts: Parts) -> Method:
    options = parts.options("woods", "outlier_share", "ce_tolerance", "energy_rate")
    return woods.wild_mixture(
        *parts.student,
        epoch_steps=parts.epoch_steps,
        ce_limit=parts.config.method.woods.ce_tolerance * parts.start_loss,
        **options,
    )


def _vos(parts: Parts) -> Method:
    start_step = parts.config.method.vos.start * parts.steps
    options = parts.options("vos", "start", "energy_rate")
    return vos.virtual_outliers(*parts.student, start_step=start_step, **options)


def _npos(parts: Parts) -> Method:
    start_step = parts.config.method.npos.start * parts.steps
    options = parts.options("npos", "start", "discriminator_rate")
    return npos.boundary_outliers(*parts.student, start_step=start_step, **options)


def _projector_rate(config: Config) -> dict[str, float]:
    return {"projector": config.method.kd.projector_rate}


def _images(config: Config) -> tuple[OutlierPool, ...]:
    return (pools.images(config),)


METHODS: dict[str, Recipe] = {
    "ce": Recipe(_cross_entropy),
    "kd": Recipe(_kd, rates=_projector_rate, teacher=True),
    "oal": Recipe(
        _oal,
        _oal_pools,
        _oal_rates,
        teacher=True,
        whole_batch=_oal_whole_batch,
        objective=_oal_objective,
        map_outliers=_oal_map,
    ),
    "pixel": Recipe(
        _pixel, lambda config: (pools.decoded_latents(config),), _projector_rate, teacher=True
    ),
    "um": Recipe(_cross_entropy, whole_batch=_by_name),
    "umap": Recipe(_masked, whole_batch=_by_name),
    "logitnorm": Recipe(
        lambda parts: logitnorm.normalised_cross_entropy(
            *parts.student, **parts.options("logitnorm")
        )
    ),
    "oe": Recipe(
        lambda parts: outlier_exposure.exposure(*parts.student, **parts.options("oe")), _images
    ),
    "energy": Recipe(
        lambda parts: outlier_exposure.energy(*parts.student, **parts.options("energy")), _images
    ),
    "woods": Recipe(
        _woods,
        lambda config: (pools.wild_mixture(config),),
        lambda config: {"energy": config.method.woods.energy_rate},
        reads_start_loss=True,
        label_every=2,
        whole_batch=_by_name,
    ),
    "vos": Recipe(_vos, rates=lambda config: {"energy": config.method.vos.energy_rate}),
    "npos": Recipe(
        _npos,
        rates=lambda config: {"discriminator": config.method.npos.discriminator_rate},
        whole_batch=lambda config: (
            "method.npos.contrastive_weight" if config.method.npos.contrastive_weight else ""
        ),
    ),
}
