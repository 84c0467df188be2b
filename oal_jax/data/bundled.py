"""The image sets inside the package, checked against their manifest before they are read.

`tools.fashion_set.build` makes them; `embedded/LICENSES.md` names their owners.
"""

import hashlib
import importlib.resources
import json
from pathlib import Path

from oal_jax.errors import UserError

# What to do about a damaged set. Ends the messages.
REMEDY = "reinstall the package or rebuild with python -m tools.fashion_set.build"


def embedded_root() -> Path:
    """The folder of the package that holds the embedded sets and their manifest."""
    return Path(str(importlib.resources.files("oal_jax.data") / "embedded"))


def read_manifest(root: Path) -> dict:
    """The manifest of the sets below `root`: `sets` by name, each with splits, source and files.

    Raises:
      UserError: `manifest.json` is missing, or is not what `tools.fashion_set.build` writes.
    """
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {REMEDY}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sets"), dict):
        raise UserError(f"{path} lists no sets: {REMEDY}")
    return manifest


def verified_directory(name: str, root: str | None = None) -> Path:
    """The TFDS directory of the embedded set `name`, after a check of all its files.

    Args:
      name: a set of the manifest, such as "fashion".
      root: the folder with `manifest.json`; empty or None: the one in the package.

    Raises:
      UserError: no such set, or a file is missing, cut short or changed.
    """
    folder = Path(root) if root else embedded_root()
    sets = read_manifest(folder)["sets"]
    if name not in sets:
        raise UserError(f"no bundled image set {name!r}: choose one of {', '.join(sorted(sets))}")
    for relative, expected in sets[name]["files"].items():
        path = folder / relative
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
        if len(data) != expected["bytes"]:
            raise UserError(f"{path} has {len(data)} bytes, not {expected['bytes']}: {REMEDY}")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise UserError(f"{path} differs from its sha256 in manifest.json: {REMEDY}")
    return folder / sets[name]["directory"]
