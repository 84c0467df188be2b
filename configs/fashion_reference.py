"""OAL as its official code is, faults included, on the embedded data.

python -m oal_jax.main --config configs/fashion_reference.py

The k-NN rows that the mixed-up reshape returns, the first piece of the class word replaced, 50
PNDM steps at guidance 7.5, latents reduced to their mean over channels and height, both CLUB
terms paired at random and minimised jointly, the teacher run anew in every step, plain SGD at the
official rates without warm-up or clipping. The official student starts from a trained classifier:

python -m oal_jax.main --config configs/fashion.py --workdir runs/ce --config.method.name=ce
python -m oal_jax.main --config configs/fashion_reference.py --config.train.start=runs/ce

What differs: the data, the sizes of the networks, six epochs instead of 100, and features of the
teacher without augmentation.
"""

from oal_jax.config import Config, Knn, Latents, Method, Train


def get_config() -> Config:
    """The shipped algorithm; `kd` with the same training is its control."""
    config = Config()
    config.outliers.source = "diffusion"
    config.outliers.knn = Knn(sigma=0.17, selection="reference")
    config.latents = Latents(sampler="pndm", steps=50, guidance=7.5, injection="first_piece")
    config.method = Method(name="oal", micl="reference")
    config.teacher.views = 0
    config.train = Train(
        learning_rate=0.005, projector_rate=0.01, club_rate=1e-4, warmup=0.0, clip=0.0
    )
    return config
