"""Files of named tensors (safetensors, NumPy's npz; never a pickle), fitted to a network.

Every tensor of the file is used once and every parameter of the network is filled. A file that does
not fit is a `UserError` that lists the faults, not a network that runs on noise.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from oal_jax.errors import UserError

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# The first bytes of a file of `torch.save`: a zip archive, or a bare pickle.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_POINTER = b"version https://git-lfs"
_SHOWN = 5  # names in a message


class TensorFile(NamedTuple):
    """The contents of a file."""

    path: Path
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """The shape of a tensor that determines the architecture; `UserError` without it."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: missing {name}, which determines the architecture")
        shape = self.tensors[name].shape
        if len(shape) != ndim or 0 in shape:
            raise UserError(f"{self.path}: wrong shape {name} {shape}: not {ndim} axes")
        return shape


class Place(NamedTuple):
    """The tensors of a file that hold one parameter: one, or several of one shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    load: Callable[[Sequence[np.ndarray]], np.ndarray]  # to the layout of the network


def read(path: str | Path) -> TensorFile:
    """All tensors of a `.safetensors` or `.npz` file.

    Raises:
      UserError: no such file, another ending, a pickle, a damaged or truncated file.
    """
    path = Path(path).expanduser()
    if path.suffix in PICKLES:
        raise UserError(_refusal(path))
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(f"{path}: unknown ending '{path.suffix}'; give a .safetensors or .npz file")
    if path.suffix == ".npz":
        return _read_npz(path)
    with open_safetensors(path) as file:
        names = list(file.keys())
        types = {name: file.get_slice(name).get_dtype() for name in names}
        refuse_types(path, {n: t for n, t in types.items() if t.startswith("F8") or t == "F4"})
        tensors = {name: file.get_tensor(name) for name in names}
        return TensorFile(path, tensors, dict(file.metadata() or {}))


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A handle of a safetensors file; tensors are read only when asked for.

    Raises:
      UserError: no such file, a pickle under this name, a damaged or truncated file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
    refuse_pointer(path, start)
    # A safetensors file starts with the length of its header, in 8 bytes of which 4 are always 0.
    if start.startswith(_PICKLE_STARTS) and any(start[4:8]):
        raise UserError(_refusal(path))
    try:
        with safe_open(path, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, cut short or not safetensors ({error})") from None


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise a UserError where a file starts as those do that git-lfs has not fetched."""
    if start.startswith(_POINTER):
        raise UserError(f"{path} is a git-lfs pointer and not the weights; run git lfs pull there")


def refuse_types(path: Path, types: Mapping[str, str]) -> None:
    """Raise a UserError that names tensors whose numbers are no plain floats or integers."""
    if types:
        shown = listed([f"{name} ({kind})" for name, kind in types.items()])
        raise UserError(
            f"{path} has quantised, 8-bit or sparse tensors: {shown}; save the weights as float32,"
            " float16 or bfloat16, with the program that wrote them"
        )


def _refusal(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when read; convert it first: python -m"
        f" oal_jax.pretrained.convert --input {path} --output {path.with_suffix('.safetensors')}"
    )


# The errors of numpy and zipfile on a file that is no whole npz.
_MOST_UNPACKED = 2**29  # bytes that a small file may become
_NPZ_FAULTS = (
    *(OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),  # the last: an unknown compression
)


def _read_npz(path: Path) -> TensorFile:
    try:
        with path.open("rb") as stream:
            refuse_pointer(path, stream.read(len(_POINTER)))
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            size = sum(entry.file_size for entry in archive.zip.infolist())
            if size > max(_MOST_UNPACKED, 20 * path.stat().st_size):
                raise UserError(f"{path}: unpacks to {size / 2**30:.1f} GiB, too much for weights")
            tensors = {name: _typed(archive[name]) for name in archive.files}
    except FileNotFoundError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
    except _NPZ_FAULTS as error:
        raise UserError(f"{path}: damaged, cut short or not npz ({error})") from None
    return TensorFile(path, tensors, {})


def _typed(array: np.ndarray) -> np.ndarray:
    """NumPy writes bfloat16 as two bytes without a type."""
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array


def fit(
    file: TensorFile, places: Mapping[tuple, Place], unused: Sequence[str], what: str
) -> dict[tuple, np.ndarray]:
    """The parameters, float32, by path.

    Args:
      file: from `read`.
      places: path of a parameter in the network to its place in the file.
      unused: names that may be left over.
      what: the network, for messages.

    Raises:
      UserError: tensors that are missing, left over, or of another shape or type.
    """
    shapes = {name: place.shape for place in places.values() for name in place.names}
    wrong = []
    for name in sorted(shapes.keys() & file.tensors.keys()):
        array = file.tensors[name]
        if array.shape != shapes[name]:
            wrong.append(f"{name} {array.shape} instead of {shapes[name]}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            wrong.append(f"{name} of type {array.dtype} instead of floats")
    missing = [name for name in shapes if name not in file.tensors]
    extra = [name for name in file.tensors if name not in {*shapes, *unused}]
    refuse(f"{file.path} does not fit {what}", missing, extra, wrong)
    return {
        path: np.asarray(place.load([file.tensors[name] for name in place.names]), np.float32)
        for path, place in places.items()
    }


def refuse(message: str, missing: list[str], extra: list[str], wrong: list[str]) -> None:
    """A `UserError` of the message and the faults, if there are any."""
    faults = (("missing", missing), ("left over", extra), ("wrong shape", wrong))
    lists = [f"{fault} {listed(names)}" for fault, names in faults if names]
    if lists:
        raise UserError(f"{message}: {'; '.join(lists)}")


def listed(names: Sequence[str]) -> str:
    """The first names, and the count of all."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > _SHOWN else shown
