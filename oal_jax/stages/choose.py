"""What a config leaves open, chosen from the images of a folder (`data.source="own"`).

A field leaves its value open by the value that its declaration names (`chosen` of
`oal_jax.config.options.option`), such as `train.epochs=0`. Every other value stays as it is.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from oal_jax.config import Config
from oal_jax.config.benchmarks import NO_SETS, split_names
from oal_jax.config.options import is_open
from oal_jax.data.own import FolderSummary
from oal_jax.data.stored import MAX_BYTES

# The shortest trainings that give a good classifier of a few hundred images, and the longest.
MIN_STEPS, MAX_STEPS = 600, 100_000
EPOCHS = 30  # between these bounds
HEAD_STEPS = 1000  # of a linear head on the features of a file
FEW_IMAGES = 10  # training images of a class, on average, that are too few without a backbone
_BACKBONE = "the model.safetensors of timm/vit_small_patch16_224.augreg_in21k_ft_in1k"


class Weights(NamedTuple):
    """What a file of `student.weights` says of itself."""

    image_size: int
    channels: int
    architecture: str


def choose(
    config: Config,
    summary: FolderSummary,
    weights: Weights | None = None,
    memory: int = MAX_BYTES,
) -> tuple[Config, list[str]]:
    """The config with a value in every field that it leaves open; and lines that say which.

    Args:
      config: with `data.source="own"`.
      summary: of the folder.
      weights: of the file `student.weights`, if the config names one.
      memory: bytes that images in memory may take.
    """
    counts = {split: int(np.sum(of_class)) for split, of_class in summary.counts.items()}
    examples = min(config.data.train_images or counts["train"], counts["train"])
    classes = len(summary.class_names)
    data = _data(config, summary, examples, weights, memory, sum(counts.values()))
    student = _filled(
        config.student,
        tune="head" if weights and examples < 10_000 and config.method.name == "ce" else "all",
        width=16 if examples < 5_000 else 32 if examples < 50_000 else 64,
        stem=_stem(data.image_size, examples),
    )
    train = _train(config.train, examples, bool(weights), weights is not None and student.tune)
    teacher = _teacher(config, data, train)
    generator = _generator(config.generator, examples)
    smallest = int(np.min(summary.counts["train"]))
    outliers = dataclasses.replace(config.outliers, knn=_knn(config.outliers.knn, smallest))
    chosen = dataclasses.replace(
        config,
        data=data,
        student=student,
        train=train,
        teacher=teacher,
        generator=generator,
        outliers=outliers,
    )
    return chosen, _lines(chosen, summary, counts, examples, weights, classes)


def _filled(section: Any, **values: Any) -> Any:
    """The section with these values in the fields that are open."""
    fields = {f.name: f for f in dataclasses.fields(section)}
    values = {n: v for n, v in values.items() if is_open(fields[n], getattr(section, n))}
    return dataclasses.replace(section, **values)


def _data(config: Config, summary: FolderSummary, examples, weights, memory, images) -> Any:
    data = config.data
    side = data.image_size or (weights.image_size if weights else _side(examples, summary.sizes))
    channels = data.channels or (1 if summary.gray else 3)
    taken = {
        name for group in (data.near, data.validation, data.csid) for name in split_names(group)
    }
    far = data.far or tuple(name for name in summary.ood if name not in taken) or NO_SETS
    data = _filled(data, shift=max(1, side // 16))
    too_large = images * side * side * channels > memory
    return dataclasses.replace(
        data, image_size=side, channels=channels, far=far, stream=data.stream or too_large
    )


def _side(examples: int, sizes: np.ndarray) -> int:
    """Side in pixels for a network from random weights: no larger than most images are."""
    largest = 64 if examples < 5_000 else 96 if examples < 50_000 else 224
    shorter = int(np.median(np.min(sizes, axis=1))) if len(sizes) else largest
    return max(16, min(largest, shorter // 8 * 8))


def _stem(side: int, examples: int) -> str:
    if side >= 48:
        return "imagenet"
    return "cifar" if side <= 32 and examples >= 5_000 else "small"


def _train(train: Any, examples: int, fine_tuned: bool, tune: Any) -> Any:
    batch = train.batch_size or _batch(examples)
    if fine_tuned and tune == "head":
        steps, rate = HEAD_STEPS, 0.1
    elif fine_tuned:
        steps, rate = _between(10 * (examples // batch), 200, MAX_STEPS), 0.01
    else:
        steps, rate = _between(EPOCHS * (examples // batch), MIN_STEPS, MAX_STEPS), 0.05
    epochs = train.epochs or max(1, math.ceil(steps / max(1, examples // batch)))
    return _filled(
        train,
        batch_size=batch,
        epochs=epochs,
        learning_rate=rate,
        checkpoint_every=max(1, epochs // 10),
    )


def _batch(examples: int) -> int:
    """A power of two, at most a fourth of the images where these are few."""
    largest = 32 if examples < 2_000 else 64 if examples < 20_000 else 128
    largest = 256 if examples > 500_000 else largest
    wanted = max(1, min(largest, max(8, examples // 4), examples))
    return 1 << (wanted.bit_length() - 1)


def _between(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def _teacher(config: Config, data: Any, train: Any) -> Any:
    """As long a training as the student's. A given file is run on cached views, if they fit."""
    given = bool(config.teacher.weights)
    return _filled(
        config.teacher,
        patch=max(1, data.image_size // 8),
        epochs=train.epochs,
        batch_size=train.batch_size,
        views=4 if given and not data.stream else 0,
    )


def _generator(generator: Any, examples: int) -> Any:
    vae, diffusion = min(16, _batch(examples)), min(64, _batch(examples))
    return _filled(
        generator,
        vae_batch_size=vae,
        vae_epochs=math.ceil(1500 / max(1, examples // vae)),
        batch_size=diffusion,
        diffusion_epochs=math.ceil(2000 / max(1, examples // diffusion)),
    )


def _knn(knn: Any, smallest: int) -> Any:
    """The proportions of arXiv 2406.16525, for classes of any size."""
    features = knn.features_per_class or max(1, min(500, smallest))
    points = knn.boundary_points or max(1, features // 10)
    return _filled(
        knn,
        features_per_class=features,
        neighbour=max(1, features * 3 // 5),
        boundary_points=points,
        anchors=points,
    )


def _lines(
    config: Config, summary: FolderSummary, counts, examples: int, weights, classes: int
) -> list[str]:
    data, train, student = config.data, config.train, config.student
    heights, widths = summary.sizes[:, 0], summary.sizes[:, 1]
    kind = "grey" if summary.gray else "colour"
    split = ", ".join(f"{count} {name}" for name, count in counts.items())
    ood = ", ".join(f"{name} ({count})" for name, count in summary.ood.items()) or "none"
    skipped = f"; {len(summary.skipped)} files skipped" if summary.skipped else ""
    steps = examples // train.batch_size * train.epochs
    network = (
        f"{student.architecture} {student.depth} of width {student.width}, stem {student.stem}"
    )
    if weights:
        part = "a linear head on its features" if student.tune == "head" else "all of it trained"
        network = f"{weights.architecture} of {student.weights}, {part} (student.tune)"
    channels = "grey" if data.channels == 1 else "colour"
    mirrored = "mirrored too" if data.flip else "not mirrored"
    views = f"shifts up to {data.shift} px, {mirrored}"
    if weights and student.tune == "head":
        views = "not augmented"
    where = "read from disk in every epoch" if data.stream else "in memory"
    lines = [
        f"images: {classes} classes, {sum(counts.values())} {kind} images ({split}) of"
        f" {widths.min()} x {heights.min()} to {widths.max()} x {heights.max()} pixels; OOD sets:"
        f" {ood}{skipped}",
        f"chosen: {data.image_size} x {data.image_size} pixels, {channels}, {where}; {views}"
        " (data.image_size, channels, shift, flip)",
        f"chosen: {network}; batches of {train.batch_size}, {train.epochs} epochs = {steps} steps,"
        f" rate {train.learning_rate:g} (train.batch_size, epochs, learning_rate)",
    ]
    if config.method.name != "ce":
        lines.append(_method_line(config))
    if not weights and examples < classes * FEW_IMAGES:
        lines.append(
            f"warning: {examples / classes:.1f} training images a class are too few for a network"
            f" from random weights; give a pretrained one: --config.student.weights=FILE, such as"
            f" {_BACKBONE} (docs/data.md)"
        )
    return lines


def _method_line(config: Config) -> str:
    """What a method needs beside the student, and where it comes from."""
    from oal_jax.stages.plan import plan

    stages = {stage.name for stage in plan(config)}
    parts = [f"method {config.method.name}"]
    if "teacher" in stages:
        weights = config.teacher.weights
        parts.append(
            f"teacher {f'from {weights}' if weights else 'trained first, as long as the student'}"
        )
    if stages & {"outliers", "latents"} or config.method.name == "oal":
        parts.append(f"outliers.source={config.outliers.source}")
    if "generator" in stages:
        directory = config.generator.directory
        how = f"from {directory}" if directory else "trained for these images"
        parts.append(f"a Stable Diffusion {how}")
    elif config.method.name == "oal":
        parts.append("no generator is needed")
    return "; ".join(parts)
