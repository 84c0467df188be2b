"""NPOS on the embedded data: outliers at the boundary of each class in feature space.

python -m oal_jax.main --config configs/fashion_npos.py --workdir runs/fashion_npos

From scratch, as `fashion_ce.py`; docs/results.md says what to expect.
"""

from oal_jax.config import Config, Method


def get_config() -> Config:
    """The method's defaults, with the student of `fashion.py`."""
    config = Config()
    config.method = Method(name="npos")
    return config
