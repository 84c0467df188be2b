"""Every test runs on four virtual CPU devices, with rank promotion forbidden.

Nothing is kept in the user's directories.
"""

import os
from pathlib import Path

# Read when JAX starts its backend, so they are set before anything imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # what is compiled is not kept
os.environ["USE_TORCH"] = "AUTO"  # commands run within tests would leave it out for the others

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


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
