"""What a stage leaves: files written whole or not at all, and a manifest that vouches for them.

Where a run has several processes, process 0 writes. All processes call the functions that write,
and each call returns when the file can be read.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy

from oal_jax.errors import UserError
from oal_jax.runtime import processes
from oal_jax.runtime.writing import output_file, unwritable, whole_file

MANIFEST = "manifest.json"
_STARTED = "started.json"
_MAX_JSON = 2**26  # bytes
_KEYS = {"stage", "inputs", "outputs", "seconds", "versions"}  # of a manifest
_PACKAGES = ("oal-jax", "jax", "jaxlib", "flax", "optax", "diffusers", "transformers", "numpy")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a `whole_file`; its directory is made where it is missing."""
    processes.on_main(lambda: _write(path, data, whole_file))


def write_output(path: Path, data: bytes) -> None:
    """Write an `output_file`; its directory is made where it is missing."""
    processes.on_main(lambda: _write(path, data, output_file))


def _write(path: Path, data: bytes, opened: Callable[[Path], AbstractContextManager[IO]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
    with opened(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value as a `whole_file`, keys sorted."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, remedy: str = "") -> Any:
    """Read a JSON file; `UserError` with `remedy`, what to do about it, when it is damaged."""
    # A pipe or a device would never end.
    if path.exists() and (not path.is_file() or path.stat().st_size > _MAX_JSON):
        raise UserError(f"{path} is no JSON file of this package")
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        remedy = remedy or f"delete {path.parent} (or give --force) to redo its stage"
        raise UserError(f"{path} is damaged; {remedy}") from None


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors by name as a safetensors `whole_file`."""

    def write() -> None:
        contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        _write(path, safetensors.numpy.save(contiguous), whole_file)

    processes.on_main(write)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file; `UserError` when it is missing or damaged."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file; run the stage that writes it")
    try:
        return safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that writes it") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete {path.parent} to redo its stage"
        ) from None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hex digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the installed packages whose numerics an artifact depends on."""
    installed = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def begin(directory: Path, inputs: Mapping[str, Any]) -> None:
    """Prepare a stage's directory. Files of an interrupted run on the same inputs stay.

    Files from other inputs are deleted, so that no later run resumes from them.

    Raises:
      UserError: the directory holds files, and no stage made it.
    """
    mark = {"fingerprint": fingerprint(inputs)}
    try:
        same_inputs = json.loads((directory / _STARTED).read_text("utf-8")) == mark
    except (OSError, ValueError):
        same_inputs = False
    if same_inputs:
        (directory / MANIFEST).unlink(missing_ok=True)
        for cut_short in directory.glob(".*.partial"):
            cut_short.unlink(missing_ok=True)
    else:
        _clear(directory)
        write_json(directory / _STARTED, mark)


def _clear(directory: Path) -> None:
    """Make a stage's directory and empty it. Refuses a directory with files that no run made.

    The mark of its inputs is voided first. Killed half-way, this leaves nothing that a run resumes
    from, and nothing that stops the next run.
    """
    if directory.is_symlink():
        raise UserError(f"{directory} is a link, and what it points to is not emptied; delete it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{directory} is a file in the place of a stage's directory") from None
    made_by_run = (directory / _STARTED).exists() or (directory / MANIFEST).exists()
    if not made_by_run and any(path.suffix != ".partial" for path in directory.iterdir()):
        raise UserError(
            f"{directory} holds files that no run made; move them, or choose another --workdir"
        )
    write_json(directory / _STARTED, {"fingerprint": ""})
    for path in list(directory.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _STARTED:
            path.unlink()


def finish(
    directory: Path, stage: str, inputs: Mapping[str, Any], outputs: list[Path], seconds: float
) -> None:
    """Write the manifest, which marks the stage as done."""
    manifest = {
        "stage": stage,
        "inputs": dict(inputs),
        "outputs": {
            str(path.relative_to(directory)): {
                "sha256": sha256(path),
                "bytes": path.stat().st_size,
                "tensors": _shapes(path),
            }
            for path in outputs
        },
        "seconds": round(seconds, 2),
        "versions": versions(),
    }
    write_json(directory / MANIFEST, manifest | {"sha256": fingerprint(manifest)})


def _shapes(path: Path) -> dict[str, list]:
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: [s.get_dtype(), *s.get_shape()] for name, s in slices.items()}


def is_done(directory: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether the stage finished on exactly these inputs and its outputs are intact.

    Raises:
      UserError: it finished on these inputs, but an output was damaged or removed since.
    """
    if not (directory / MANIFEST).exists():
        return False
    manifest = _read_manifest(directory)
    if manifest["inputs"] != json.loads(json.dumps(dict(inputs))):
        return False
    for name, expected in manifest["outputs"].items():
        _check(directory / name, expected, f"delete {directory} (or give --force) to redo it")
    return True


def verified(directory: Path, name: str) -> Path:
    """Path of an output of a finished stage, checked against its manifest.

    Raises:
      UserError: the stage has no such output, or it was damaged or removed since.
    """
    outputs = _read_manifest(directory)["outputs"]
    if name not in outputs:
        raise UserError(
            f"{directory} has no {name}: an earlier version of oal_jax made it; delete"
            f" {directory / MANIFEST} and start the run's command again"
        )
    _check(directory / name, outputs[name], f"delete {directory} and run its stage again")
    return directory / name


def _check(path: Path, expected: Mapping[str, Any], remedy: str) -> None:
    problem = None
    if not path.is_file():
        problem = "is missing"
    elif path.stat().st_size != expected["bytes"]:
        problem = f"has {path.stat().st_size} bytes instead of {expected['bytes']}"
    elif sha256(path) != expected["sha256"]:
        problem = "has another sha256 than its manifest says"
    if problem:
        raise UserError(f"{path} {problem}; {remedy}")


def _read_manifest(directory: Path) -> dict[str, Any]:
    """A manifest as `finish` writes it, whose files all lie in the directory.

    Raises:
      UserError: the file has another form: it is damaged, or no run wrote it.
    """
    manifest = read_json(directory / MANIFEST)
    try:
        # Those of older versions have no digest of their own.
        digest = manifest.pop("sha256", None)
        sound = manifest.keys() == _KEYS and digest in (None, fingerprint(manifest))
        sound &= isinstance(manifest["inputs"], dict) and all(
            isinstance(entry["sha256"], str)
            and isinstance(entry["bytes"], int)
            and not Path(name).is_absolute()
            and ".." not in Path(name).parts
            for name, entry in manifest["outputs"].items()
        )
    except (TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise UserError(
            f"{directory / MANIFEST} is damaged; delete {directory} (or give --force) to redo it"
        )
    return manifest


def output_hashes(directory: Path) -> dict[str, str]:
    """The sha256 of each output of a finished stage by file name, from its manifest."""
    outputs = _read_manifest(directory)["outputs"]
    return {name: entry["sha256"] for name, entry in outputs.items()}


def inputs_recorded(directory: Path) -> dict[str, Any]:
    """What a finished stage was made from, from its manifest."""
    return _read_manifest(directory)["inputs"]


def made_from(directory: Path, stage: str) -> dict[str, str] | None:
    """`output_hashes` of `stage` at the time when the stage in `directory` read them."""
    return _read_manifest(directory)["inputs"].get("stages", {}).get(stage)


def copy_stage(source: Path, target: Path) -> None:
    """Copy a finished stage. The manifest comes last, so an interrupted copy is not done."""
    _clear(target)
    for name in (*output_hashes(source), MANIFEST):
        write_bytes(target / name, (source / name).read_bytes())
