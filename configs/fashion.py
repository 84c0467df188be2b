"""OAL on the embedded data: eight garments of Fashion-MNIST are in-distribution.

python -m oal_jax.main --config configs/fashion.py
"""

from oal_jax.config import Config, Knn


def get_config() -> Config:
    """The embedded default."""
    config = Config()
    # The noise reaches as far as in the paper: sigma sqrt(768) = 1.94 there, sigma sqrt(128) here.
    config.outliers.knn = Knn(features_per_class=500, neighbour=300, sigma=0.17, repeats=5)
    return config
