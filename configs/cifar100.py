"""OAL on CIFAR-100 at 224 px, as its official code is (arXiv 2406.16525), faults included.

python -m oal_jax.main --config configs/cifar100.py --workdir runs/cifar100_ce \
    --config.data.root=DIR --config.method.name=ce --config.train.learning_rate=0.1
python -m oal_jax.main --config configs/cifar100.py --workdir runs/cifar100 \
    --config.data.root=DIR --config.teacher.weights=FILE --config.generator.directory=SD \
    --config.train.start=runs/cifar100_ce

DIR, SD and what differs: as in cifar10.py; FILE is of
timm/vit_base_patch16_224.augreg2_in21k_ft_in1k.

Expect (OpenOOD's leaderboard, energy score, 3 runs): AUROC near 82.03 +- 1.19, far 84.03 +- 1.70,
ID accuracy 76.89 +- 0.20 %. For one accelerator: the training images take 7.5 GB of its memory, a
million k-NN outliers 1.5 GB. Time: not measured.
"""

import runpy
from pathlib import Path

from oal_jax.config import Config


def get_config() -> Config:
    """The settings of cifar10.py, but for what stands here."""
    config = runpy.run_path(str(Path(__file__).with_name("cifar10.py")))["get_config"]()
    config.data.id_set = "cifar100"
    config.outliers.knn.repeats = 100
    config.latents.per_class = 3
    return config
