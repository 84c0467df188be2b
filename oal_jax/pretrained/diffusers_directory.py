"""Reads and writes diffusers' directory layout without torch and without unpickling.

A directory holds one folder a component (`unet/`, `vae/`, `text_encoder/`), each with a
`config.json` and the weights, and `tokenizer/` and `scheduler/`. Everything else there
(`safety_checker/`, `feature_extractor/`, single-file checkpoints) is ignored. Weights are looked
for in this order:

1. safetensors, one file or a sharded index, in PyTorch's names and layout;
2. the same with the `.fp16` or `.bf16` variant in the file name;
3. Flax msgpack, in Flax's own names.

Pickled weights (`.bin`, `.pt`, `.ckpt`) are refused. Every expected tensor must be there once, with
the right shape, and nothing may be left over: a checkpoint that does not fit its config is a
`UserError`, not a network that runs on noise.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import serialization, traverse_util

from oal_jax.errors import UserError
from oal_jax.pretrained import torch_layout
from oal_jax.pretrained.tensor_files import PICKLES, listed, open_safetensors, refuse
from oal_jax.runtime import writing

COMPONENTS = ("text_encoder", "unet", "vae")

# transformers and diffusers name their weight files differently.
_STEMS = ("diffusion_pytorch_model", "model")
_MSGPACK = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that older checkpoints carry beside the weights; they are constants of the code.
_BUFFERS = ("position_ids",)
_UNFIT = "weights do not fit the config"
_VARIANTS = ("", ".fp16", ".bf16")
_TOKENIZERS = (("tokenizer/vocab.json", "tokenizer/merges.txt"), ("tokenizer/tokenizer.json",))
# Folders of other models.
_OTHERS = {"transformer": "Stable Diffusion 3 or Flux", "text_encoder_2": "Stable Diffusion XL"}
# The remaining small files of a tokenizer, and the name of the pipeline.
_OPTIONAL = re.compile(r"model_index\.json|tokenizer/[^/]+\.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` where it is absent or not JSON."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a diffusers directory?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def needed(names: Iterable[str], where: str) -> list[str]:
    """The files of a model that are read.

    Args:
      names: all files of the model, relative to its root, with `/`.
      where: the model, for messages.

    Raises:
      UserError: a config, the tokenizer or a component's weights are not among them.
    """
    names = set(names)
    folders = {name.partition("/")[0] for name in names if "/" in name}
    for folder, model in _OTHERS.items():
        if folder in folders:
            raise UserError(
                f"{where} has {folder}/, as {model} has; give a Stable Diffusion v1 or v2"
            )
    configs = ["scheduler/scheduler_config.json"]
    configs += (f"{component}/config.json" for component in COMPONENTS)
    configs += next((files for files in _TOKENIZERS if names.issuperset(files)), _TOKENIZERS[0])
    absent = [name for name in configs if name not in names]
    if absent:
        raise UserError(f"{where}: no {listed(absent)}; is this a diffusers directory?")
    chosen = {*configs, *filter(_OPTIONAL.fullmatch, names)}
    for component in COMPONENTS:
        inside = {n.partition("/")[2] for n in names if n.startswith(f"{component}/")}
        chosen |= {f"{component}/{name}" for name in _weights(inside, f"{where}/{component}")}
    return sorted(chosen)


def files(directory: Path) -> list[Path]:
    """The files below a directory that are read, sorted; `UserError` where one is missing."""
    directory = Path(directory)
    if directory.is_file():
        raise UserError(
            f"{directory} is a file; give a directory in diffusers' layout, with unet/, vae/,"
            " text_encoder/, tokenizer/ and scheduler/"
        )
    names = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    for component in COMPONENTS:
        if (directory / component).is_dir():
            _weight_files(directory / component)  # raises where a shard is missing
    return sorted(directory / name for name in needed(names, str(directory)))


def _weights(names: set[str], where: str) -> list[str]:
    """The weight files among a component's files; the index of a sharded one comes first."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            if f"{stem}{variant}.safetensors" in names:
                return [f"{stem}{variant}.safetensors"]
            if (index := f"{stem}.safetensors.index{variant}.json") in names:
                # The variant stands before or after the number of the shard.
                shards = (n for n in names if re.fullmatch(rf"{stem}.*-of-.*\.safetensors", n))
                return [index, *sorted(n for n in shards if _variant(n) == variant)]
    for name in _MSGPACK:
        if name in names:
            return [name]
    pickles = sorted(name for name in names if name.endswith(PICKLES) and "/" not in name)
    if pickles:
        target = _STEMS[0] if pickles[0].startswith(_STEMS[0]) else _STEMS[1]
        raise UserError(
            f"{where}: only pickled weights ({listed(pickles)}), which can run code when read;"
            " convert them first: python -m oal_jax.pretrained.convert --input"
            f" {where}/{pickles[0]} --output {where}/{target}.safetensors"
        )
    others = sorted({_variant(name)[1:] for name in names if name.endswith(".safetensors")} - {""})
    if others:
        raise UserError(
            f"{where}: only the variants {listed(others)} are there, of which none is read by"
            " itself; rename the file of one, so that its name is without the variant"
        )
    raise UserError(f"{where}: no weights (looked for safetensors and Flax msgpack)")


def _variant(name: str) -> str:
    """`.fp16` of `model.fp16.safetensors` or `model.fp16-00001-of-00002.safetensors`."""
    plain = re.sub(r"-\d+-of-\d+", "", name).removesuffix(".safetensors")
    return plain[plain.index(".") :] if "." in plain else ""


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


class _Tensor(NamedTuple):
    """A tensor of a safetensors file, known from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _contents(files: Sequence[Path]) -> dict[str, _Tensor]:
    """The tensors of all files by name, from the headers alone."""
    tensors: dict[str, _Tensor] = {}
    for file in files:
        with open_safetensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                if name in tensors:
                    raise UserError(f"{file.parent}: tensor {name} is there twice")
                header = handle.get_slice(name)
                tensors[name] = _Tensor(file, tuple(header.get_shape()), header.get_dtype())
    return tensors


def _places(
    folder: Path, files: Sequence[Path], shapes: Mapping[tuple, tuple]
) -> dict[tuple, tuple[Path, str]]:
    """File and tensor name of each parameter; `UserError` where names or shapes do not fit."""
    tensors = _contents(files)
    places, missing, wrong = {}, [], []
    for path, shape in shapes.items():
        names = torch_layout.torch_names(path)
        name = next((n for n in names if n in tensors), None)
        if name is None:
            missing.append(names[0])
            continue
        tensor, expected = tensors[name], torch_layout.torch_shape(path, shape)
        if not torch_layout.same_weights(tensor.shape, expected):
            wrong.append(f"{name} {tensor.shape} instead of {expected}")
        elif tensor.dtype not in _FLOATS:
            wrong.append(f"{name} of type {tensor.dtype} instead of floats")
        places[path] = tensor.file, name
    used = {name for _, name in places.values()}
    extra = [name for name in tensors if name not in used and not _is_buffer(name)]
    refuse(f"{folder}: {_UNFIT}", missing, extra, wrong)
    return places


def _is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _BUFFERS


def _torch_tensors(
    places: Mapping[tuple, tuple[Path, str]], shapes: Mapping[tuple, tuple]
) -> Iterator[tuple[tuple, Any]]:
    """(path, array in Flax's layout) pairs, one tensor in memory at a time."""
    for path, (file, name) in places.items():
        # Opened for each: the pages of a mapped file count as memory until it is closed.
        with open_safetensors(file) as handle:
            array = handle.get_tensor(name)
        array = array.reshape(torch_layout.torch_shape(path, shapes[path]))
        yield path, torch_layout.from_torch(path, array)


def _msgpack(file: Path, shapes: Mapping[tuple, tuple]) -> dict[tuple, Any]:
    """All arrays of a msgpack file, which can't be read in parts."""
    try:
        flat = traverse_util.flatten_dict(serialization.msgpack_restore(file.read_bytes()))
    except Exception as error:  # msgpack raises many unrelated types on damaged input
        raise UserError(f"{file}: damaged or not Flax msgpack ({error})") from None
    missing = [".".join(path) for path in shapes if path not in flat]
    extra = [".".join(map(str, path)) for path in flat if path not in shapes]
    extra = [name for name in extra if not _is_buffer(name)]
    wrong = [
        f"{'.'.join(path)} {np.shape(flat[path])} instead of {shape}"
        for path, shape in shapes.items()
        if path in flat and np.shape(flat[path]) != shape
    ]
    refuse(f"{file.parent}: {_UNFIT}", missing, extra, wrong)
    return {path: flat[path] for path in shapes}


def _shapes(expected: Any) -> dict[tuple, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(expected)
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def check_params(folder: Path, expected: Any) -> None:
    """Raises what `read_params` would, from the headers of the files.

    A msgpack file has no header and is read in full.
    """
    folder, shapes = Path(folder), _shapes(expected)
    files = _weight_files(folder)
    if files[0].suffix == ".msgpack":
        _msgpack(files[0], shapes)
    else:
        _places(folder, files, shapes)


def read_params(folder: Path, expected: Any, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameters of one component as a Flax tree.

    Tensors are read, transposed, cast and put on the device one by one, so that the host never
    holds a second copy of the whole. (A msgpack file cannot be read in parts.)

    Args:
      folder: folder of the component, for example `DIR/unet`.
      expected: nested dict of arrays or `jax.ShapeDtypeStruct`: the shapes that the module's `init`
        gives.
      dtype: dtype of every parameter, usually float32 or bfloat16.

    Returns:
      A nested dict of the same structure with jax arrays.

    Raises:
      UserError: no weights, pickled weights, a damaged file, or names and shapes that do not match
        `expected`.
    """
    folder, shapes = Path(folder), _shapes(expected)
    files = _weight_files(folder)
    if files[0].suffix == ".msgpack":
        flat = _msgpack(files[0], shapes)
        tensors = ((path, flat.pop(path)) for path in shapes)
    else:
        tensors = _torch_tensors(_places(folder, files, shapes), shapes)
    params = {path: jnp.asarray(np.asarray(array), dtype=dtype) for path, array in tensors}
    return traverse_util.unflatten_dict(params)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, keys in their order."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing.whole_file(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def save(
    directory: Path,
    params: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    scaling_factor: float | None = None,
) -> None:
    """Writes weights and configs of components.

    Args:
      directory: the diffusers directory.
      params: component name ("unet", "vae", "text_encoder") to Flax tree; each becomes one
        safetensors file in PyTorch's names and layout, and keeps its dtypes.
      configs: component name to the content of its `config.json`; the other files are not changed.
      scaling_factor: written into `vae/config.json`, which must exist or be in `configs`.
    """
    directory = Path(directory)
    for name, config in (configs or {}).items():
        write_json(directory / name / "config.json", config)
    if scaling_factor is not None:
        path = directory / "vae" / "config.json"
        write_json(path, read_json(path) | {"scaling_factor": float(scaling_factor)})
    for name, tree in params.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        _write_params(directory / name / f"{stem}.safetensors", tree)


def _write_params(target: Path, params: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        torch_layout.torch_names(path)[0]: torch_layout.to_torch(path, np.asarray(leaf))
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    with writing.whole_file(target) as file:
        file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
