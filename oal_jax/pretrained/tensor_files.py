"""One file of tensors by name (safetensors, NumPy's npz; never a pickle), fitted to a network.

Every tensor of the file is used once and every parameter of the network is filled: a file that does
not fit is a `UserError` that lists what is wrong, not a network that runs on noise.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from oal_jax.errors import UserError

_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# How files of `torch.save` begin: a zip archive, or a bare pickle.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_SHOWN = 5  # names in a message


class TensorFile(NamedTuple):
    """What a file holds."""

    path: Path
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """The shape of a tensor from which the architecture is read off; `UserError` without it."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: missing {name}, without which the architecture is open")
        shape = self.tensors[name].shape
        if len(shape) != ndim or 0 in shape:
            raise UserError(f"{self.path}: wrong shape {name} {shape}: not {ndim} axes")
        return shape


class Place(NamedTuple):
    """Where a file has a parameter: one tensor, or several of one shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    load: Callable[[Sequence[np.ndarray]], np.ndarray]  # to the layout of the network


def read(path: str | Path) -> TensorFile:
    """All tensors of a `.safetensors` or `.npz` file.

    Raises:
      UserError: no such file, another ending, a pickle, a damaged or truncated file.
    """
    path = Path(path).expanduser()
    if path.suffix in _PICKLES:
        raise UserError(_refusal(path))
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(f"{path}: unknown ending '{path.suffix}'; give a .safetensors or .npz file")
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
    return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path, start)


def _refusal(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when read; convert it first: python -m"
        f" oal_jax.pretrained.convert --input {path} --output {path.with_suffix('.safetensors')}"
    )


def _read_safetensors(path: Path, start: bytes) -> TensorFile:
    # A safetensors file starts with the length of its header, in 8 bytes of which 4 are always 0.
    if start.startswith(_PICKLE_STARTS) and any(start[4:]):
        raise UserError(_refusal(path))
    try:
        with safe_open(path, framework="numpy") as handle:
            names = list(handle.keys())
            tensors = {name: handle.get_tensor(name) for name in names}
            return TensorFile(path, tensors, dict(handle.metadata() or {}))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, cut short or not safetensors ({error})") from None


# What numpy and zipfile raise on a file that is no whole npz.
_NPZ_FAULTS = (
    *(OSError, ValueError, EOFError, KeyError, AttributeError, TypeError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),  # the last: an unknown compression
)


def _read_npz(path: Path) -> TensorFile:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            tensors = {name: _typed(archive[name]) for name in archive.files}
    except _NPZ_FAULTS as error:
        raise UserError(f"{path}: damaged, cut short or not npz ({error})") from None
    return TensorFile(path, tensors, {})


def _typed(array: np.ndarray) -> np.ndarray:
    """NumPy writes bfloat16 as two bytes of no type."""
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array


def fit(
    file: TensorFile, places: Mapping[tuple, Place], unused: Sequence[str], what: str
) -> dict[tuple, np.ndarray]:
    """The parameters, float32, by path.

    Args:
      file: from `read`.
      places: path of a parameter in the network to where the file has it.
      unused: names that may be left over.
      what: the network, for messages.

    Raises:
      UserError: tensors that are missing, left over, or of another shape or type.
    """
    wanted = {name: place.shape for place in places.values() for name in place.names}
    wrong = []
    for name in sorted(wanted.keys() & file.tensors.keys()):
        array = file.tensors[name]
        if array.shape != wanted[name]:
            wrong.append(f"{name} {array.shape} instead of {wanted[name]}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            wrong.append(f"{name} of type {array.dtype} instead of floats")
    faults = (
        ("missing", [name for name in wanted if name not in file.tensors]),
        ("left over", [name for name in file.tensors if name not in {*wanted, *unused}]),
        ("wrong shape", wrong),
    )
    found = "; ".join(f"{kind} {listed(names)}" for kind, names in faults if names)
    if found:
        raise UserError(f"{file.path} does not fit {what}: {found}")
    return {
        path: np.asarray(place.load([file.tensors[name] for name in place.names]), np.float32)
        for path, place in places.items()
    }


def listed(names: Sequence[str]) -> str:
    """The first names, and how many there are."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > _SHOWN else shown
