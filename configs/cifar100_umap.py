"""UMAP on CIFAR-100, as published (arXiv 2306.03715): a mask of 80 % on DenseNet-BC-100-12.

python -m oal_jax.main --config configs/cifar100_um.py --workdir runs/cifar100_ce \
    --config.data.root=DIR --config.method.name=ce
python -m oal_jax.main --config configs/cifar100_umap.py --workdir runs/cifar100_umap \
    --config.data.root=DIR --config.train.start=runs/cifar100_ce

DIR is OpenOOD's data directory. What differs from the paper's code is said in cifar100_um.py.
Its config for CIFAR-100 also trains the weights (`--config.method.freeze=False`) and starts from
the epoch that is best on the test images; here both sets have the weights held and the last epoch.
"""

import runpy
from pathlib import Path

from oal_jax.config import Config


def get_config() -> Config:
    """The settings of cifar10_um.py, but for what stands here."""
    config = runpy.run_path(str(Path(__file__).with_name("cifar10_um.py")))["get_config"]()
    config.data.id_set = "cifar100"
    config.method.name = "umap"
    return config
