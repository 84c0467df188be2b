"""UMAP on CIFAR-10, as published (arXiv 2306.03715): a mask of 80 % on DenseNet-BC-100-12.

python -m oal_jax.main --config configs/cifar10_um.py --workdir runs/cifar10_ce \
    --config.data.root=DIR --config.method.name=ce
python -m oal_jax.main --config configs/cifar10_umap.py --workdir runs/cifar10_umap \
    --config.data.root=DIR --config.train.start=runs/cifar10_ce

DIR is OpenOOD's data directory. What differs from the paper's code is said in cifar10_um.py.
"""

import runpy
from pathlib import Path

from oal_jax.config import Config


def get_config() -> Config:
    """The settings of cifar10_um.py, but for what stands here."""
    config = runpy.run_path(str(Path(__file__).with_name("cifar10_um.py")))["get_config"]()
    config.method.name = "umap"
    return config
