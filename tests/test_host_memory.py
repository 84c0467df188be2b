"""What a command does about the memory that it frees."""

import platform
import subprocess
import sys

import pytest

from oal_jax.runtime import host_memory

FAULTS = """
import ctypes, resource, sys
from oal_jax import host_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    assert host_memory.keep_freed()
size = 64 * 2**20

def touch():
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults when a block of 64 MiB is taken, touched and freed for the second time."""
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_that_was_freed_is_there_for_the_next_call():
    assert faults("keep") < 100
    assert faults("as it is") > 64 * 2**20 // (16 * 2**10)  # at the least, with pages of 16 KiB


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not host_memory.keep_freed()
