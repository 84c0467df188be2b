"""Outlier exposure on the embedded data: uniform predictions on procedural images.

python -m oal_jax.main --config configs/fashion_ce.py --workdir runs/fashion_ce
python -m oal_jax.main --config configs/fashion_oe.py --workdir runs/fashion_oe \
    --config.train.start=runs/fashion_ce

Three epochs of fine-tuning; docs/results.md says what to expect.
"""

from oal_jax.config import Config, Method


def get_config() -> Config:
    """The method's defaults, with the student of `fashion.py`."""
    config = Config()
    config.method = Method(name="oe")
    config.train.epochs = 3
    config.train.learning_rate = 0.02
    return config
