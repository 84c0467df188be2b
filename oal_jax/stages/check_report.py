"""`--check`: what a run would do, and everything that is wrong. Trains nothing, writes nothing."""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oal_jax.config import GENERATED, Config, expand, rules
from oal_jax.data import image_files
from oal_jax.data.stored import Source, check_shape, read
from oal_jax.errors import UserError
from oal_jax.runtime import distributed
from oal_jax.stages import check, ready, student, teacher, train
from oal_jax.stages.context import Context
from oal_jax.stages.plan import plan

DECODED_AT_MOST = 5000  # images of a set
_SHOWN = 20  # damaged images of a set that are named
# Multiplications and additions a second of a training on one core, as measured with the embedded
# default (docs/performance.md).
_CORE_FLOPS = 12e9


def run(config: Config, reuse: Sequence[Path] = ()) -> None:
    """Print what a run would do, on stdout, and all problems, on stderr.

    Raises:
      UserError: there are problems; the message has their number.
    """
    problems: list[str] = []
    for line in _lines(config, reuse, problems):
        print(line, flush=True)
    problems = list(dict.fromkeys(problems))
    for line in problems:
        print(f"problem: {line}", file=sys.stderr, flush=True)
    if problems:
        count = image_files.counted(problems, "problem", "problems")
        raise UserError(f"--check: {count}, listed above; nothing was trained")
    print("no problem was found; nothing was trained or written", flush=True)


def _lines(config: Config, reuse: Sequence[Path], problems: list[str]) -> Iterator[str]:
    """The lines of the summary; what is wrong is added to `problems`."""
    wrong = rules.problems(config)
    problems += wrong
    config, chosen = rules.repaired(config), []
    for step in (expand, ready.sized):
        config = _attempt(step, config, problems)
    unnamed = config.data.source == "own" and not config.data.root and not config.smoke
    choice = None if unnamed else _attempt(ready.chosen, config, problems, None)
    if choice is None:
        problems += _missing_files(config)
        return
    config, chosen = choice
    config = ready.shrunk(config)
    problems += [line for line in rules.problems(config) if line not in wrong]
    _attempt(ready.check_method, config, problems)
    yield from chosen
    if reuse_missing := check.missing_directories(reuse):
        problems += reuse_missing
    mesh = _attempt(distributed.make_mesh, config.mesh.model, problems, None)
    if mesh is None:
        return
    context = Context(config, Path(), mesh, jax.random.key(config.seed))
    found = check.problems(context)
    problems += found
    yield from _decoded(context, problems)
    if not found:
        yield from (f"warning: {line}" for line in check.warnings(context))
        yield from _summary(context)


def _attempt(step: Any, argument: Any, problems: list[str], otherwise: Any = ...) -> Any:
    """`step(argument)`; where it raises a `UserError`, the argument, or `otherwise` if given."""
    try:
        return step(argument)
    except UserError as error:
        problems.append(str(error))
        return argument if otherwise is ... else otherwise


def _missing_files(config: Config) -> Iterator[str]:
    files = {
        "student.weights": config.student.weights,
        "teacher.weights": config.teacher.weights,
        "train.start": config.train.start,
    }
    for name, file in files.items():
        if file and file != GENERATED and not Path(file).expanduser().exists():
            yield f"config {name}={file}: there is no such file"


def _decoded(context: Context, problems: list[str]) -> Iterator[str]:
    """Decode the images of all sets, or an evenly spaced sample of large ones."""
    for split, name in check.on_disk(context):
        try:
            source = context.source(split, name)
        except UserError:
            continue  # `check.problems` has it
        count = len(source)
        rows = np.unique(np.linspace(0, count - 1, min(count, DECODED_AT_MOST)).astype(int))
        bad = _undecodable(source, rows.tolist())
        problems += bad[:_SHOWN]
        if len(bad) > _SHOWN:
            problems.append(f"{len(bad) - _SHOWN} more images of {source.name} can't be used")
        part = "all" if len(rows) == count else f"{len(rows)}, evenly spaced, of the"
        yield f"{source.name}: {part} {count} images decoded, {len(bad)} can't be used"


def _undecodable(source: Source, rows: Sequence[int]) -> list[str]:
    """A line for each image that can't be decoded or has another size than the first."""
    image_files.formats()  # loads PIL's plugins before there are threads
    try:
        shape = source.image_shape()
    except UserError as error:
        return [str(error)]

    def problem(row: int) -> str | None:
        try:
            (decoded,) = read(source, [row])
            if decoded.pixels is not None:
                check_shape(source, row, decoded.pixels.shape, shape)
            return None
        except UserError as error:
            return str(error)

    with image_files.quiet(), ThreadPoolExecutor() as threads:
        return [line for line in threads.map(problem, rows) if line]


def _summary(context: Context) -> Iterator[str]:
    """Stages, batches, memory and time."""
    config, info = context.config, context.info
    stages = [stage.name for stage in plan(config)]
    yield f"stages: {', '.join(stages)}; method {config.method.name}"
    steps = train.make_plan(config, info.num_train).steps
    yield (
        f"training: {info.num_train} images of {info.num_classes} classes,"
        f" {' x '.join(map(str, info.image_shape))}; {steps} steps of {config.train.batch_size}"
    )
    size = info.num_train * int(np.prod(info.image_shape))
    where = "on disk" if config.data.stream else "in memory"
    yield f"memory: the training images take {size / 2**20:.0f} MiB, {where}"
    yield expected_time(context, stages)


def expected_time(context: Context, stages: Sequence[str]) -> str:
    """A line on how long the training takes, from the arithmetic of the networks."""
    config, info = context.config, context.info
    if jax.default_backend() != "cpu":
        return "time: not estimated on an accelerator"
    shape, classes = (1, *info.image_shape), info.num_classes
    net = student.network(config, classes)
    epochs, share = config.train.epochs, config.outliers.image_share
    passes = 1 if config.student.weights and config.student.tune == "head" else 3 * epochs
    work = _flops(net, shape) * info.num_train * passes * (1 + share)
    if "teacher" in stages and config.teacher.train and not config.teacher.weights:
        teacher_flops = _flops(teacher.model(config, classes), shape)
        work += teacher_flops * info.num_train * (3 * config.teacher.epochs + epochs)
    seconds = work / (_CORE_FLOPS * (os.cpu_count() or 1))
    rest = ", without the generator's training" if "generator" in stages else ""
    return (
        f"time: about {max(1, round(seconds / 60))} min of training on this machine's"
        f" {os.cpu_count()} cores when they are idle{rest}, and a minute or two for compiling and"
        " for the report"
    )


def _flops(net: Any, shape: tuple[int, ...]) -> float:
    """Floating-point operations of one image's forward pass. Compiles nothing."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(partial(net.init, jax.random.key(0)), images)
    lowered = jax.jit(lambda v, x: net.apply(v, x)).lower(variables, images)
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))
