"""The stages in order: which a config needs, what each depends on, which are done already."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jax

from oal_jax import artifacts, distributed
from oal_jax.config import Config, expand, flatten, shrink, stages_before, unflatten
from oal_jax.config_checks import validate
from oal_jax.errors import UserError
from oal_jax.stages.context import Context


class Stage(NamedTuple):
    """A stage reruns when a config value it reads or a file it reads has changed."""

    name: str
    reads_config: tuple[str, ...]  # prefixes of config keys ("": all); with a "-": but not these
    reads_stages: tuple[str, ...]
    needed: Callable[[Config], bool] = lambda config: True
    reads_files: Callable[[Config], dict[str, Any]] = lambda config: {}  # beside those of stages


def _read_by_method(stage: str) -> Callable[[Config], bool]:
    return lambda config: stage in stages_before(config)


def _data_files(config: Config) -> dict[str, Any]:
    data, root = config.data, Path(config.data.root).expanduser()
    if data.source == "imglist":
        return _hashes(root / "benchmark_imglist" / data.id_set, True)
    if data.source == "folder":
        return _stats(root)
    # The manifest vouches for every bundled file, and each is checked when it is read.
    return _hashes(_package("data", "embedded", "manifest.json"), data.source == "bundled")


def _teacher_files(config: Config) -> dict[str, Any]:
    shipped = _package("pretrained", "weights", "fashion_teacher.safetensors")
    return _data_files(config) | _hashes(shipped, not config.teacher.train)


def _generator_files(config: Config) -> dict[str, Any]:
    given = config.generator.directory
    if given:
        return _stats(Path(given).expanduser())  # several GB
    shipped = _package("pretrained", "weights", "fashion_sd")
    return _data_files(config) | _hashes(shipped, not config.generator.train)


def _evaluate_reads(config: Config) -> dict[str, Any]:
    # Beside the features, outputs that no score reads are not kept: another list can ask for more.
    from oal_jax.scores import needed

    outputs = needed(config.evaluation.scores) | {"features"}
    return _data_files(config) | {"outputs": sorted(outputs)}


def _train_files(config: Config) -> dict[str, Any]:
    from oal_jax.stages.train import start_file

    return _data_files(config) | _hashes(start_file(config), bool(config.train.start))


def _stats(directory: Path) -> dict[str, Any]:
    """Size and time of change of the files below a directory; they stand for the content."""
    stats = {str(p): p.stat() for p in sorted(directory.rglob("*.*"))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _package(*parts: str) -> Path:
    return Path(str(files("oal_jax"))).joinpath(*parts)


def _hashes(path: Path, wanted: bool) -> dict[str, str]:
    """Name to sha256 of a file, or of the files below a directory; what is missing has none."""
    found = [p for p in (path, *sorted(path.rglob("*"))) if wanted and p.is_file()]
    return {str(p.relative_to(path.parent)): artifacts.sha256(p) for p in found}


# The ID images: which sets the detector is tested on changes nothing before the evaluation.
_IMAGES = ("data", "-data.near", "-data.far", "-data.validation", "-data.csid")
STAGES = (
    Stage(
        "teacher",
        ("teacher", "-teacher.views", *_IMAGES, "seed", "smoke"),
        (),
        _read_by_method("teacher"),
        _teacher_files,
    ),
    Stage(
        "generator",
        ("generator", *_IMAGES, "seed", "smoke", "teacher.width"),
        (),
        _read_by_method("generator"),
        _generator_files,
    ),
    Stage(
        "features",
        # All of the teacher's: with other heads the same weights are another function.
        (*_IMAGES, "teacher", "seed", "smoke"),
        ("teacher",),
        _read_by_method("features"),
        _data_files,
    ),
    Stage(
        "outliers",
        ("outliers.knn", "seed"),
        ("features", "generator"),
        _read_by_method("outliers"),
    ),
    Stage(
        "latents",
        ("latents", "-latents.reduction", *_IMAGES, "seed", "smoke"),
        ("outliers", "generator"),
        _read_by_method("latents"),
        _data_files,
    ),
    Stage(
        "estimate_loss",
        (
            *("method.n_masks", "method.estimate_keep", "train.start"),
            *("student", "-student.dropout", *_IMAGES, "seed", "smoke"),
        ),
        (),
        _read_by_method("estimate_loss"),
        _train_files,
    ),
    Stage(
        "train",
        (
            *("method", "student", "train", "-train.keep_checkpoints", *_IMAGES, "seed", "smoke"),
            *("outliers", "-outliers.knn", "latents.reduction"),
        ),
        ("teacher", "features", "outliers", "latents", "estimate_loss"),
        reads_files=_train_files,
    ),
    Stage(
        "evaluate",
        ("data", "smoke", "evaluation.batch_size"),
        ("train",),
        reads_files=_evaluate_reads,
    ),
    # The page shows the whole config.
    Stage("report", ("",), ("evaluate", "train", "latents", "outliers")),
)


def plan(config: Config) -> list[Stage]:
    """The stages that this config needs, in order."""
    return [stage for stage in STAGES if stage.needed(config)]


def inputs_of(stage: Stage, context: Context, planned: set[str]) -> dict[str, Any]:
    """The config values and the files that a stage depends on, as JSON."""
    excluded = [prefix[1:] for prefix in stage.reads_config if prefix.startswith("-")]
    values = {
        key: value
        for key, value in flatten(context.config).items()
        if any(_below(key, prefix) for prefix in stage.reads_config)
        and not any(_below(key, prefix) for prefix in excluded)
    }
    read = [name for name in stage.reads_stages if name in planned]
    return {
        "config": values,
        "stages": {name: artifacts.output_hashes(context.directory(name)) for name in read},
        "files": stage.reads_files(context.config),
    }


def _below(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(prefix + ".")


def run(
    config: Config,
    workdir: Path,
    *,
    only: str | None = None,
    force: bool = False,
    reuse: Path | None = None,
) -> Path:
    """Run every stage of a config that is not done yet; returns the working directory.

    Args:
      config: as written by the user; `smoke` is applied here.
      workdir: where everything is written.
      only: run the stages up to this one alone.
      force: go on in a directory that another config made, and redo damaged stages.
      reuse: another run's directory; a stage that is done there on the same inputs is copied.

    Raises:
      UserError: an impossible config, a directory of another config, a damaged file.
    """
    config = expand(config)
    validate(config)
    if jax.process_count() > 1:
        # Every process would write the same files: refuse what would not be whole.
        raise UserError(
            "a run is one process that drives all its devices; runs of several processes are not"
            " supported yet"
        )
    if config.smoke:
        config = shrink(config)
        validate(config)
    stages = plan(config)
    if only:
        names = [s.name for s in stages]
        if only not in names:
            raise UserError(f"--stage {only} is not one of this config's: {', '.join(names)}")
        stages = stages[: names.index(only) + 1]
    _claim(workdir, config, force)
    context = Context(config, workdir, distributed.make_mesh(), jax.random.key(config.seed))
    with _alone(workdir):
        for stage in stages:
            _run_stage(stage, context, {s.name for s in stages}, force, reuse)
    return workdir


def _run_stage(
    stage: Stage, context: Context, planned: set[str], force: bool, reuse: Path | None
) -> None:
    directory, inputs = context.directory(stage.name), inputs_of(stage, context, planned)
    if _done(directory, inputs, force):
        print(f"{stage.name}: done already, skipped", flush=True)
        return
    if reuse and artifacts.is_done(reuse / stage.name, inputs):
        artifacts.copy_stage(reuse / stage.name, directory)
        print(f"{stage.name}: taken from {reuse}", flush=True)
        return
    artifacts.begin(directory, inputs)
    start = time.monotonic()
    outputs = import_module(f"oal_jax.stages.{stage.name}").run(context)
    seconds = time.monotonic() - start
    artifacts.finish(directory, stage.name, inputs, outputs, seconds)
    print(f"{stage.name}: {seconds:.1f} s", flush=True)


@contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """One run at a time writes to a directory; the lock goes with its process."""
    if not distributed.is_main_process():
        yield  # the first process holds it for all
        return
    with (workdir / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {workdir}; wait for it, or choose another --workdir"
            ) from None
        except (ImportError, OSError):
            pass  # no locks on this system or file system: two runs at once are the user's to avoid
        yield


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
            _check_same(workdir, _read_config(path), flat)
        artifacts.write_json(path, flat)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--workdir {workdir} is not a writable directory ({error})") from None


def _check_same(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in now if key not in before or before[key] != now[key]]
    if changed:
        key = changed[0]
        was = repr(before[key]) if key in before else "unknown"
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{workdir} was made by another config: {key} was {was}, now {now[key]!r}{more};"
            " choose another --workdir, or give --force to go on here"
        )


def _read_config(path: Path) -> dict[str, Any]:
    remedy = "give the run's --config and --force to write it anew"
    flat = artifacts.read_json(path, remedy)
    if not isinstance(flat, dict):
        raise UserError(f"{path} is damaged; {remedy}")
    return flat


def resolve(workdir: Path) -> Context:
    """The context of a directory that `run` made, for the commands that read one."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} has no config.json; it is not the directory of a run")
    config = unflatten(_read_config(path))
    return Context(config, workdir, distributed.make_mesh(), jax.random.key(config.seed))
