"""OAL on CIFAR-100 at 32 px, like for like with OpenOOD's leaderboard: ResNet-18 from scratch.

python -m oal_jax.main --config configs/cifar100_32px.py \
    --config.data.root=DIR --config.teacher.weights=FILE --config.generator.directory=SD

DIR, FILE, SD, the commands of the baseline and of the control, and what differs: as in
cifar10_32px.py and cifar100.py.

Expect of ce (OpenOOD's leaderboard, 3 runs): energy AUROC near 80.91 +- 0.08, far 79.77 +- 0.61;
MSP near 80.27 +- 0.11, far 77.76 +- 0.44; KNN near 80.18 +- 0.15, far 82.40 +- 0.17; ID accuracy
77.25 %. Of OAL at 32 px nothing is published; time and memory: not measured.
"""

import runpy
from pathlib import Path

from oal_jax.config import Config


def get_config() -> Config:
    """The settings of cifar10_32px.py, but for what stands here."""
    config = runpy.run_path(str(Path(__file__).with_name("cifar10_32px.py")))["get_config"]()
    config.data.id_set = "cifar100"
    config.outliers.knn.repeats = 100
    config.latents.per_class = 3
    return config
