"""The compilation cache lies in a private directory of the user; freed memory is used again."""

import os
import platform
import subprocess
import sys

import pytest

from oal_jax.runtime import startup
from oal_jax.runtime.startup import cache_settings


def test_the_cache_lies_in_a_private_directory_of_the_user(tmp_path):
    settings = cache_settings({"XDG_CACHE_HOME": str(tmp_path), "HOME": "/nowhere"})
    (directory,) = (tmp_path / "oal_jax" / "programs").iterdir()
    assert settings["JAX_COMPILATION_CACHE_DIR"] == str(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert cache_settings({"XDG_CACHE_HOME": str(tmp_path)}) == settings


def test_without_xdg_cache_home_it_lies_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = cache_settings({})["JAX_COMPILATION_CACHE_DIR"]
    assert directory.startswith(str(tmp_path / ".cache" / "oal_jax"))


def test_the_environment_of_the_user_wins(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert cache_settings({**home, "JAX_COMPILATION_CACHE_DIR": "there"}) == {}
    assert cache_settings({**home, "JAX_COMPILATION_CACHE_DIR": ""}) == {}
    limit = "JAX_COMPILATION_CACHE_MAX_SIZE"
    assert limit in cache_settings(home) and limit not in cache_settings({**home, limit: "1000"})


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_directory_that_others_may_write_to_is_not_used(tmp_path, mode):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    os.chmod(cache_settings(home)["JAX_COMPILATION_CACHE_DIR"], mode)
    assert cache_settings(home) == {}


def test_without_a_directory_there_is_no_cache(tmp_path):
    (tmp_path / "file").touch()
    assert cache_settings({"XDG_CACHE_HOME": str(tmp_path / "file")}) == {}


def test_the_next_process_reads_what_one_compiled(tmp_path):
    """By the cache hits that JAX itself reports."""
    code = """
from oal_jax.runtime import startup
startup.use_compilation_cache()
import jax
hits = []
jax.monitoring.register_event_listener(lambda e, **_: hits.append("cache_hits" in e))
jax.jit(lambda x: jax.numpy.sort(x) * 3)(jax.numpy.arange(5.0))
print(any(hits))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    children = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [c.stdout.strip() for c in children] == ["False", "True"], children[1].stderr


FAULTS = """
import ctypes, resource, sys
from oal_jax.runtime import startup
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    assert startup.keep_freed_memory()
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
    """Page faults when a block of 64 MiB is allocated, touched and freed for the second time."""
    child = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return int(child.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    assert faults("keep") < 100
    assert faults("default") > 64 * 2**20 // (16 * 2**10)  # at least, with pages of 16 KiB


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not startup.keep_freed_memory()
