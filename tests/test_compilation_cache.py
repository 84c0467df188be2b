"""Where compiled programs are kept, and that a place which others may write to is not used."""

import os
import subprocess
import sys

import pytest

from oal_jax.runtime.compilation_cache import settings


def test_programs_are_kept_in_the_users_directory(tmp_path):
    added = settings({"XDG_CACHE_HOME": str(tmp_path), "HOME": "/nowhere"})
    made = tmp_path / "oal_jax" / "programs"
    (directory,) = made.iterdir()
    assert added["JAX_COMPILATION_CACHE_DIR"] == str(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert settings({"XDG_CACHE_HOME": str(tmp_path)}) == added


def test_without_the_variable_they_are_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = settings({})["JAX_COMPILATION_CACHE_DIR"]
    assert directory.startswith(str(tmp_path / ".cache" / "oal_jax"))


def test_what_the_user_says_stands(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert settings({**home, "JAX_COMPILATION_CACHE_DIR": "there"}) == {}
    assert settings({**home, "JAX_COMPILATION_CACHE_DIR": ""}) == {}
    limit = "JAX_COMPILATION_CACHE_MAX_SIZE"
    assert limit in settings(home) and limit not in settings({**home, limit: "1000"})


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_directory_that_others_may_write_to_is_not_used(tmp_path, mode):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    directory = settings(home)["JAX_COMPILATION_CACHE_DIR"]
    os.chmod(directory, mode)
    assert settings(home) == {}


def test_where_none_can_be_made_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    assert settings({"XDG_CACHE_HOME": str(tmp_path / "file")}) == {}


def test_the_next_process_finds_what_was_compiled(tmp_path):
    """By what JAX itself says of hits."""
    code = """
from oal_jax import compilation_cache
compilation_cache.keep_programs()
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
    said = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [child.stdout.strip() for child in said] == ["False", "True"], said[1].stderr
