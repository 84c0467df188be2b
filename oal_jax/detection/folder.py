"""Folders that a detector is written to: which may be replaced."""

import json
from pathlib import Path

from oal_jax.errors import UserError

# The JSON file that describes a saved or an exported detector, and its "format".
SAVED, DETECTOR = "oal_jax saved detector", "detector.json"
EXPORTED, MODEL = "oal_jax detector", "model.json"


def check_replaceable(output: Path, description: str, form: str) -> None:
    """Refuse a folder with files, unless its description says that it has this form.

    Args:
      output: the folder to write; it need not exist.
      description: name of its JSON file.
      form: value of "format" in that file.

    Raises:
      UserError: a file, or a folder with other files.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; give a folder")
    try:
        replaceable = json.loads((output / description).read_text("utf-8"))["format"] == form
    except (OSError, ValueError, KeyError, TypeError):
        replaceable = not any(output.iterdir())
    if not replaceable:
        raise UserError(f"{output} holds other files; give an empty or a new folder")
