"""Reads and writes the directory layout of diffusers without torch and without unpickling.

A directory holds one folder a component (`unet/`, `vae/`, `text_encoder/`), each with a
`config.json` and the weights, and `tokenizer/` and `scheduler/`. What else is there
(`safety_checker/`, `feature_extractor/`, single-file checkpoints) is not looked at. Weights are
looked for in this order:

1. safetensors, one file or a sharded index, in PyTorch's names and layout;
2. the same with the `.fp16` variant in the file name;
3. Flax msgpack, in Flax's own names.

Pickled weights (`.bin`, `.pt`, `.ckpt`) are refused. Every expected tensor must be there once, with
the right shape, and nothing may be left over: a checkpoint that does not fit its config is a
`UserError`, not a network that runs on noise.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import serialization, traverse_util
from safetensors import SafetensorError, safe_open

from oal_jax.errors import UserError
from oal_jax.pretrained import torch_layout
from oal_jax.pretrained.tensor_files import listed
from oal_jax.runtime import artifacts

COMPONENTS = ("text_encoder", "unet", "vae")

# transformers and diffusers name their weight files differently.
_STEMS = ("diffusion_pytorch_model", "model")
_MSGPACK = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# How files of `torch.save` begin: a zip archive, or a bare pickle.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that older checkpoints carry beside the weights; they are constants of the code.
_BUFFERS = ("position_ids",)
_CONFIGS = ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
# The remaining small files of a tokenizer, and the name of the pipeline.
_OPTIONAL = re.compile(r"model_index\.json|tokenizer/[^/]+\.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` where it is absent or not JSON."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a diffusers directory?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def needed(names: Iterable[str], where: str) -> list[str]:
    """Of the files of a model, by their names relative to its root, those that are read.

    Args:
        names: of all files, with `/`.
        where: the model, for messages.

    Raises:
        UserError: a config, the tokenizer or a component's weights are not among them.
    """
    names = set(names)
    configs = [*_CONFIGS, *(f"{component}/config.json" for component in COMPONENTS)]
    absent = [name for name in configs if name not in names]
    if absent:
        raise UserError(f"{where}: no {listed(absent)}; is this a diffusers directory?")
    chosen = {*configs, *filter(_OPTIONAL.fullmatch, names)}
    for component in COMPONENTS:
        inside = {n.partition("/")[2] for n in names if n.startswith(f"{component}/")}
        chosen |= {f"{component}/{name}" for name in _weights(inside, f"{where}/{component}")}
    return sorted(chosen)


def files(directory: Path) -> list[Path]:
    """The files below a directory that are read, sorted; `UserError` where one is absent."""
    directory = Path(directory)
    if directory.is_file():
        raise UserError(
            f"{directory} is a file; give a directory in diffusers' layout, with unet/, vae/,"
            " text_encoder/, tokenizer/ and scheduler/"
        )
    found = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    for component in COMPONENTS:
        if (directory / component).is_dir():
            _weight_files(directory / component)  # that no shard is absent
    return sorted(directory / name for name in needed(found, str(directory)))


def _weights(names: set[str], where: str) -> list[str]:
    """The weight files among the names of a component's files; of a sharded one, index first."""
    for variant in ("", ".fp16"):
        for stem in _STEMS:
            if f"{stem}{variant}.safetensors" in names:
                return [f"{stem}{variant}.safetensors"]
            if (index := f"{stem}.safetensors.index{variant}.json") in names:
                # The variant stands before or after the number of the shard.
                shards = (n for n in names if re.fullmatch(rf"{stem}.*-of-.*\.safetensors", n))
                return [index, *sorted(n for n in shards if (".fp16" in n) == bool(variant))]
    for name in _MSGPACK:
        if name in names:
            return [name]
    pickles = sorted(name for name in names if name.endswith(_PICKLES) and "/" not in name)
    if pickles:
        target = _STEMS[0] if pickles[0].startswith(_STEMS[0]) else _STEMS[1]
        raise UserError(
            f"{where}: only pickled weights ({listed(pickles)}), which can run code when read;"
            " convert them first: python -m oal_jax.pretrained.convert --input"
            f" {where}/{pickles[0]} --output {where}/{target}.safetensors"
        )
    raise UserError(f"{where}: no weights (looked for safetensors and Flax msgpack)")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component, or its msgpack file."""
    names = {path.name for path in folder.glob("*") if path.is_file()}
    first = folder / _weights(names, str(folder))[0]
    if first.suffix != ".json":
        return [first]
    shards = read_json(first).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{first}: no weight_map in this index")
    if any(not isinstance(n, str) or Path(n).name != n for n in shards.values()):
        raise UserError(f"{first}: a shard lies outside {folder}")
    shards = sorted(set(shards.values()))
    absent = [name for name in shards if name not in names]
    if absent:
        raise UserError(f"{folder}: missing shards {listed(absent)}")
    return [folder / name for name in shards]


def _contents(files: Sequence[Path]) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Tensor name to its file, shape and type, from the files' headers alone."""
    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118
                    if name in found:
                        raise UserError(f"{file.parent}: tensor {name} is there twice")
                    part = handle.get_slice(name)
                    found[name] = file, tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {_why_unreadable(file, error)}") from None
    return found


def _why_unreadable(file: Path, error: Exception) -> str:
    with file.open("rb") as stream:
        start = stream.read(8)
    # A safetensors file starts with the length of its header, in 8 bytes of which 4 are always 0.
    if start.startswith(_PICKLE_STARTS) and any(start[4:]):
        renamed = file.with_suffix(".bin")
        return (
            "a pickle under a safetensors name, which can run code when read; rename it to"
            f" {renamed.name}, then: python -m oal_jax.pretrained.convert --input {renamed}"
            f" --output {file}"
        )
    return f"damaged, cut short or not safetensors ({error})"


def _places(
    folder: Path, files: Sequence[Path], wanted: Mapping[tuple, tuple]
) -> dict[tuple, tuple[Path, str]]:
    """Where each parameter is: a file, and a name in it; `UserError` where names don't fit."""
    found = _contents(files)
    places, missing, wrong = {}, [], []
    for path, shape in wanted.items():
        names = torch_layout.torch_names(path)
        name = next((n for n in names if n in found), None)
        if name is None:
            missing.append(names[0])
            continue
        file, have, dtype = found[name]
        expected = torch_layout.torch_shape(path, shape)
        if not torch_layout.same_weights(have, expected):
            wrong.append(f"{name} {have} instead of {expected}")
        elif dtype not in _FLOATS:
            wrong.append(f"{name} of type {dtype} instead of floats")
        places[path] = file, name
    used = {name for _, name in places.values()}
    extra = [n for n in found if n not in used and n.rsplit(".", 1)[-1] not in _BUFFERS]
    _refuse(folder, missing, extra, wrong)
    return places


def _torch_tensors(
    places: Mapping[tuple, tuple[Path, str]], wanted: Mapping[tuple, tuple]
) -> Iterator[tuple[tuple, Any]]:
    """Yields (path, array in Flax layout), one tensor in memory at a time."""
    for path, (file, name) in places.items():
        # Opened for each: the pages of a mapped file count as memory until it is closed.
        with safe_open(file, framework="numpy") as handle:
            array = handle.get_tensor(name)
        array = array.reshape(torch_layout.torch_shape(path, wanted[path]))
        yield path, torch_layout.from_torch(path, array)


def _refuse(folder: Path, missing: list[str], extra: list[str], wrong: list[str]) -> None:
    faults = [
        f"{what} {listed(names)}"
        for what, names in (("missing", missing), ("left over", extra), ("wrong shape", wrong))
        if names
    ]
    if faults:
        raise UserError(f"{folder}: weights do not fit the config: {'; '.join(faults)}")


def _msgpack(file: Path, wanted: Mapping[tuple, tuple]) -> dict[tuple, Any]:
    """All arrays of a msgpack file, which can't be read in parts."""
    try:
        flat = traverse_util.flatten_dict(serialization.msgpack_restore(file.read_bytes()))
    except Exception as error:  # msgpack raises many unrelated types on damaged input
        raise UserError(f"{file}: damaged or not Flax msgpack ({error})") from None
    missing = [".".join(path) for path in wanted if path not in flat]
    extra = [".".join(map(str, path)) for path in flat if path not in wanted]
    extra = [name for name in extra if name.rsplit(".", 1)[-1] not in _BUFFERS]
    wrong = [
        f"{'.'.join(path)} {np.shape(flat[path])} instead of {shape}"
        for path, shape in wanted.items()
        if path in flat and np.shape(flat[path]) != shape
    ]
    _refuse(file.parent, missing, extra, wrong)
    return {path: flat[path] for path in wanted}


def _wanted(expected: Any) -> dict[tuple, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(expected)
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def check_params(folder: Path, expected: Any) -> None:
    """Raises what `read_params` would, from the headers of the files: no weight is read.

    (Of a msgpack file, which has no header, all are.)
    """
    folder, wanted = Path(folder), _wanted(expected)
    files = _weight_files(folder)
    if files[0].suffix == ".msgpack":
        _msgpack(files[0], wanted)
    else:
        _places(folder, files, wanted)


def read_params(folder: Path, expected: Any, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameters of one component as a Flax tree.

    Tensors are read, transposed, cast and put on the device one by one, so that the host never
    holds a second copy of the whole (msgpack files excepted, which cannot be read in parts).

    Args:
        folder: folder of the component, for example `DIR/unet`.
        expected: nested dict of arrays or `jax.ShapeDtypeStruct`: the shapes that the module's
            `init` gives.
        dtype: dtype of every parameter, usually float32 or bfloat16.

    Returns:
        A nested dict of the same structure with jax arrays.

    Raises:
        UserError: no weights, pickled weights, a damaged file, or names and shapes that do not
            match `expected`.
    """
    folder, wanted = Path(folder), _wanted(expected)
    files = _weight_files(folder)
    if files[0].suffix == ".msgpack":
        flat = _msgpack(files[0], wanted)
        tensors = ((path, flat.pop(path)) for path in wanted)
    else:
        tensors = _torch_tensors(_places(folder, files, wanted), wanted)
    read = {path: jnp.asarray(np.asarray(array), dtype=dtype) for path, array in tensors}
    return traverse_util.unflatten_dict(read)


def write_params(folder: Path, params: Any, *, stem: str = "diffusion_pytorch_model") -> Path:
    """Writes a Flax tree as one safetensors file in PyTorch's names and layout.

    Args:
        folder: folder of the component; made if absent.
        params: nested dict of arrays; their dtypes are kept.
        stem: file name without suffix: "diffusion_pytorch_model" for diffusers, "model" for
            transformers.

    Returns:
        The file written. It replaces an older one in a single rename.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        torch_layout.torch_names(path)[0]: torch_layout.to_torch(path, np.asarray(leaf))
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    target = folder / f"{stem}.safetensors"
    with artifacts.whole_file(target) as file:
        file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    return target


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, keys in the given order."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(
    directory: Path,
    params: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    dtype: Any = None,
    scaling_factor: float | None = None,
) -> None:
    """Writes the weights, and where given the configs, of several components.

    Args:
        directory: the diffusers directory.
        params: component name ("unet", "vae", "text_encoder") to Flax tree.
        configs: component name to the content of its `config.json`; components left out keep
            theirs.
        dtype: cast to this dtype on the way (None keeps each leaf's own).
        scaling_factor: written into `vae/config.json`, which must be there or in `configs`.
    """
    directory = Path(directory)
    for name, config in (configs or {}).items():
        write_json(directory / name / "config.json", config)
    if scaling_factor is not None:
        path = directory / "vae" / "config.json"
        write_json(path, read_json(path) | {"scaling_factor": float(scaling_factor)})
    for name, tree in params.items():
        if dtype is not None:
            tree = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), tree)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        write_params(directory / name, tree, stem=stem)
