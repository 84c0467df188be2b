"""Tests run on one CPU device (tests/distributed: on four), with rank promotion forbidden.

Compiling is most of their cost, so XLA optimises little, and all workers and child processes of a
run share what was compiled. Nothing is kept in the user's directories.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# JAX reads these when it is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["USE_TORCH"] = "AUTO"  # commands run within tests would leave it out for the others
if "OAL_JAX_TEST_PROGRAMS" not in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
    directory = tempfile.mkdtemp(prefix="oal_jax_tests_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["OAL_JAX_TEST_PROGRAMS"] = directory  # set it to keep programs between runs
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["OAL_JAX_TEST_PROGRAMS"]
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**31)  # only then its files are locked
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The directory of a whole run, its student untrained; not to be changed."""
    from oal_jax.config import Config
    from oal_jax.stages import run as pipeline
    from oal_jax.training import session

    config = Config(smoke=True)
    config.method.name = "ce"
    config.evaluation.scores = ("energy", "mahalanobis", "knn")
    with pytest.MonkeyPatch.context() as patch:
        # Compiling a train step would take most of the time.
        patch.setattr(session, "train", lambda step, state, *_, **__: state)
        return pipeline.run(config, tmp_path_factory.mktemp("finished") / "run")
