"""Energy fine-tuning on the embedded data: hinges on the energies of ID and procedural images.

python -m oal_jax.main --config configs/fashion_ce.py --workdir runs/fashion_ce
python -m oal_jax.main --config configs/fashion_energy.py --workdir runs/fashion_energy \
    --config.train.start=runs/fashion_ce

Three epochs of fine-tuning; docs/results.md says what to expect.
"""

from oal_jax.config import Config, Method


def get_config() -> Config:
    """The method's defaults, with the student of `fashion.py`."""
    config = Config()
    config.method = Method(name="energy")
    config.train.epochs = 3
    config.train.learning_rate = 0.02
    return config
