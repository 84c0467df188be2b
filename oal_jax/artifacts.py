"""What a stage leaves: files written whole or not at all, and a manifest that vouches for them."""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from oal_jax.errors import UserError

MANIFEST = "manifest.json"
_STARTED = "started.json"
_PACKAGES = ("oal-jax", "jax", "jaxlib", "flax", "optax", "diffusers", "transformers", "numpy")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none: temporary name, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of a JSON value."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file; `UserError` when it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged; delete {path.parent} to redo its stage") from None


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """`write_bytes` of a safetensors file."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    write_bytes(path, safetensors.numpy.save(contiguous))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; `UserError` when it is missing or damaged."""
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
    """Versions of the packages whose numerics an artifact depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def begin(directory: Path, inputs: Mapping[str, Any]) -> None:
    """Make a stage's directory ready: what an interrupted run of the same inputs left is kept.

    What was left from other inputs is deleted, so that nothing of it can be resumed.
    """
    mark = {"fingerprint": fingerprint(inputs)}
    started = directory / _STARTED
    same = False
    if started.exists():
        try:
            same = json.loads(started.read_text("utf-8")) == mark
        except ValueError:
            same = False
    if not same and directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    if not same:
        write_json(started, mark)


def finish(
    directory: Path, stage: str, inputs: Mapping[str, Any], outputs: list[Path], seconds: float
) -> None:
    """Write the manifest: from here on the stage is done."""
    write_json(
        directory / MANIFEST,
        {
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
        },
    )


def _shapes(path: Path) -> dict[str, list]:
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: [s.get_dtype(), *s.get_shape()] for name, s in slices.items()}


def is_done(directory: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether the stage ran to its end on exactly these inputs and its outputs are intact.

    Raises:
      UserError: it ran to its end on these inputs, and an output was damaged or removed since.
    """
    if not (directory / MANIFEST).exists():
        return False
    manifest = read_json(directory / MANIFEST)
    if manifest.get("inputs") != json.loads(json.dumps(dict(inputs))):
        return False
    for name, expected in manifest["outputs"].items():
        path = directory / name
        problem = None
        if not path.exists():
            problem = "is missing"
        elif path.stat().st_size != expected["bytes"]:
            problem = f"has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif sha256(path) != expected["sha256"]:
            problem = "has another sha256 than its manifest says"
        if problem:
            raise UserError(f"{path} {problem}; delete {directory} (or give --force) to redo it")
    return True


def output_hashes(directory: Path) -> dict[str, str]:
    """File name to sha256 of a finished stage, as its manifest has them."""
    outputs = read_json(directory / MANIFEST)["outputs"]
    return {name: entry["sha256"] for name, entry in outputs.items()}
