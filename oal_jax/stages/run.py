"""The stages in order: which a config needs, what each depends on, which are done already."""

import dataclasses
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jax

from oal_jax.config import (
    GENERATED,
    METHOD_STAGES,
    Config,
    expand,
    flatten,
    hub_names,
    stages_before,
    unflatten,
)
from oal_jax.config.rules import validate
from oal_jax.config.smoke import shrink
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts, distributed, processes
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
    if data.source == "tfds":
        from oal_jax.data import tfds

        root = tfds.sets_root(data.root or None)
    if data.source in ("folder", "tfds"):
        return _stats(root)
    # The manifest vouches for every bundled file, and each is checked when it is read.
    return _hashes(_package("data", "embedded", "manifest.json"), data.source == "bundled")


def _teacher_files(config: Config) -> dict[str, Any]:
    t, read = config.teacher, _data_files(config)
    shipped = _package("pretrained", "weights", "fashion_teacher.safetensors")
    read |= _hashes(shipped, not t.train and not t.weights)
    read |= _hashes(Path(t.weights).expanduser(), bool(t.weights))
    if t.alignment:  # then its training reads the generator, which is what these make it
        read |= _generator_files(config) | {"generator": flatten(config.generator)}
    return read


def _features_reads(config: Config) -> dict[str, Any]:
    # Without cached views only the images that the k-NN sampling reads pass through the teacher.
    count = config.outliers.knn.features_per_class
    return _data_files(config) | ({} if config.teacher.views else {"features_per_class": count})


def _generator_files(config: Config) -> dict[str, Any]:
    given = config.generator.directory
    if given:
        # A commit of the hub stands for its files; those of a directory are several GB.
        return {} if hub_names.parse(given) else _stats(Path(given).expanduser())
    shipped = _package("pretrained", "weights", "fashion_sd")
    read = _data_files(config) | _hashes(shipped, not config.generator.train)
    if config.generator.feature_share:  # then its training reads the teacher
        read |= _teacher_files(config) | {"teacher": _without_views(config.teacher)}
    return read


def _without_views(teacher: Any) -> dict[str, Any]:
    return {k: v for k, v in flatten(teacher).items() if k not in ("views", "remat")}


def _latents_reads(config: Config) -> dict[str, Any]:
    # Where the training reads none, only those of the report are sampled.
    from oal_jax.methods import registry

    return _data_files(config) | {"sampled_for_training": registry.reads_sampled(config)}


def _evaluate_reads(config: Config) -> dict[str, Any]:
    # Beside the features, outputs that no score reads are not kept: another list can ask for more.
    from oal_jax.scores import needed

    outputs = needed(config.evaluation.scores) | {"features"}
    return _data_files(config) | {"outputs": sorted(outputs)}


def _train_files(config: Config) -> dict[str, Any]:
    from oal_jax.stages.train import start_file

    return _data_files(config) | _hashes(start_file(config), bool(config.train.start))


def _stats(directory: Path) -> dict[str, Any]:
    """Size and time of change of the files below a directory, which may be millions, as a digest.

    They stand for the content.
    """
    digest = hashlib.sha256()
    for parent, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(name for name in names if "." in name):
            path = os.path.join(parent, name)
            if os.path.exists(path):  # not a link to nothing
                stat = os.stat(path)
                digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return {str(directory): digest.hexdigest()}


def _package(*parts: str) -> Path:
    return Path(str(files("oal_jax"))).joinpath(*parts)


def _hashes(path: Path, wanted: bool) -> dict[str, str]:
    """Name to sha256 of a file, or of the files below a directory; what is missing has none."""
    found = [p for p in (path, *sorted(path.rglob("*"))) if wanted and p.is_file()]
    return {str(p.relative_to(path.parent)): artifacts.sha256(p) for p in found}


# The ID images: which sets the detector is tested on changes nothing before the evaluation.
_IMAGES = ("data", "-data.workers", "-data.near", "-data.far", "-data.validation", "-data.csid")
_FREE = ("mesh", "data.workers")  # keys that change nothing of what a run gives
# The stages whose seed is `stages_seed`, where that is given.
_PREPARED = ("teacher", "generator", "features", "outliers", "adapter", "latents")
STAGES = (
    Stage(
        "teacher",
        ("teacher", "-teacher.views", "-teacher.remat", *_IMAGES, "seed", "smoke"),
        (),
        _read_by_method("teacher"),
        _teacher_files,
    ),
    Stage(
        "generator",
        ("generator", "-generator.dtype", *_IMAGES, "seed", "smoke", "teacher.width"),
        (),
        _read_by_method("generator"),
        _generator_files,
    ),
    Stage(
        "features",
        # All of the teacher's: with other heads the same weights are another function.
        (*_IMAGES, "teacher", "-teacher.remat", "seed", "smoke"),
        ("teacher",),
        _read_by_method("features"),
        _features_reads,
    ),
    Stage(
        "outliers",
        ("outliers.boundary", "outliers.knn", "outliers.lazy", "outliers.crossing", "seed"),
        ("teacher", "features", "generator"),
        _read_by_method("outliers"),
    ),
    Stage(
        "adapter",
        ("adapter", *_IMAGES, "seed", "smoke"),
        ("teacher", "features", "generator"),
        _read_by_method("adapter"),
        _data_files,
    ),
    Stage(
        "latents",
        ("latents", "-latents.reduction", "generator.dtype", *_IMAGES, "seed", "smoke"),
        ("outliers", "generator", "adapter"),
        _read_by_method("latents"),
        _latents_reads,
    ),
    Stage(
        "estimate_loss",
        (
            *("method.n_masks", "method.estimate_keep", "train.start"),
            *("student", "-student.dropout", "-student.remat", *_IMAGES, "seed", "smoke"),
        ),
        (),
        _read_by_method("estimate_loss"),
        _train_files,
    ),
    Stage(
        "train",
        (
            *("method", "student", "-student.remat", "train", "-train.keep_checkpoints"),
            *(*_IMAGES, "seed", "stages_seed", "smoke"),
            *("outliers", "-outliers.knn", "-outliers.crossing", "-outliers.boundary"),
            "latents.reduction",
        ),
        ("teacher", "features", "outliers", "latents", "estimate_loss"),
        reads_files=_train_files,
    ),
    Stage(
        "evaluate",
        ("data", "-data.workers", "smoke", "evaluation.batch_size"),
        ("train",),
        reads_files=_evaluate_reads,
    ),
    # The page shows the whole config.
    Stage(
        "report",
        ("", *(f"-{key}" for key in _FREE)),
        ("evaluate", "train", "latents", "outliers"),
    ),
)


def plan(config: Config) -> list[Stage]:
    """The stages that this config needs, in order."""
    needed = [stage for stage in STAGES if stage.needed(config)]
    if not config.teacher.alignment:
        return needed
    return sorted(needed, key=lambda stage: stage.name != "generator")  # the teacher reads it


def inputs_of(stage: Stage, context: Context, planned: set[str]) -> dict[str, Any]:
    """The config values and the files that a stage depends on, as JSON."""
    context = _as_seen_by(stage, context)
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


def _as_seen_by(stage: Stage, context: Context) -> Context:
    return context.prepared if stage.name in _PREPARED else context


def _below(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(prefix + ".")


def run(
    config: Config,
    workdir: Path,
    *,
    only: str | None = None,
    force: bool = False,
    reuse: Path | Sequence[Path] | None = None,
    watch: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> Path:
    """Run every stage of a config that is not done yet; returns the working directory.

    Args:
      config: as written by the user; `smoke` is applied here.
      workdir: where everything is written.
      only: run the stages up to this one alone.
      force: go on in a directory that another config made, and redo damaged stages.
      reuse: directories of other runs; a stage that is done there on the same inputs is copied.
      watch: `watch(stage)` is a context that surrounds each stage that runs.

    Raises:
      UserError: an impossible config, a directory of another config, a damaged file.
    """
    config = sized(expand(config))
    validate(config)
    if config.smoke:
        config = shrink(config)
        validate(config)
    stages = plan(config)
    if only:
        names = [s.name for s in stages]
        if only not in names:
            raise UserError(f"--stage {only} is not one of this config's: {', '.join(names)}")
        stages = stages[: names.index(only) + 1]
    mesh = distributed.make_mesh(config.mesh.model)
    _check_alike(config)
    context = Context(config, workdir, mesh, jax.random.key(config.seed))
    reuse = [reuse] if isinstance(reuse, Path) else list(reuse or ())
    with _alone(workdir):
        processes.on_main(lambda: _claim(workdir, config, force))
        for stage in stages:
            _run_stage(stage, context, {s.name for s in stages}, force, reuse, watch)
    return workdir


def _check_alike(config: Config) -> None:
    """Raise `UserError` when this process was given another config than process 0."""
    here = flatten(config)
    there = processes.on_main(lambda: here)
    for key, value in here.items():
        if there.get(key) != value:
            raise UserError(
                f"config {key} is {value!r} in process {processes.index()} and"
                f" {there.get(key)!r} in process 0; give all processes the same config"
            )


def sized(config: Config) -> Config:
    """The config with the teacher's sizes read off the file `teacher.weights`.

    Raises:
      UserError: there is no such file, or none that can be read.
    """
    weights = config.teacher.weights
    read = isinstance(weights, str) and weights not in ("", GENERATED) and not config.smoke
    if not read or config.method.name not in METHOD_STAGES:
        return config
    if "teacher" not in stages_before(config):
        return config
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"config teacher.weights={weights}: there is no such file; give a ViT or ResNet as"
            " timm or torchvision publish it (.safetensors), or Google (.npz), such as the"
            " model.safetensors of timm/vit_base_patch16_224.orig_in21k"
        )
    from oal_jax.pretrained.classifiers import describe  # flax, which a finished run needs not

    described = describe(path)
    names = ("patch", "width", "depth", "heads", "mlp_ratio")
    sizes = {name: described[name] for name in names if name in described}
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, **sizes))


def _run_stage(
    stage: Stage,
    context: Context,
    planned: set[str],
    force: bool,
    reuse: Sequence[Path],
    watch: Callable[[str], AbstractContextManager[None]],
) -> None:
    directory, inputs = context.directory(stage.name), {}

    def prepare() -> str:
        """Why the stage need not run; empty where it must, and its directory is ready."""
        inputs.update(inputs_of(stage, context, planned))
        if _done(directory, inputs, force):
            return "done already, skipped"
        for other in reuse:
            if artifacts.is_done(other / stage.name, inputs):
                artifacts.copy_stage(other / stage.name, directory)
                return f"taken from {other}"
        artifacts.begin(directory, inputs)
        return ""

    said = processes.on_main(prepare)
    if said:
        print(f"{stage.name}: {said}", flush=True)
        return
    with watch(stage.name):
        start = time.monotonic()
        outputs = import_module(f"oal_jax.stages.{stage.name}").run(_as_seen_by(stage, context))
        seconds = time.monotonic() - start
        processes.on_main(lambda: artifacts.finish(directory, stage.name, inputs, outputs, seconds))
        print(f"{stage.name}: {seconds:.1f} s", flush=True)


@contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """One run at a time writes to a directory, which is made where there is none."""
    processes.on_main(lambda: _make(workdir))
    if not distributed.is_main_process():
        yield  # the first process holds it for all
        return
    busy = f"another run is at work in {workdir}; wait for it, or choose another --workdir"
    with artifacts.alone(workdir / ".lock", busy):
        yield


def _done(directory: Path, inputs: dict[str, Any], force: bool) -> bool:
    try:
        return artifacts.is_done(directory, inputs)
    except UserError:
        if force:
            return False
        raise


def _make(workdir: Path) -> None:
    with _writable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".lock").touch()


def _claim(workdir: Path, config: Config, force: bool) -> None:
    """Write `config.json`, unless the directory belongs to another config."""
    path, flat = workdir / "config.json", flatten(config)
    with _writable(workdir):
        if path.exists() and not force:
            _check_same(workdir, _read_config(path), flat)
        artifacts.write_json(path, flat)


@contextmanager
def _writable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--workdir {workdir} is not a writable directory ({error})") from None


def _check_same(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    # On which devices and with how many readers a run goes on is free.
    read = [key for key in now if not any(_below(key, free) for free in _FREE)]
    changed = [key for key in read if key not in before or before[key] != now[key]]
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
