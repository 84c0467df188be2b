"""OAL on ImageNet-200 at 224 px, with the settings that the official code has for CIFAR.

python -m oal_jax.main --config configs/imagenet200.py --workdir runs/imagenet200_ce \
    --config.data.root=DIR --config.method.name=ce --config.train.learning_rate=0.1
python -m oal_jax.main --config configs/imagenet200.py --workdir runs/imagenet200 \
    --config.data.root=DIR --config.teacher.weights=FILE --config.generator.directory=SD \
    --config.train.start=runs/imagenet200_ce

DIR is OpenOOD's data directory; FILE and SD: as in cifar100.py. The words of the classes come from
the ids in the paths of OpenOOD's list. `--config.smoke=True` needs no files.

OAL on ImageNet-200 is in no table that is at hand; numbers, time and memory: not measured. Half a
million k-NN outliers take 0.8 GB of an accelerator's memory. What differs from OpenOOD: random
shifts and flips of the central crop, not crops of random size.
"""

import runpy
from pathlib import Path

from oal_jax.config import Config


def get_config() -> Config:
    """The settings of cifar10.py, but for what stands here."""
    config = runpy.run_path(str(Path(__file__).with_name("cifar10.py")))["get_config"]()
    config.data.id_set = "imagenet200"
    config.data.stream = True  # read from disk as it is wanted
    config.data.shift = 16
    config.outliers.knn.repeats = 25
    config.latents.per_class = 3
    config.train.batch_size = 256
    return config
