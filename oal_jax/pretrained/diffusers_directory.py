"""Reads and writes the directory layout of diffusers without torch and without unpickling.

A directory holds one folder a component (`unet/`, `vae/`, `text_encoder/`), each with a
`config.json` and the weights. Weights are looked for in this order:

1. safetensors, one file or a sharded index, in PyTorch's names and layout;
2. the same with the `.fp16` variant in the file name;
3. Flax msgpack, in Flax's own names.

Pickled weights (`.bin`, `.pt`, `.ckpt`) are refused. Every expected tensor must be there once, with
the right shape, and
nothing may be left over: a checkpoint that does not fit its config is a `UserError`, not a network
    that runs on noise.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from oal_jax.errors import UserError
from oal_jax.pretrained import torch_layout
from oal_jax.pretrained.tensor_files import listed

# transformers and diffusers name their weight files differently.
_STEMS = ("diffusion_pytorch_model", "model")
_MSGPACK = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Buffers that older checkpoints carry beside the weights; they are constants of the code.
_BUFFERS = ("position_ids",)


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


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component, or its msgpack file."""
    for variant in ("", ".fp16"):
        for stem in _STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                shards = read_json(index).get("weight_map")
                if not isinstance(shards, dict) or not shards:
                    raise UserError(f"{index}: no weight_map in this index")
                names = sorted(set(shards.values()))
                if any(not isinstance(n, str) or Path(n).name != n for n in names):
                    raise UserError(f"{index}: a shard lies outside {folder}")
                absent = [name for name in names if not (folder / name).is_file()]
                if absent:
                    raise UserError(f"{folder}: missing shards {listed(absent)}")
                return [folder / name for name in names]
    for name in _MSGPACK:
        if (folder / name).is_file():
            return [folder / name]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: only pickled weights ({listed(pickles)}), which can run code when read;"
            " save the model as safetensors"
        )
    raise UserError(f"{folder}: no weights (looked for safetensors and Flax msgpack)")


def _torch_tensors(files: list[Path], wanted: Mapping[str, tuple]) -> Iterator[tuple[tuple, Any]]:
    """Yields (path, array in Flax layout), one tensor in memory at a time.

    Names and shapes of all are checked before the first is read.
    """
    where, shapes = {}, {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as handle:
                names = handle.keys()
                for name in names:
                    if name in where:
                        raise UserError(f"{file.parent}: tensor {name} is there twice")
                    where[name] = file
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or not safetensors ({error})") from None

    chosen, missing, wrong = {}, [], []
    for path, shape in wanted.items():
        names = torch_layout.torch_names(path)
        name = next((n for n in names if n in where), None)
        if name is None:
            missing.append(names[0])
            continue
        expected = torch_layout.torch_shape(path, shape)
        # Some early autoencoders store a dense kernel as a 1 x 1 convolution.
        if shapes[name] not in (expected, (*expected, 1, 1)):
            wrong.append(f"{name} {shapes[name]} instead of {expected}")
        chosen[name] = path
    extra = [n for n in where if n not in chosen and n.rsplit(".", 1)[-1] not in _BUFFERS]
    _refuse(files[0].parent, missing, extra, wrong)

    for file in files:
        with safe_open(file, framework="numpy") as handle:
            for name in set(handle.keys()) & set(chosen):
                path = chosen[name]
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


def _msgpack_tensors(file: Path, wanted: Mapping[tuple, tuple]) -> Iterator[tuple[tuple, Any]]:
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
    for path in wanted:
        yield path, np.asarray(flat.pop(path))


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
    folder = Path(folder)
    wanted = {
        path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(expected).items()
    }
    files = _weight_files(folder)
    if files[0].suffix == ".msgpack":
        tensors = _msgpack_tensors(files[0], wanted)
    else:
        tensors = _torch_tensors(files, wanted)
    flat = {path: jnp.asarray(np.asarray(array), dtype=dtype) for path, array in tensors}
    return traverse_util.unflatten_dict(flat)


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
    target, partial = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the library makes it private to its owner, unlike the configs beside it
    partial.replace(target)
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
