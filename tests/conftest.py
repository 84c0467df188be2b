"""Tests run on one CPU device (tests/distributed: on four), with rank promotion forbidden.

Compiling is most of their cost, so XLA optimises little, and all workers and child processes of a
run share what was compiled. Nothing is kept in the user's directories.
"""

import atexit
import os
import runpy
import shutil
import tempfile
from pathlib import Path

# JAX reads these when it is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if "OAL_JAX_TEST_PROGRAMS" not in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
    directory = tempfile.mkdtemp(prefix="oal_jax_tests_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["OAL_JAX_TEST_PROGRAMS"] = directory  # set it to keep programs between runs
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["OAL_JAX_TEST_PROGRAMS"]
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**31)  # only then its files are locked
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"  # few files: each access lists all

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The directory of a whole smoke run of method oal with every stage; not to be changed.

    The first worker that needs it makes it for all.
    """
    from filelock import FileLock

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    workdir = shared / "finished_run"
    with FileLock(shared / "finished_run.lock"):
        if not (workdir / "report" / "manifest.json").exists():
            _run_oal(workdir)
    return workdir


def _run_oal(workdir: Path) -> None:
    from oal_jax.stages import run as pipeline

    configs = Path(__file__).parent.parent / "configs"
    config = runpy.run_path(str(configs / "fashion.py"))["get_config"]()
    config.smoke, config.outliers.source = True, "diffusion"
    config.evaluation.scores = ("energy", "mahalanobis", "knn")
    pipeline.run(config, workdir)
