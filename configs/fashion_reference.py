"""OAL as its official code is, faults included, on the embedded data.

python -m oal_jax.main --config configs/fashion_reference.py

The k-NN rows that the mixed-up reshape returns, the first piece of the class word replaced, 50
PNDM steps at guidance 7.5, latents reduced to their mean over channels and height, both CLUB
terms paired at random and minimised jointly, the teacher run in every step, plain SGD at the
official rates without warm-up or clipping. The official student starts from a trained classifier:

python -m oal_jax.main --config configs/fashion.py --workdir runs/ce --config.method.name=ce
python -m oal_jax.main --config configs/fashion_reference.py --config.train.start=runs/ce

What differs: the data, the sizes of the networks, six epochs instead of 100, and features of the
teacher without augmentation.
"""

from oal_jax.config import Config, Knn, Latents, Train, reference_faults


def get_config() -> Config:
    """The shipped algorithm; `kd` with the same training is its control."""
    config = Config()
    config.outliers.source = "diffusion"
    config.outliers.knn = Knn(sigma=0.17)
    config.latents = Latents(sampler="pndm", steps=50, guidance=7.5)
    config.method.kd.projector_rate = 0.01
    config.teacher.views = 0
    config.train = Train(learning_rate=0.005, warmup=0.0, clip=0.0)
    return reference_faults(config)
