"""WOODS on the embedded data: learning from a wild mixture of unlabelled ID and outliers.

python -m oal_jax.main --config configs/fashion_ce.py --workdir runs/fashion_ce
python -m oal_jax.main --config configs/fashion_woods.py --workdir runs/fashion_woods \
    --config.train.start=runs/fashion_ce

Three epochs of fine-tuning; docs/results.md says what to expect.
"""

from oal_jax.config import Config, Method


def get_config() -> Config:
    """The method's defaults, with the student of `fashion.py`."""
    config = Config()
    config.method = Method(name="woods")
    config.train.epochs = 3
    config.train.learning_rate = 0.02
    return config
