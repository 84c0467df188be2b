"""Runs the unfinished stages of a config, and opens the directory of a run."""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import jax

from oal_jax.config import Config, flatten, unflatten
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts, distributed, processes, writing
from oal_jax.stages.context import Context
from oal_jax.stages.plan import DEVICE_KEYS, STAGES, Stage, inputs_of, plan
from oal_jax.stages.ready import ready
from oal_jax.training import log


def run(
    config: Config,
    workdir: Path,
    *,
    only: str | None = None,
    force: bool = False,
    reuse: Path | Sequence[Path] | None = None,
    watch: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> Path:
    """Run every unfinished stage of a config; returns the working directory.

    Args:
      config: as written by the user; `smoke` is applied here.
      workdir: where everything is written.
      only: run the stages up to this one alone.
      force: continue in the directory of another config, and redo damaged stages.
      reuse: directories of other runs; a stage that is done there on the same inputs is copied.
      watch: `watch(stage)` is a context that surrounds each stage that runs.

    Raises:
      UserError: an impossible config, a directory of another config, a damaged file.
    """
    config, lines = ready(config)
    stages = plan(config)
    if only:
        names = [stage.name for stage in stages]
        if only not in names:
            raise UserError(f"--stage {only} is not one of this config's: {', '.join(names)}")
        stages = stages[: names.index(only) + 1]
    mesh = distributed.make_mesh(config.mesh.model)
    _check_alike(config)
    context = Context(config, workdir, mesh, jax.random.key(config.seed))
    reuse = [reuse] if isinstance(reuse, Path) else list(reuse or ())
    print("\n".join(lines), end="\n" * bool(lines), flush=True)
    if force or not _finished(workdir, stages, config):
        from oal_jax.stages import check, check_report

        check.require(context, reuse)
        if config.data.source == "own":
            print(check_report.expected_time(context, [s.name for s in stages]), flush=True)
    with _alone(workdir):
        processes.on_main(lambda: _check_links(workdir))
        processes.on_main(lambda: _claim(workdir, config, force))
        for stage in stages:
            _run_stage(stage, context, force, reuse, watch)
    return workdir


def resolve(workdir: Path) -> Context:
    """The context of a run's directory, for the commands that read one."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} has no config.json; it is not the directory of a run")
    config = unflatten(_read_config(path))
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    context = Context(config, workdir, distributed.make_mesh(), jax.random.key(config.seed))
    for stage in STAGES:
        _check_unedited(stage, context, path)
    return context


def _check_unedited(stage: Stage, context: Context, path: Path) -> None:
    """Raise `UserError` if a finished stage was made by another config than the file has now."""
    directory = context.directory(stage.name)
    if not (directory / artifacts.MANIFEST).exists():
        return
    recorded = _leaves(artifacts.inputs_recorded(directory).get("config", {}))
    # An older version may have recorded other keys.
    for key, value in _leaves(stage.reads(context.config)).items():
        if key in recorded and recorded[key] != value:
            raise UserError(
                f"{path}: {key} is {value!r}, but stage {stage.name} was made with"
                f" {recorded[key]!r}; restore the file, or run the stages again with --force"
            )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested dicts."""
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, below in value.items():
        leaves |= _leaves(below, f"{prefix}.{key}" if prefix else key)
    return leaves


def _check_alike(config: Config) -> None:
    """Raise `UserError` when this process has another config than process 0."""
    here = flatten(config)
    there = processes.on_main(lambda: here)
    for key, value in here.items():
        if there.get(key) != value:
            raise UserError(
                f"config {key} is {value!r} in process {processes.index()} and"
                f" {there.get(key)!r} in process 0; give all processes the same config"
            )


def _run_stage(
    stage: Stage,
    context: Context,
    force: bool,
    reuse: Sequence[Path],
    watch: Callable[[str], AbstractContextManager[None]],
) -> None:
    directory, inputs = context.directory(stage.name), {}

    def prepare() -> str:
        """The reason why the stage need not run; empty where its directory is ready for a run."""
        inputs.update(inputs_of(stage, context))
        if _done(directory, inputs, force):
            return "done already, skipped"
        for other in reuse:
            if artifacts.is_done(other / stage.name, inputs):
                artifacts.copy_stage(other / stage.name, directory)
                return f"taken from {other}"
        if changed := _changed(directory, inputs):
            print(f"{stage.name}: {changed} changed since it was done; it runs again", flush=True)
        artifacts.begin(directory, inputs)
        return ""

    reason = processes.on_main(prepare)
    if reason:
        print(f"{stage.name}: {reason}", flush=True)
        processes.on_main(lambda: _restore_log(stage, context))
        return
    with watch(stage.name):
        start = time.monotonic()
        outputs = import_module(f"oal_jax.stages.{stage.name}").run(context)
        outputs += _save_log(stage, context)
        seconds = time.monotonic() - start
        processes.on_main(lambda: artifacts.finish(directory, stage.name, inputs, outputs, seconds))
        print(f"{stage.name}: {seconds:.1f} s", flush=True)


def _changed(directory: Path, inputs: dict[str, Any]) -> str:
    """Which inputs of a finished stage are no longer those that it was made from."""
    if not (directory / artifacts.MANIFEST).exists():
        return ""
    try:
        before = artifacts.inputs_recorded(directory)
    except UserError:
        return "its record"
    names = {"config": "the config", "stages": "an earlier stage", "files": "the files of its data"}
    return ", ".join(
        text
        for part, text in names.items()
        if before.get(part) != json.loads(json.dumps(inputs[part]))
    )


def _save_log(stage: Stage, context: Context) -> list[Path]:
    """The stage's own copy of its lines of the log, which its manifest then vouches for."""
    rows = [row for name in stage.logs for row in log.read(context.workdir / log.FILE, name)]
    path = context.directory(stage.name) / log.FILE
    if rows:
        artifacts.write_bytes(path, log.encode(rows))
    return [path] if rows else []


def _restore_log(stage: Stage, context: Context) -> None:
    copy = context.directory(stage.name) / log.FILE
    if copy.exists():
        rows = [row for name in stage.logs for row in log.read(copy, name)]
        if log.restore(context.workdir, rows, stage.logs):
            print(f"{stage.name}: its lines were missing from {log.FILE} and are back", flush=True)


@contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Create the directory if needed, and hold it: one run at a time writes to it."""
    processes.on_main(lambda: _make(workdir))
    if not distributed.is_main_process():
        yield  # process 0 holds it for all
        return
    busy = f"another run is at work in {workdir}; wait for it, or choose another --workdir"
    with writing.alone(workdir / ".lock", busy):
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


def _check_links(workdir: Path) -> None:
    """Raise `UserError` for a linked folder: a run would write and delete where it points to."""
    for parent, folders, _ in os.walk(workdir):
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise UserError(
                    f"{Path(parent, name)} is a link to a folder; replace it by a folder"
                )


def _claim(workdir: Path, config: Config, force: bool) -> None:
    """Write `config.json`, unless the directory belongs to another config.

    A directory without a finished stage belongs to no config: a start that failed leaves one.
    """
    path = workdir / "config.json"
    with _writable(workdir):
        if path.exists() and not force:
            before = _read_config(path)
            if "method.name" not in before:
                raise UserError(
                    f"{path} is not of a run; choose another --workdir, or give --force to replace"
                    " it"
                )
            if any((workdir / stage.name / artifacts.MANIFEST).exists() for stage in STAGES):
                _check_same(workdir, before, config)
        artifacts.write_json(path, flatten(config))


@contextmanager
def _writable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--workdir {workdir} is not a writable directory ({error})") from None


def _finished(workdir: Path, stages: Sequence[Stage], config: Config) -> bool:
    """Whether all stages seem done with this very config; then there is nothing to check."""
    path = workdir / "config.json"
    made = all((workdir / stage.name / artifacts.MANIFEST).exists() for stage in stages)
    return made and path.exists() and _read_config(path) == flatten(config)


def _check_same(workdir: Path, before: dict[str, Any], config: Config) -> None:
    # A run may continue on other devices and with other readers.
    now = {key: value for key, value in flatten(config).items() if key not in DEVICE_KEYS}
    changed = [key for key in now if key not in before or before[key] != now[key]]
    if changed:
        key = changed[0]
        was = repr(before[key]) if key in before else "unknown"
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{workdir} was made by another config: {key} was {was}, now {now[key]!r}{more};"
            " choose another --workdir, or give --force to continue here"
        )


def _read_config(path: Path) -> dict[str, Any]:
    remedy = "give the run's --config and --force to replace it"
    flat = artifacts.read_json(path, remedy)
    if not isinstance(flat, dict):
        raise UserError(f"{path} is damaged; {remedy}")
    return flat
