"""Unleashing Mask on CIFAR-100, as published (arXiv 2306.03715): DenseNet-BC-100-12, 100 epochs.

python -m oal_jax.main --config configs/cifar100_um.py --workdir runs/cifar100_ce \
    --config.data.root=DIR --config.method.name=ce
python -m oal_jax.main --config configs/cifar100_um.py --workdir runs/cifar100_um \
    --config.data.root=DIR --config.train.start=runs/cifar100_ce

DIR is OpenOOD's data directory. The first command trains the classifier in the same way, by
cross-entropy alone. For an accelerator: 100 epochs are 8.6e15 multiplications and additions, and
were not run here. What differs from the paper's code: an epoch leaves out its last, partial batch,
and running variances are the biased ones.
"""

import runpy
from pathlib import Path

from oal_jax.config import Config


def get_config() -> Config:
    """The settings of cifar10_um.py, but for what stands here."""
    config = runpy.run_path(str(Path(__file__).with_name("cifar10_um.py")))["get_config"]()
    config.data.id_set = "cifar100"
    return config
