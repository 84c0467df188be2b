"""Every test runs on four virtual CPU devices, with rank promotion forbidden.

Nothing is kept in the user's directories: what is compiled goes with the tests' own.
"""

import os
import shutil
import tempfile
from pathlib import Path

# Read when JAX starts its backend, so they are set before anything imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
# A worker compiles a program once for all of its tests and their child processes.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="oal_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**31)  # only then its files are locked
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
    """The programs are of no use to another run."""
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The directory of a whole run, its student untrained; not to be changed."""
    from oal_jax import pipeline
    from oal_jax.config import Config
    from oal_jax.training import session

    config = Config(smoke=True)
    config.method.name = "ce"
    config.evaluation.scores = ("energy", "mahalanobis", "knn")
    with pytest.MonkeyPatch.context() as patch:
        # Compiling a train step would take most of the time.
        patch.setattr(session, "train", lambda step, state, *_, **__: state)
        return pipeline.run(config, tmp_path_factory.mktemp("finished") / "run")
