"""Memory on the host: what the C library does with blocks that are freed.

XLA's CPU backend takes the temporary memory of a program anew at every call. glibc has the system
map blocks of that size, and gives them back when they are freed, so that every call touches fresh
pages: 15,000 page faults a training step of the default config, a fifth of its time.
"""

import ctypes
import sys

# Of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed() -> bool:
    """Keep freed memory for the next call instead of giving it back; whether that is done.

    For a whole process, which it may leave larger than it needs to be: for a command, not for a
    library. Other C libraries than glibc are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
