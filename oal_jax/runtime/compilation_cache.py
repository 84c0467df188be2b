"""Compiled programs, kept in the user's own directory for the next start of a command.

They are in `$XDG_CACHE_HOME/oal_jax/programs` (`~/.cache/...`), which may be deleted at any time.
Since they are run as they are read, a directory that others may write to is not used.
"""

import hashlib
import importlib.util
import os
import platform
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

_DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
# JAX's own defaults: programs of a second and more, of any number.
_DEFAULTS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
_LARGEST = str(2**31)  # bytes; those that were not used for longest go first


def keep_programs() -> None:
    """Have JAX keep what it compiles, unless the user's environment says where, or it started."""
    if "jax" not in sys.modules:  # which reads the environment once
        os.environ.update(settings(os.environ))


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What is to be added to the environment; nothing where there is no directory for it."""
    if _DIRECTORY in environment:
        return {}
    home = environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    # Programs for one processor may not run on another that has the same home.
    directory = Path(home) / "oal_jax" / "programs" / _processor()
    if not _made_private(directory):
        return {}
    added = {**_DEFAULTS, _DIRECTORY: str(directory)}
    if importlib.util.find_spec("filelock"):  # JAX asks for it where the size is limited
        added["JAX_COMPILATION_CACHE_MAX_SIZE"] = _LARGEST
    return {name: value for name, value in added.items() if name not in environment}


def _processor() -> str:
    """A word for what programs are compiled for: architecture and instruction sets."""
    known = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


def _made_private(directory: Path) -> bool:
    """Whether it is there, or was made, and this user alone may write to it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.stat()
        shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
        return mine and not shared and os.access(directory, os.W_OK)
    except OSError:
        return False
