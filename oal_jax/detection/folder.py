"""Folders that a detector is written to: which may be replaced."""

from pathlib import Path

from oal_jax.errors import UserError
from oal_jax.runtime import artifacts

# The JSON file that describes a saved or an exported detector, its "format", and names of files.
SAVED, DETECTOR = "oal_jax saved detector", "detector.json"
EXPORTED, MODEL = "oal_jax detector", "model.json"
PROGRAM, ONNX, PREPROCESS = "detector.jax_export", "detector.onnx", "preprocess.py"
WEIGHTS, CARD = "weights.safetensors", "README.md"
FORWARD, TENSORS = "forward.jax_export", "detector.safetensors"
_FILES = {
    SAVED: {DETECTOR, FORWARD, TENSORS},
    EXPORTED: {MODEL, PROGRAM, ONNX, PREPROCESS, WEIGHTS, CARD},
}


def check_replaceable(output: Path, description: str, form: str) -> None:
    """Refuse a folder with files, unless its description has this form and no file is another's.

    Args:
      output: the folder to write; it need not exist.
      description: name of its JSON file.
      form: value of "format" in that file.

    Raises:
      UserError: a file, or a folder with other files; the first is named.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; give a folder")
    try:
        is_ours = artifacts.read_json(output / description)["format"] == form
    except (UserError, KeyError, TypeError):
        is_ours = False
    try:
        others = [p.name for p in output.iterdir() if not (is_ours and _is_of(p, _FILES[form]))]
    except OSError as error:
        raise UserError(f"{output} can't be read ({error.strerror})") from None
    if others:
        raise UserError(
            f"{output} holds other files, such as {min(others)}; give an empty or a new folder"
        )


def _is_of(path: Path, files: set[str]) -> bool:
    """Whether a detector's folder may hold the path: a file, or what Python compiled of one."""
    if path.name == "__pycache__" and PREPROCESS in files and not path.is_symlink():
        start = PREPROCESS.removesuffix("py")
        return all(p.name.startswith(start) and p.suffix == ".pyc" for p in path.iterdir())
    return path.name in files and path.is_file()
