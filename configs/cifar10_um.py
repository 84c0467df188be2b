"""Unleashing Mask on CIFAR-10, as published (arXiv 2306.03715): DenseNet-BC-100-12, 100 epochs.

python -m oal_jax.main --config configs/cifar10_um.py --workdir runs/cifar10_ce \
    --config.data.root=DIR --config.method.name=ce
python -m oal_jax.main --config configs/cifar10_um.py --workdir runs/cifar10_um \
    --config.data.root=DIR --config.train.start=runs/cifar10_ce

DIR is OpenOOD's data directory. The first command trains the classifier in the same way, by
cross-entropy alone. For an accelerator: 100 epochs are 8.6e15 multiplications and additions, and
were not run here. What differs from the paper's code: an epoch leaves out its last, partial batch,
and running variances are the biased ones.
"""

from oal_jax.config import Config, Data, Method, Student, Train


def get_config() -> Config:
    """The paper's settings; `method.um.n_masks=3` steadies the estimate."""
    config = Config()
    config.data = Data(source="imglist", id_set="cifar10", shift=4)
    config.teacher.views = 0  # a new augmented view of each image in every epoch
    config.method = Method(name="um")
    config.method.um.n_masks = 1
    config.student = Student(
        architecture="densenet", depth=100, width=12, affine_bn=False, dropout=0.3
    )
    config.train = Train(
        epochs=100,
        batch_size=256,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=False,
        schedule="per_epoch",
        weight_decay=1e-4,
        warmup=0.0,
        floor=0.0,
        clip=0.0,
    )
    config.evaluation.batch_size = 512
    return config
