"""The dataclasses of a config: one field a line, each with what it means; validation."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from oal_jax.errors import UserError


@dataclass
class Data:
    """What is in-distribution, and what the detector is tested on."""

    source: str = "bundled"  # "bundled": inside the package; "tfds": a prepared TFDS directory
    root: str = ""  # directory of the prepared sets; empty: TFDS's own default
    id_set: str = "fashion"  # its benchmark names the near-, far- and validation OOD sets
    train_images: int = 0  # ID train images the student uses; 0: all of the split "train"
    shift: int = 2  # augmentation: random shift by up to this many pixels, zeros padded
    flip: bool = True  # augmentation: random horizontal flip


@dataclass
class Teacher:
    """The frozen Vision Transformer."""

    train: bool = False  # False: the weights that ship with the package; True: train them anew
    patch: int = 4  # pixels
    width: int = 128  # of a token, and so of a feature
    depth: int = 4  # blocks
    heads: int = 4
    mlp_ratio: float = 2.0
    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 1e-3  # peak of a one-cycle schedule, AdamW
    weight_decay: float = 0.05
    views: int = 4  # cached augmented views an image; 0: run the teacher anew in every step


@dataclass
class Knn:
    """Boundary sampling around each class in the teacher's feature space (after NPOS)."""

    features_per_class: int = 500  # ID features that stand for a class, first in data order
    neighbour: int = 300  # K: distance to the K-th nearest, the point itself counted
    boundary: int = 50  # points of a class with the largest such distance
    anchors: int = 50  # of these, how many are perturbed a repeat
    sigma: float = 0.07  # standard deviation of the Gaussian noise, a coordinate
    noise_rows: int = 1500  # noise vectors a repeat, shared by its anchors
    keep: int = 2  # perturbed points kept an anchor
    repeats: int = 10
    selection: str = "top"  # "top": the furthest of each anchor; "reference": the row mix-up
    scale_by_token: bool = True  # multiply by the norm of the class's token embedding


@dataclass
class Outliers:
    """Which outliers the method trains on."""

    # Of method.micl=energy: knn, diffusion (k-NN, and latents sampled from them), random (isotropic
    # directions, N(0, 1) latents), mixed (half and half), none. The other methods that use
    # outliers take the k-NN ones and their latents.
    source: str = "random"
    knn: Knn = field(default_factory=Knn)


@dataclass
class Generator:
    """The small Stable Diffusion."""

    train: bool = False  # False: the weights that ship with the package; True: train them anew
    directory: str = ""  # a diffusers directory to use instead of either
    vae_epochs: int = 1
    vae_batch_size: int = 16  # small: the autoencoder needs many steps more than large batches
    diffusion_epochs: int = 8
    batch_size: int = 128  # of the diffusion


@dataclass
class Latents:
    """How outliers are sampled as latents."""

    per_class: int = 200  # latents a class, evenly
    sampler: str = "dpm_solver_pp_2m"  # or pndm (as the paper), ddim
    steps: int = 20
    guidance: float = 2.0  # classifier-free guidance scale; 1: none
    injection: str = "all_pieces"  # or first_piece: only the first BPE piece, as the reference
    reduction: str = "channel_height_mean"  # of a latent, for the CLUB term
    chunk: int = 200  # latents sampled at once: bounds the memory
    pictures: int = 8  # latents a class that are decoded for the report (and all for `pixel`)


@dataclass
class Method:
    """What the student is trained with."""

    name: str = "oal"  # ce, kd, oal, pixel
    micl: str = "energy"  # of oal: energy (default), reference (CLUB as shipped), alternate
    logit_kd: float = 4.0  # weight of KL(teacher logits || student logits)
    feature_kd: float = 8.0  # weight of KL(DT(teacher features) || student features)
    knn_club: float = 0.1  # weight of CLUB on k-NN outliers
    latent_club: float = 0.2  # weight of CLUB on latents
    energy: float = 0.1  # weight of the energy loss on mapped outliers
    adapter: float = 0.05  # weight of the adapter's regression on ID pairs
    ramp_start: float = 0.19  # fraction of training at which the energy loss begins
    ramp_end: float = 0.31  # ... and at which it has its full weight
    outlier_batch: int = 0  # outliers a step; 0: as many as ID images
    pixel: float = 0.5  # weight of outlier exposure on decoded latents


@dataclass
class Student:
    """The ResNet that is trained, and kept."""

    depth: int = 18
    width: int = 16  # channels of the first stage
    stem: str = "small"  # small (3 x 3, stride 2), cifar (3 x 3), imagenet (7 x 7, pool)


@dataclass
class Train:
    """Optimizer, schedule and loop of the student."""

    start: str = ""  # directory of a finished run: its student is the start, not fresh weights
    epochs: int = 6
    batch_size: int = 128  # over all devices
    learning_rate: float = 0.1  # peak, of the student
    projector_rate: float = 0.1  # of DT
    adapter_rate: float = 0.02  # of the latent adapter
    club_rate: float = 1e-4  # of the CLUB networks
    energy_rate: float = 0.1  # of the energy loss's scale and offset
    momentum: float = 0.9  # Nesterov
    weight_decay: float = 5e-4  # on every tensor, as the reference
    warmup: float = 0.15  # fraction of the steps of linear warm-up
    floor: float = 2e-6  # last multiplier of the cosine schedule
    clip: float = 1.0  # global norm of the gradient; 0: none
    log_every: int = 20  # steps
    checkpoint_every: int = 1  # epochs


@dataclass
class Evaluation:
    """Which scores are computed."""

    scores: tuple[str, ...] = ("energy", "msp", "max_logit", "knn", "mahalanobis")
    batch_size: int = 500
    keep_id: float = 0.95  # share of ID validation images that the threshold keeps


@dataclass
class Config:
    """One experiment, whole."""

    seed: int = 0
    smoke: bool = False  # shrink every stage to seconds
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    generator: Generator = field(default_factory=Generator)
    outliers: Outliers = field(default_factory=Outliers)
    latents: Latents = field(default_factory=Latents)
    method: Method = field(default_factory=Method)
    student: Student = field(default_factory=Student)
    train: Train = field(default_factory=Train)
    evaluation: Evaluation = field(default_factory=Evaluation)


CHOICES: dict[str, tuple[str, ...]] = {
    "data.source": ("bundled", "tfds"),
    "outliers.source": ("knn", "diffusion", "random", "mixed", "none"),
    "outliers.knn.selection": ("top", "reference"),
    "latents.sampler": ("pndm", "ddim", "dpm_solver_pp_2m"),
    "latents.injection": ("first_piece", "all_pieces"),
    "latents.reduction": ("channel_height_mean", "flatten"),
    "method.name": ("ce", "kd", "oal", "pixel"),
    "method.micl": ("energy", "reference", "alternate"),
    "student.stem": ("small", "cifar", "imagenet"),
    "evaluation.scores": ("energy", "msp", "max_logit", "knn", "mahalanobis"),
}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dataclass tree to {"a.b": value}; tuples become lists, as in JSON."""
    flat = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(flat: dict[str, Any]) -> Config:
    """The config of {"a.b": value}; fields that it does not name keep their defaults."""
    config = Config()
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent, None)
        if node is None or not hasattr(node, name):
            raise UserError(unknown_key(path))
        setattr(node, name, tuple(value) if isinstance(value, list) else value)
    return config


def unknown_key(path: str) -> str:
    """The line for a key that no config has: names the nearest one."""
    keys = list(flatten(Config()))
    near = difflib.get_close_matches(path, keys, n=1, cutoff=0.0)
    return f"config key '{path}' is unknown; nearest: '{near[0]}'"


def validate(config: Config) -> None:
    """Raise `UserError` for a key that no config has, and for a value that no stage could use."""
    _check_fields(config, Config(), "")
    flat = flatten(config)
    for path, choices in CHOICES.items():
        for value in flat[path] if isinstance(flat[path], list) else [flat[path]]:
            if value not in choices:
                near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)
                raise UserError(
                    f"config {path}='{value}' is not one of {', '.join(choices)};"
                    f" nearest: '{near[0]}'"
                )
    if config.student.depth not in (18, 34, 50):
        raise UserError(f"config student.depth={config.student.depth} is not one of 18, 34, 50")
    if not config.evaluation.scores:
        raise UserError("config evaluation.scores is empty; give at least one score")
    knn = config.outliers.knn
    if not 1 <= knn.neighbour <= knn.features_per_class:
        raise UserError(
            f"config outliers.knn.neighbour={knn.neighbour} must lie in"
            f" 1..outliers.knn.features_per_class={knn.features_per_class}"
        )
    if not 1 <= knn.anchors <= knn.boundary <= knn.features_per_class:
        raise UserError(
            "config outliers.knn wants anchors <= boundary <= features_per_class, has"
            f" {knn.anchors}, {knn.boundary}, {knn.features_per_class}"
        )
    if not 1 <= knn.keep <= knn.noise_rows:
        raise UserError(
            f"config outliers.knn.keep={knn.keep} must lie in 1..noise_rows={knn.noise_rows}"
        )
    for paths, wanted, right in _RANGES:
        for path in paths:
            if not right(flat[path]):
                raise UserError(f"config {path}={flat[path]} must {wanted}")
    if config.teacher.width % config.teacher.heads:
        raise UserError(
            f"config teacher.width={config.teacher.width} is not divisible by"
            f" teacher.heads={config.teacher.heads}"
        )


def _check_fields(node: Any, default: Any, prefix: str) -> None:
    """A config file is code: it can set fields that don't exist, and values of any type."""
    if type(node) is not type(default):
        have, wanted = type(node).__name__, type(default).__name__
        raise UserError(f"config {prefix.rstrip('.')} must be a {wanted}, is a {have}")
    fields = [f.name for f in dataclasses.fields(default)]
    for name in vars(node):
        if name not in fields:
            raise UserError(unknown_key(prefix + name))
    for name in fields:
        value, usual = getattr(node, name), getattr(default, name)
        if dataclasses.is_dataclass(usual):
            _check_fields(value, usual, f"{prefix}{name}.")
        elif not _fits(value, usual):
            raise UserError(
                f"config key '{prefix}{name}' wants a value of type {type(usual).__name__},"
                f" got {value!r}"
            )


def _fits(value: Any, usual: Any) -> bool:
    if isinstance(usual, float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(usual, tuple):
        return isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)
    return type(value) is type(usual)


# Keys, what they must be, and the test of it.
_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        (
            *("train.epochs", "train.batch_size", "train.learning_rate"),
            *("train.log_every", "train.checkpoint_every"),
            *("teacher.epochs", "teacher.batch_size", "teacher.learning_rate"),
            *("teacher.patch", "teacher.width", "teacher.depth", "teacher.heads"),
            *(
                "generator.vae_epochs",
                "generator.diffusion_epochs",
                "generator.batch_size",
                "generator.vae_batch_size",
            ),
            *("latents.per_class", "latents.steps", "latents.chunk"),
            *("evaluation.batch_size", "outliers.knn.repeats", "student.width"),
        ),
        "be greater than 0",
        lambda value: value > 0,
    ),
    (
        (
            *("data.train_images", "data.shift", "teacher.views", "outliers.knn.sigma"),
            *("latents.pictures", "method.outlier_batch", "train.clip", "train.weight_decay"),
        ),
        "be 0 or greater",
        lambda value: value >= 0,
    ),
    (("evaluation.keep_id",), "lie between 0 and 1", lambda value: 0 < value < 1),
    (
        ("train.warmup", "train.floor", "train.momentum", "method.ramp_start", "method.ramp_end"),
        "lie in 0..1",
        lambda value: 0 <= value <= 1,
    ),
)


def shrink(config: Config) -> Config:
    """The same pipeline on tiny sizes: what `smoke` asks for. Every stage runs."""
    replace = dataclasses.replace
    knn = replace(
        config.outliers.knn,
        features_per_class=32,
        neighbour=20,
        boundary=8,
        anchors=8,
        noise_rows=32,
        repeats=1,
    )
    return replace(
        config,
        data=replace(config.data, train_images=512),
        teacher=replace(config.teacher, epochs=1, views=min(config.teacher.views, 1)),
        generator=replace(config.generator, vae_epochs=1, diffusion_epochs=1),
        outliers=replace(config.outliers, knn=knn),
        latents=replace(config.latents, per_class=4, steps=4, chunk=32, pictures=4),
        student=replace(config.student, width=8),
        train=replace(config.train, epochs=1, log_every=1),
    )
