"""What can be known before work starts: the config's files and images, against each other.

Every run passes `require`, which decodes no image; `oal_jax.stages.check_report` adds more.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from oal_jax.config import DECODED, GENERATED, PROCEDURAL, Config
from oal_jax.config.benchmarks import MADE
from oal_jax.data import corruptions
from oal_jax.data.stored import MAX_BYTES, Source
from oal_jax.errors import UserError
from oal_jax.evaluation.headline import FEW_STEPS
from oal_jax.methods import registry
from oal_jax.stages import generator, teacher, train
from oal_jax.stages.context import Context
from oal_jax.stages.plan import plan

_SPLITS = ("train", "validation", "test")


def require(context: Context, reuse: Sequence[Path] = ()) -> None:
    """Print warnings; raise one `UserError` with all that stands in the way of a run."""
    lines = problems(context, reuse)
    if lines:
        raise UserError("; ".join(lines))
    for line in warnings(context):
        print(f"warning: {line}", flush=True)


def problems(context: Context, reuse: Sequence[Path] = ()) -> list[str]:
    """A line for each thing that stands in the way of a run. Decodes no image."""
    checks = (_sets, _sizes, _outliers, _start, _teacher, _generator)
    lines = [line for check in checks for line in _collected(partial(check, context))]
    return list(dict.fromkeys([*lines, *missing_directories(reuse)]))


def missing_directories(reuse: Sequence[Path]) -> list[str]:
    """A line for each directory of `--reuse` that does not exist."""
    return [f"--reuse {path}: there is no such directory" for path in reuse if not path.is_dir()]


def _collected(check: Callable[[], Iterator[str]]) -> list[str]:
    lines = []
    try:
        for line in check():
            lines.append(line)
    except UserError as error:  # of a function that checks for itself
        lines.append(str(error))
    return lines


def on_disk(context: Context) -> list[tuple[str, str]]:
    """(split, set) of all image sets of the run that are files; "" is the ID set."""
    if context.config.data.source == GENERATED:
        return []
    benchmark = context.benchmark
    sets = [(split, "") for split in _SPLITS]
    sets += [("test", name) for name in (*benchmark.near, *benchmark.far, *benchmark.csid)]
    sets += [("validation", name) for name in benchmark.validation]
    made = {*MADE, *corruptions.SETS}
    return [(split, name) for split, name in sets if name not in made]


def _sets(context: Context) -> Iterator[str]:
    for split, name in on_disk(context):
        try:
            source = context.source(split, name)
        except UserError as error:
            yield str(error)
            continue
        if not name and split == "train":
            labels = np.bincount(source.labels(), minlength=len(source.class_names))
            empty = [n for n, count in zip(source.class_names, labels, strict=True) if not count]
            if empty:
                yield f"{source.name}: no image of {len(empty)} classes, such as '{empty[0]}'"
            if len(source.class_names) < 2:
                yield f"{source.name} has one class, '{source.class_names[0]}'; two are needed"
            yield from _memory(context, source)
        elif not len(source):
            yield f"{source.name} has no image"


def _memory(context: Context, source: Source) -> Iterator[str]:
    size = len(source) * int(np.prod(source.image_shape()))
    if size > MAX_BYTES and not context.config.data.stream:
        yield (
            f"the {len(source)} images of {source.name} take {size / 2**30:.1f} GiB; sets are held"
            f" in memory up to {MAX_BYTES / 2**30:.0f} GiB: set data.stream=True, or lower"
            " data.train_images or data.image_size"
        )


def _sizes(context: Context) -> Iterator[str]:
    """Batches against the images, the devices and the microbatches."""
    config, examples = context.config, _examples(context)
    stages = {stage.name for stage in plan(config)}
    batches = {"train.batch_size": config.train.batch_size}
    if "teacher" in stages and config.teacher.train:
        batches["teacher.batch_size"] = config.teacher.batch_size
    if "generator" in stages and config.generator.train and not config.generator.directory:
        batches["generator.batch_size"] = config.generator.batch_size
        batches["generator.vae_batch_size"] = config.generator.vae_batch_size
    for name, size in batches.items():
        if size > examples:
            yield (
                f"config {name}={size} is more than the {examples} training images; set it to at"
                f" most {examples}"
            )
    train.check_batches(config, context.mesh)


def _examples(context: Context) -> int:
    """Training images whose labels the student sees."""
    return -(-context.info.num_train // registry.recipe_of(context.config).label_every)


def _outliers(context: Context) -> Iterator[str]:
    config = context.config
    stages = {stage.name for stage in plan(config)}
    data, knn = config.data, config.outliers.knn
    if data.source == GENERATED:
        return
    if "outliers" in stages:
        train_images = context.source("train", limit=data.train_images)
        smallest = int(np.bincount(train_images.labels()).min())
        if smallest < knn.features_per_class:
            yield (
                f"config outliers.knn.features_per_class={knn.features_per_class}: a class of"
                f" {context.benchmark.id_set} has {smallest} training images; lower it to that"
            )
    name = config.method.name
    if name in ("vos", "npos"):
        train_images = context.source("train", limit=data.train_images)
        smallest = int(np.bincount(train_images.labels()).min())
        size = getattr(config.method, name).queue_size
        steps = train.make_plan(config, _examples(context)).steps
        if size > smallest * max(1, config.train.epochs) or steps * config.train.batch_size < size:
            yield (
                f"config method.{name}.queue_size={size}: the smallest class has {smallest}"
                f" training images in each of {config.train.epochs} epochs, so its queue never"
                " fills and the loss never begins; lower it"
            )
    reads_images = any(pool.name in ("outlier_image", "wild_image") for pool in _pools(config))
    if reads_images and config.outliers.images not in (PROCEDURAL, DECODED, *MADE):
        try:
            context.source("train", config.outliers.images)
        except UserError as error:
            yield f"config outliers.images='{config.outliers.images}': {error}"


def _pools(config: Config):
    return registry.recipe_of(config).pools(config)


def _start(context: Context) -> Iterator[str]:
    if context.config.train.start:
        train.check_start(context.config, context.info.class_names)
    yield from ()


def _teacher(context: Context) -> Iterator[str]:
    weights = context.config.teacher.weights
    missing = weights not in ("", GENERATED) and not Path(weights).expanduser().is_file()
    # `ready.sized` names a file that is missing.
    if "teacher" in {stage.name for stage in plan(context.config)} and not missing:
        teacher.check(context)
    yield from ()


def _generator(context: Context) -> Iterator[str]:
    if "generator" in {stage.name for stage in plan(context.config)}:
        generator.check(context)
    yield from ()


def warnings(context: Context) -> Iterator[str]:
    """Lines on what does not stop a run, but will disappoint."""
    config = context.config
    steps = train.make_plan(config, _examples(context)).steps
    if steps < FEW_STEPS and not config.smoke:
        yield (
            f"{steps} optimizer steps ({context.info.num_train} images, batches of"
            f" {config.train.batch_size}, {config.train.epochs} epochs) train a poor classifier;"
            " raise train.epochs or lower train.batch_size"
        )
