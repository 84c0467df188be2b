"""UMAP on CIFAR-100, as published (arXiv 2306.03715): a mask of 80 % on DenseNet-BC-100-12.

python -m oal_jax.main --config configs/cifar100_um.py --workdir runs/cifar100_ce \
    --config.data.root=DIR --config.method.name=ce
python -m oal_jax.main --config configs/cifar100_umap.py --workdir runs/cifar100_umap \
    --config.data.root=DIR --config.train.start=runs/cifar100_ce

DIR is OpenOOD's data directory. What differs from the paper's code is said in cifar100_um.py.
Its config for CIFAR-100 also trains the weights (`--config.method.freeze=False`) and starts from
the epoch that is best on the test images; here both sets have the weights held and the last epoch.
"""

from oal_jax.config import Config, Data, Method, Student, Train


def get_config() -> Config:
    """The paper's settings; `method.n_masks=3` steadies the estimate."""
    config = Config()
    config.data = Data(source="imglist", id_set="cifar100", shift=4)
    config.teacher.views = 0  # a new augmented view of each image in every epoch
    config.method = Method(name="umap", n_masks=1)
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
    return config
