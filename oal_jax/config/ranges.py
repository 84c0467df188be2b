"""The values that single fields of a config may have."""

from collections.abc import Callable
from typing import Any

from oal_jax.config import METHOD_STAGES, SCORES

# Key to its values.
CHOICES: dict[str, tuple[str, ...]] = {
    "data.source": ("bundled", "tfds", "imglist", "folder", "generated"),
    "data.on_corrupt": ("error", "skip"),
    "outliers.source": (
        *("knn", "diffusion", "random", "mixed", "none"),
        *("latents", "latents_mixed", "half_random"),
    ),
    "outliers.boundary": ("knn", "crossing"),
    "adapter.architecture": ("conv", "residual"),
    "latents.kind": ("outliers", "class", "noised", "partial", "mixture"),
    "latents.interpolation": ("spherical", "linear"),
    "latents.guide.by": ("none", "energy", "knn", "both"),
    "outliers.knn.selection": ("top", "reference"),
    "outliers.knn.token": ("input_table", "hidden_mean"),
    "generator.dtype": ("float32", "bfloat16"),
    "latents.sampler": ("pndm", "ddim", "dpm_solver_pp_2m"),
    "latents.injection": ("first_piece", "all_pieces"),
    "latents.reduction": ("channel_height_mean", "flatten"),
    "method.name": tuple(METHOD_STAGES),
    "method.micl": ("energy", "reference", "alternate"),
    "student.architecture": ("resnet", "densenet", "wide_resnet"),
    "student.stem": ("small", "cifar", "imagenet"),
    "student.dtype": ("float32", "bfloat16"),
    "teacher.dtype": ("float32", "bfloat16"),
    "train.schedule": ("per_step", "per_epoch"),
    "evaluation.scores": SCORES,
}

# Keys, what they must be, and the test of it.
RANGES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        (
            *("train.epochs", "train.batch_size", "train.learning_rate", "mesh.model"),
            *("train.log_every", "train.checkpoint_every"),
            *("teacher.epochs", "teacher.batch_size", "teacher.learning_rate"),
            *("teacher.patch", "teacher.width", "teacher.depth", "teacher.heads"),
            *("teacher.body_rate", "teacher.head_rate", "train.accumulate"),
            *(
                "generator.vae_epochs",
                "generator.diffusion_epochs",
                "generator.batch_size",
                "generator.vae_batch_size",
            ),
            *("latents.per_class", "latents.steps", "latents.chunk", "latents.guide.neighbour"),
            *("outliers.crossing.points", "outliers.crossing.step", "adapter.epochs"),
            *("adapter.batch_size", "adapter.learning_rate", "adapter.bank"),
            *("evaluation.batch_size", "outliers.knn.repeats", "student.width"),
            *("method.beta", "method.n_masks", "method.logit_temperature"),
            *("method.exposure.poem_ratio", "method.exposure.poem_buffer"),
            *("method.exposure.poem_refresh", "method.virtual.refresh", "method.virtual.queue"),
            *("method.virtual.samples", "method.virtual.keep", "method.virtual.neighbour"),
            *("method.virtual.anchors", "method.virtual.npos_keep", "method.wild.ce_tolerance"),
            *("method.wild.penalty_growth", "method.adapt.of"),
        ),
        "be greater than 0",
        lambda value: value > 0,
    ),
    (
        (
            *("data.train_images", "data.shift", "data.image_size", "data.workers"),
            *("teacher.views", "teacher.image_size", "teacher.alignment", "outliers.knn.sigma"),
            *("latents.pictures", "method.outlier_batch", "train.clip", "train.weight_decay"),
            *("train.keep_checkpoints", "outliers.crossing.steps_after", "latents.noise"),
            *("latents.guide.strength", "adapter.images", "adapter.noise", "method.adapt.steps"),
        ),
        "be 0 or greater",
        lambda value: value >= 0,
    ),
    (
        ("evaluation.keep_id", "latents.partial"),
        "lie between 0 and 1",
        lambda value: 0 < value < 1,
    ),
    (("latents.select.oversample",), "be 1 or greater", lambda value: value >= 1),
    (
        ("latents.select.max_energy_percentile",),
        "lie in 0..100",
        lambda value: 0 <= value <= 100,
    ),
    (
        ("adapter.hidden",),
        "be a multiple of 16, greater than 0",
        lambda value: value > 0 and value % 16 == 0,
    ),
    (
        ("method.estimate_keep", "method.mask_keep", "latents.select.max_msp"),
        "be greater than 0 and at most 1",
        lambda value: 0 < value <= 1,
    ),
    (
        (
            *("method.exposure.doe_start", "method.virtual.start"),
            *("latents.guide.start", "latents.guide.end"),
            *("method.wild.share", "method.wild.id_limit", "outliers.image_share"),
            "generator.feature_share",
        ),
        "lie in 0..1",
        lambda value: 0 <= value <= 1,
    ),
    (
        ("student.dropout", "train.ema"),
        "be 0 or greater, and less than 1",
        lambda value: 0 <= value < 1,
    ),
    (("stages_seed",), "be -1 or greater", lambda value: value >= -1),
    (
        ("train.warmup", "train.floor", "train.momentum", "method.ramp_start", "method.ramp_end"),
        "lie in 0..1",
        lambda value: 0 <= value <= 1,
    ),
)
