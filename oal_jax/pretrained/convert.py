"""`python -m oal_jax.pretrained.convert --input model.ckpt --output model.safetensors`.

Writes the tensors of a PyTorch checkpoint (`torch.save`: .ckpt, .pt, .pth, .bin) as a safetensors
file, which `load_classifier` reads. Needs torch. A file that holds more than tensors and plain
values is refused (`weights_only=True`). Exit codes are those of `oal_jax.main`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from oal_jax.errors import UserError
from oal_jax.pretrained.layouts import unwrapped
from oal_jax.pretrained.tensor_files import refuse_pointer, refuse_types
from oal_jax.runtime.command import BareParser, guard


def run(argv: Sequence[str]) -> None:
    """Parses the arguments, converts, and prints one line."""
    parser = BareParser("oal_jax.pretrained.convert", __doc__)
    parser.add_argument("--input", type=Path, required=True, help="file of torch.save")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--key", help="entry with the tensors, where the file has several")
    args = parser.parse_args(argv[1:])
    tensors = convert(args.input, args.output, args.key)
    size = args.output.stat().st_size / 1e6
    print(f"{len(tensors)} tensors, {size:.1f} MB: {args.output}")


def convert(source: Path, target: Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Writes the tensors of `source` to `target`, atomically; returns them.

    The prefix of what wraps a ViT or ResNet ("module.", of `DataParallel`) is removed, and tensors
    outside of it left out, which a line on stderr says.

    Args:
      source: a file of `torch.save`.
      target: ends in `.safetensors`; replaced if it exists.
      key: the entry that holds the tensors, if there are several.

    Raises:
      UserError: torch is missing, no such file, a file that can't be read with
        `weights_only=True`, none or several entries that hold tensors, several networks, quantised,
        8-bit or sparse tensors.
    """
    from oal_jax.runtime import artifacts

    if target.suffix != ".safetensors":
        raise UserError(f"--output {target} must end in .safetensors")
    state = unwrapped(_state_dict(source, _load(source), key), f"--input {source}")
    refuse_types(source, {name: kind for name, x in state.items() if (kind := _unusual(x))})
    tensors = {name: _array(tensor) for name, tensor in state.items()}
    artifacts.write_output(target, safetensors.numpy.save(tensors))
    return tensors


def _load(source: Path) -> Any:
    try:
        with source.open("rb") as file:
            refuse_pointer(source, file.read(64))
    except OSError:
        pass  # said below, in torch's words
    try:
        import torch
    except ImportError:
        raise UserError(
            "converting a PyTorch checkpoint needs torch; pip install torch, or convert the file on"
            " a machine that has it"
        ) from None
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--input {source} can't be read ({error.strerror or error})") from None
    except Exception as error:  # damaged files raise many unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--input {source} is damaged, or holds more than tensors ({reason[:160]}); save"
            " model.state_dict() alone, with the program that wrote it"
        ) from None


def _state_dict(source: Path, content: Any, key: str | None) -> Mapping[str, Any]:
    """The tensors by name: the content of the file, or its one entry that is such a dict."""
    if key is not None:
        if not isinstance(content, Mapping) or not _is_state(content.get(key)):
            raise UserError(f"--input {source} has no tensors by name under --key {key}")
        return content[key]
    if _is_state(content):
        return content
    entries = content.items() if isinstance(content, Mapping) else ()
    states = {str(name): value for name, value in entries if _is_state(value)}
    if not states:
        raise UserError(f"--input {source} is no state dict: it holds no tensors by name")
    if len(states) > 1:
        names = ", ".join(states)
        raise UserError(f"--input {source} has tensors under {names}; give one as --key")
    return next(iter(states.values()))


def _is_state(value: Any) -> bool:
    import torch

    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _unusual(tensor: Any) -> str:
    """What keeps a tensor from being a NumPy array, or ""."""
    import torch

    if tensor.is_quantized or tensor.layout != torch.strided:
        return "quantised" if tensor.is_quantized else "sparse"
    name = str(tensor.dtype).removeprefix("torch.")
    return name if name.startswith("float8") or name.startswith("float4") else ""


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    # NumPy has no bfloat16; float32 holds each of its values.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
