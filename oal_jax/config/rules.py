"""What a config may hold: `validate` tells a mistake in one line before anything runs."""

import dataclasses
import difflib
import math
from typing import Any

from oal_jax.config import (
    DECODED,
    Config,
    Latents,
    Outliers,
    Student,
    flatten,
    guided,
    hub_names,
    sees_images,
    selected,
    stages_before,
    unknown_key,
)
from oal_jax.config.benchmarks import resolve, split_names
from oal_jax.config.ranges import CHOICES, RANGES
from oal_jax.errors import UserError

STREAMED = ("tfds", "imglist", "folder")  # values of data.source
_FINE_TUNINGS = ("um", "umap", "woods")  # methods that are nothing without a start


def validate(config: Config) -> None:
    """Raise `UserError` for a key that no config has, and for a value that no stage could use."""
    _check_fields(config, Config(), "")
    flat = flatten(config)
    for path, choices in CHOICES.items():
        for value in flat[path] if isinstance(flat[path], list) else [flat[path]]:
            if value not in choices:
                near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)
                known = f"one of {', '.join(choices)}" if len(choices) < 20 else "known"
                raise UserError(f"config {path}='{value}' is not {known}; nearest: '{near[0]}'")
    data = config.data
    resolve(data.id_set, data.near, data.far, data.validation, data.csid, data.leave_out)
    _check_splits(config)
    if data.source in ("imglist", "folder") and not data.root and not config.smoke:
        raise UserError(
            f"config data.root is empty; data.source={data.source} wants the directory of the sets"
        )
    hub_names.parse(config.generator.directory)
    _check_student(config.student)
    stage = config.method.latent_stage
    if stage not in range(4) or (stage and config.student.architecture != "resnet"):
        raise UserError(
            f"config method.latent_stage={stage} must be 0, or a stage of a resnet, 1 to 3"
            f" (student.architecture='{config.student.architecture}')"
        )
    _check_unleashed(config)
    _check_outliers(config)
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
    if config.outliers.lazy and not knn.sigma:
        raise UserError("config outliers.lazy=True wants outliers.knn.sigma greater than 0")
    if not 1 <= knn.keep <= knn.noise_rows:
        raise UserError(
            f"config outliers.knn.keep={knn.keep} must lie in 1..noise_rows={knn.noise_rows}"
        )
    for paths, wanted, right in RANGES:
        for path in paths:
            if not right(flat[path]):
                raise UserError(f"config {path}={flat[path]} must {wanted}")
    _check_crossing(config.outliers)
    _check_latents(config.latents)
    _check_accumulated(config)
    _check_streamed(config)
    if config.teacher.alignment and not config.teacher.train:
        raise UserError(
            f"config teacher.alignment={config.teacher.alignment} is of the teacher's training; set"
            " teacher.train=True, or it to 0"
        )
    share, given = config.generator.feature_share, config.generator.directory
    if share and (config.teacher.alignment or given or not config.generator.train):
        raise UserError(
            f"config generator.feature_share={share} is of the generator's training, on features of"
            " a teacher that is there before it; set generator.train=True, teacher.alignment=0 and"
            " no generator.directory"
        )
    if config.teacher.width % config.teacher.heads:
        raise UserError(
            f"config teacher.width={config.teacher.width} is not divisible by"
            f" teacher.heads={config.teacher.heads}"
        )


def _check_splits(config: Config) -> None:
    data, splits = config.data, split_names(config.data.id_splits)
    if splits and (len(splits) != 3 or data.source != "tfds"):
        raise UserError(
            f"config data.id_splits={','.join(splits)} must be the names of three splits, for"
            " training, validation and test, of data.source='tfds'"
        )


def _check_streamed(config: Config) -> None:
    """What a stream can't do: it has no arrays of the whole ID set."""
    data, method = config.data, config.method
    if not data.stream:
        return
    if data.source not in STREAMED:
        raise UserError(
            f"config data.stream=True: the sets of data.source='{data.source}' are held in memory;"
            f" it is for {', '.join(STREAMED)}"
        )
    stages = stages_before(config)
    if "features" in stages and config.teacher.views:
        raise UserError(
            f"config teacher.views={config.teacher.views} keeps the teacher's outputs of every"
            " training image; with data.stream=True it must be 0"
        )
    if "generator" in stages and config.generator.train and not config.generator.directory:
        raise UserError(
            "config generator.train=True holds the training images in memory; with data.stream=True"
            " give a generator.directory"
        )
    if method.name == "woods":
        raise UserError(
            "config method.name='woods' divides a set in memory; with data.stream=True choose"
            " another, such as 'energy'"
        )
    paired = method.name == "oal" and method.micl == "energy"
    paired = paired and config.outliers.source not in ("knn", "none")
    from_id = "latents" in stages and config.latents.kind in ("noised", "partial", "mixture")
    if (paired or from_id or "adapter" in stages) and data.on_corrupt == "skip":
        who = "method.name='oal'" if paired else "what is asked of latents"
        raise UserError(
            f"config data.on_corrupt='skip' leaves images without latents, which {who}"
            " pairs with them by number; with data.stream=True set it to 'error'"
        )


def _check_crossing(outliers: Outliers) -> None:
    crossing, most = outliers.crossing, outliers.knn.features_per_class
    if outliers.boundary != "crossing":
        return
    if outliers.lazy:
        raise UserError(
            "config outliers.lazy=True is of outliers.boundary='knn'; set it to False: those of"
            " 'crossing' are few"
        )
    if crossing.points > most:
        raise UserError(
            f"config outliers.crossing.points={crossing.points} must be at most"
            f" outliers.knn.features_per_class={most}"
        )


def _check_latents(latents: Latents) -> None:
    guide, select = latents.guide, latents.select
    if guided(latents):
        if latents.kind == "noised":
            raise UserError(
                f"config latents.guide.by='{guide.by}' steers a sampler, latents.kind='noised' has"
                " none; set one of them to another value"
            )
        if guide.start >= guide.end:
            raise UserError(
                f"config latents.guide.start={guide.start} must be less than"
                f" latents.guide.end={guide.end}"
            )
    if selected(latents) and select.oversample == 1:
        raise UserError(
            "config latents.select chooses among more latents than are kept; set"
            " latents.select.oversample above 1, for example 2"
        )
    if not selected(latents) and select.oversample > 1:
        raise UserError(
            f"config latents.select.oversample={select.oversample} samples more than is kept and"
            " nothing chooses; set latents.select.max_msp, max_energy_percentile or diverse"
        )


def _check_student(student: Student) -> None:
    if student.architecture == "resnet":
        if student.depth not in (18, 34, 50):
            raise UserError(f"config student.depth={student.depth} is not one of 18, 34, 50")
        if student.dropout:
            raise UserError(
                f"config student.dropout={student.dropout} has no place in a resnet; set it to 0,"
                " or student.architecture to densenet or wide_resnet"
            )
    elif student.depth < 10 or student.depth % 6 != 4:
        raise UserError(
            f"config student.depth={student.depth} of a {student.architecture} must be 6 n + 4,"
            " such as 10, 16, 40 or 100"
        )


def _check_accumulated(config: Config) -> None:
    """Microbatches are even, and the loss is one that they add up to (see training/state.py)."""
    count, m = config.train.accumulate, config.method
    if count == 1:
        return
    sizes = {"train.batch_size": config.train.batch_size, "method.outlier_batch": m.outlier_batch}
    for path, size in sizes.items():
        if size % count:
            raise UserError(
                f"config {path}={size} is not divisible by train.accumulate={count};"
                f" use for example {max(1, size // count) * count}"
            )
    drawn = m.outlier_batch or config.train.batch_size
    if m.name == "oal" and config.outliers.source == "half_random" and drawn % (2 * count):
        raise UserError(
            f"config outliers.source='half_random' halves the {drawn} outliers of a step, and"
            f" train.accumulate={count} does not divide that; set method.outlier_batch to a"
            f" multiple of {2 * count}"
        )
    whole = {
        "method.name='doe'": m.name == "doe",  # the square of a mean's slope, then another pass
        f"method.micl='{m.micl}'": m.name == "oal" and m.micl != "energy",  # all pairs of rows
        "method.virtual.contrastive": m.name == "npos" and m.virtual.contrastive > 0,  # likewise
    }
    for name in (name for name, asked in whole.items() if asked):
        raise UserError(
            f"config {name} needs the whole batch at once: train.accumulate={count} must be 1"
        )


def _check_unleashed(config: Config) -> None:
    m = config.method
    if m.constraint < 0 and m.constraint != -1:
        raise UserError(
            f"config method.constraint={m.constraint} must be 0 or greater, or -1 to be estimated"
        )
    tuned = m.name in _FINE_TUNINGS
    if not config.train.start and (tuned or (m.um and m.constraint < 0)):
        what = f"method.name='{m.name}'" if tuned else "method.um=True"
        raise UserError(
            f"config {what} goes on from a trained model: give train.start, the directory of a"
            " finished run, for example one of method.name='ce'"
        )


def _check_outliers(config: Config) -> None:
    m, images = config.method, config.outliers.images
    drawn = m.outlier_batch or config.train.batch_size
    if config.outliers.source == "half_random":
        drawn -= drawn // 2
    if m.name == "oal" and m.adapt.of > 1 and drawn % (m.adapt.of * config.train.accumulate):
        raise UserError(
            f"config method.adapt.of={m.adapt.of} must divide the {drawn} latent outliers of a"
            f" step, in each of its train.accumulate={config.train.accumulate} parts"
        )
    if sees_images(config) and images not in DECODED:
        d = config.data
        benchmark = resolve(d.id_set, d.near, d.far, d.validation, d.csid, d.leave_out)
        for group, names in benchmark._asdict().items():
            if images == names or (group != "id_set" and images in names):
                raise UserError(
                    f"config outliers.images='{images}' is the {group} set of the benchmark; train"
                    " on other images, such as 'procedural'"
                )
    v = m.virtual
    for small, large in (
        ("neighbour", "queue"),
        ("boundary", "queue"),
        ("anchors", "boundary"),
        ("npos_keep", "candidates"),
        ("keep", "samples"),
    ):
        if getattr(v, small) > getattr(v, large):
            raise UserError(
                f"config method.virtual.{small}={getattr(v, small)} must be at most"
                f" method.virtual.{large}={getattr(v, large)}"
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
