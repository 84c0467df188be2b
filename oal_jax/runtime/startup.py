"""What a command does before JAX starts: the compilation cache, memory on the host.

The cache is `$XDG_CACHE_HOME/oal_jax/programs` (`~/.cache/...`) and may be deleted at any time. JAX
runs the programs that it reads there, so a directory that others may write to is not used.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

_DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
_MIN_SECONDS = "0.3"  # JAX's default keeps programs that took a second to compile
_MAX_BYTES = str(2**31)  # the programs used least recently are deleted first

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def use_compilation_cache() -> None:
    """Have JAX keep compiled programs between commands, unless the user's environment decides.

    Does nothing once JAX is imported: it reads the environment only then.
    """
    if "jax" not in sys.modules:
        os.environ.update(cache_settings(os.environ))


def cache_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the compilation cache that `environment` lacks.

    Empty where the environment names a cache, and where no private directory can be made.
    """
    if _DIRECTORY in environment:
        return {}
    home = environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    # Programs compiled for one processor may not run on another that shares the home directory.
    directory = Path(home) / "oal_jax" / "programs" / _processor()
    if not _make_private(directory):
        return {}
    settings = {
        _DIRECTORY: str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": _MIN_SECONDS,
    }
    if importlib.util.find_spec("filelock"):  # JAX needs it to limit the size
        settings["JAX_COMPILATION_CACHE_MAX_SIZE"] = _MAX_BYTES
    return {name: value for name, value in settings.items() if name not in environment}


def _processor() -> str:
    """Hash of the architecture and its instruction sets."""
    parts = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    parts += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _make_private(directory: Path) -> bool:
    """Make a directory; whether it exists now and this user alone may write to it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        return own and not shared and os.access(directory, os.W_OK)
    except OSError:
        return False


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation; whether it does.

    XLA's CPU backend allocates a program's temporaries at every call. glibc maps blocks of that
    size from the system and returns them when they are freed, so every call touches fresh pages:
    15,000 page faults a training step of the default config, a fifth of its time.

    The process may stay larger than it needs to be, so commands call this and the library does not.
    Does nothing with another C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
