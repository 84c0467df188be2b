"""LogitNorm on the embedded data: cross-entropy on logits of one length.

python -m oal_jax.main --config configs/fashion_logitnorm.py --workdir runs/fashion_logitnorm

From scratch, as `fashion_ce.py`; docs/results.md says what to expect.
"""

from oal_jax.config import Config, Method


def get_config() -> Config:
    """The method's defaults, with the student of `fashion.py`."""
    config = Config()
    config.method = Method(name="logitnorm")
    return config
