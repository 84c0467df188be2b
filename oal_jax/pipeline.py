"""The stages in order: which a config needs, what each depends on, which are done already."""

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax

from oal_jax import artifacts, distributed
from oal_jax.config import Config, flatten, shrink, unflatten, validate
from oal_jax.errors import UserError
from oal_jax.stages.context import Context


class Stage(NamedTuple):
    """A stage reruns when a config value it reads or a file it reads has changed."""

    name: str
    reads_config: tuple[str, ...]  # prefixes of config keys
    reads_stages: tuple[str, ...]
    needed: Callable[[Config], bool] = lambda config: True


def _teacher(config: Config) -> bool:
    return config.method.name != "ce"


def _outliers(config: Config) -> bool:
    return config.method.name in ("oal", "pixel")


STAGES = (
    Stage("teacher", ("teacher", "data", "seed", "smoke"), (), _teacher),
    Stage("generator", ("generator", "data", "seed", "smoke", "teacher.width"), (), _outliers),
    Stage(
        "features",
        ("data", "teacher.views", "seed", "smoke", "outliers.knn.features_per_class"),
        ("teacher",),
        _teacher,
    ),
    Stage("outliers", ("outliers.knn", "seed"), ("features", "generator"), _outliers),
    Stage("latents", ("latents", "data", "seed", "smoke"), ("outliers", "generator"), _outliers),
    Stage(
        "train",
        ("method", "student", "train", "data", "seed", "smoke", "outliers", "latents.reduction"),
        ("teacher", "features", "outliers", "latents"),
    ),
    Stage("evaluate", ("data", "smoke", "evaluation.batch_size"), ("train",)),
    Stage("report", ("evaluation", "seed"), ("evaluate", "train", "latents", "outliers")),
)


def plan(config: Config) -> list[Stage]:
    """The stages that this config needs, in order."""
    return [stage for stage in STAGES if stage.needed(config)]


def inputs_of(stage: Stage, context: Context, planned: set[str]) -> dict[str, Any]:
    """The config values and the files that a stage depends on, as JSON."""
    flat = flatten(context.config)
    values = {
        k: v
        for k, v in flat.items()
        if any(k == p or k.startswith(p + ".") for p in stage.reads_config)
    }
    read = [name for name in stage.reads_stages if name in planned]
    files = {name: artifacts.output_hashes(context.directory(name)) for name in read}
    return {"config": values, "stages": files}


def run(config: Config, workdir: Path, *, only: str | None = None, force: bool = False) -> Path:
    """Run every stage of a config that is not done yet; returns the working directory.

    Args:
      config: as written by the user; `smoke` is applied here.
      workdir: where everything is written.
      only: run the stages up to this one alone.
      force: go on in a directory that another config made, and redo damaged stages.

    Raises:
      UserError: an impossible config, a directory of another config, a damaged file.
    """
    validate(config)
    config = shrink(config) if config.smoke else config
    stages = plan(config)
    if only:
        names = [s.name for s in stages]
        if only not in names:
            raise UserError(f"--stage {only} is not one of this config's: {', '.join(names)}")
        stages = stages[: names.index(only) + 1]
    _claim(workdir, config, force)
    context = Context(config, workdir, distributed.make_mesh(), jax.random.key(config.seed))
    planned = {s.name for s in stages}
    for stage in stages:
        directory, inputs = context.directory(stage.name), inputs_of(stage, context, planned)
        if _done(directory, inputs, force):
            print(f"{stage.name}: done already, skipped", flush=True)
            continue
        artifacts.begin(directory, inputs)
        start = time.monotonic()
        outputs = import_module(f"oal_jax.stages.{stage.name}").run(context)
        seconds = time.monotonic() - start
        artifacts.finish(directory, stage.name, inputs, outputs, seconds)
        print(f"{stage.name}: {seconds:.1f} s", flush=True)
    return workdir


def _done(directory: Path, inputs: dict[str, Any], force: bool) -> bool:
    try:
        return artifacts.is_done(directory, inputs)
    except UserError:
        if force:
            return False
        raise


def _claim(workdir: Path, config: Config, force: bool) -> None:
    """Write `config.json`, unless the directory belongs to another config."""
    path, flat = workdir / "config.json", flatten(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not force:
            before = artifacts.read_json(path)
            changed = [k for k in flat if before.get(k) != flat[k]]
            if changed:
                key = changed[0]
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise UserError(
                    f"{workdir} was made by another config: {key} was {before.get(key)!r}, now"
                    f" {flat[key]!r}{more}; choose another --workdir, or give --force to go on here"
                )
        artifacts.write_json(path, flat)
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise UserError(f"--workdir {workdir} is not a writable directory ({error})") from None


def resolve(workdir: Path) -> Context:
    """The context of a directory that `run` made, for the commands that read one."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} has no config.json; it is not the directory of a run")
    config = unflatten(artifacts.read_json(path))
    return Context(config, workdir, distributed.make_mesh(), jax.random.key(config.seed))
