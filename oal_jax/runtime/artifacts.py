"""What a stage leaves: files written whole or not at all, and a manifest that vouches for them.

Of several processes the first writes; all of them call the functions that write, and go on when the
file is there to be read.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import safetensors.numpy

from oal_jax.errors import UserError
from oal_jax.runtime import processes

MANIFEST = "manifest.json"
_STARTED = "started.json"
_PACKAGES = ("oal-jax", "jax", "jaxlib", "flax", "optax", "diffusers", "transformers", "numpy")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none: temporary name, sync, rename."""
    processes.on_main(lambda: _write(path, data))


def _write(path: Path, data: bytes) -> None:
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


@contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """One process at a time is within; the lock, a file, is given up with its process.

    Raises:
      UserError: another one is within; it says `busy`.
    """
    with lock.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except (ImportError, OSError):
            pass  # no locks on this system or file system: two at once are the user's to avoid
        yield


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of a JSON value."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, remedy: str = "") -> Any:
    """A JSON file; `UserError` when it is damaged, which says what to do about it."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        remedy = remedy or f"delete {path.parent} (or give --force) to redo its stage"
        raise UserError(f"{path} is damaged; {remedy}") from None


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """`write_bytes` of a safetensors file."""

    def write() -> None:
        contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        _write(path, safetensors.numpy.save(contiguous))

    processes.on_main(write)


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

    Raises:
      UserError: the directory holds files, and no stage made it.
    """
    mark = {"fingerprint": fingerprint(inputs)}
    try:
        same = json.loads((directory / _STARTED).read_text("utf-8")) == mark
    except (OSError, ValueError):
        same = False
    if same:
        (directory / MANIFEST).unlink(missing_ok=True)
    else:
        _clear(directory)
        write_json(directory / _STARTED, mark)


def _clear(directory: Path) -> None:
    """Make a stage's directory and empty it; files that no run made are left alone.

    The mark is made void first: killed half-way, this leaves nothing that any run takes for its
    own, and nothing that stops the next one.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{directory} is in the way: a stage wants a directory there") from None
    ours = (directory / _STARTED).exists() or (directory / MANIFEST).exists()
    if not ours and any(path.suffix != ".partial" for path in directory.iterdir()):
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
    manifest = _read_manifest(directory)
    if manifest["inputs"] != json.loads(json.dumps(dict(inputs))):
        return False
    for name, expected in manifest["outputs"].items():
        _check(directory / name, expected, f"delete {directory} (or give --force) to redo it")
    return True


def verified(directory: Path, name: str) -> Path:
    """The path of one output of a finished stage, intact as its manifest says.

    Raises:
      UserError: the stage has no such output, or it was damaged or removed since.
    """
    outputs = _read_manifest(directory)["outputs"]
    if name not in outputs:
        raise UserError(
            f"{directory} has no {name}, so an earlier version made it; delete"
            f" {directory / MANIFEST} and start the run's command again"
        )
    _check(directory / name, outputs[name], f"delete {directory} and run its stage again")
    return directory / name


def _check(path: Path, expected: Mapping[str, Any], remedy: str) -> None:
    problem = None
    if not path.exists():
        problem = "is missing"
    elif path.stat().st_size != expected["bytes"]:
        problem = f"has {path.stat().st_size} bytes instead of {expected['bytes']}"
    elif sha256(path) != expected["sha256"]:
        problem = "has another sha256 than its manifest says"
    if problem:
        raise UserError(f"{path} {problem}; {remedy}")


def _read_manifest(directory: Path) -> dict[str, Any]:
    """A manifest of the form that `finish` writes, whose files all lie in the directory.

    Raises:
      UserError: it is anything else: it was damaged, or somebody else wrote it.
    """
    manifest = read_json(directory / MANIFEST)
    try:
        sound = isinstance(manifest["inputs"], dict) and all(
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
    """File name to sha256 of a finished stage, as its manifest has them."""
    outputs = _read_manifest(directory)["outputs"]
    return {name: entry["sha256"] for name, entry in outputs.items()}


def made_from(directory: Path, stage: str) -> dict[str, str] | None:
    """`output_hashes` of `stage` as they were when the stage of `directory` read them."""
    return _read_manifest(directory)["inputs"].get("stages", {}).get(stage)


def copy_stage(source: Path, target: Path) -> None:
    """Copy a finished stage: its outputs, then its manifest, so that a torn copy is not done."""
    _clear(target)
    for name in (*output_hashes(source), MANIFEST):
        write_bytes(target / name, (source / name).read_bytes())


@contextmanager
def whole_text_file(path: Path) -> Iterator[TextIO]:
    """A text file that has its name only once it is written to its end."""
    temporary = path.with_name(path.name + ".partial")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; give the name of a CSV file")
    try:
        # Names that are no UTF-8 come out as the bytes that they are.
        file = temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"--output {path} can't be written ({error.strerror})") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
