"""OAL on ImageNet-1k at 224 px: ResNet-50, the official code's k-NN repeats and loss weights.

python -m oal_jax.main --config configs/imagenet1k.py --workdir runs/imagenet1k_ce \
    --config.data.root=DIR --config.method.name=ce --config.train.learning_rate=0.1
python -m oal_jax.main --config configs/imagenet1k.py --workdir runs/imagenet1k \
    --config.data.root=DIR --config.teacher.weights=FILE --config.generator.directory=SD \
    --config.train.start=runs/imagenet1k_ce

DIR is OpenOOD's data directory, FILE the model.safetensors of
timm/vit_base_patch16_224.augreg2_in21k_ft_in1k, whose head of 1000 classes is used as it is; SD:
as in cifar10.py. `--config.smoke=True` needs no files and has twenty classes.

The official code's pipeline for ImageNet is not in its repository, so no numbers are to expect;
time and memory: not measured. 2.5 million k-NN outliers take 3.8 GB of an accelerator's
memory. What differs: random shifts and flips of the central crop, not crops of random size.
"""

import runpy
from pathlib import Path

from oal_jax.config import Config


def get_config() -> Config:
    """The settings of imagenet200.py, but for what stands here."""
    config = runpy.run_path(str(Path(__file__).with_name("imagenet200.py")))["get_config"]()
    config.data.id_set = "imagenet"
    config.teacher.train = False
    config.latents.per_class = 1
    config.student.depth = 50
    return config
