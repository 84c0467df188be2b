"""OAL on CIFAR-10 at 32 px, like for like with OpenOOD's leaderboard: ResNet-18 from scratch.

python -m oal_jax.main --config configs/cifar10_32px.py \
    --config.data.root=DIR --config.teacher.weights=FILE --config.generator.directory=SD
python -m oal_jax.main --config configs/cifar10_32px.py --workdir runs/cifar10_32px_ce \
    --config.data.root=DIR --config.method.name=ce
python -m oal_jax.main --config configs/cifar10_32px.py --workdir runs/cifar10_32px_kd \
    --config.data.root=DIR --config.teacher.weights=FILE --config.method.name=kd

DIR, FILE and SD: as in cifar10.py. The second command is the baseline, the third the control that
has the teacher and no outliers. The student sees 32 px, as on the leaderboard; the ViT sees the
same images enlarged to its own 224 px, on the device. `--config.smoke=True` needs no files.

Expect of ce (OpenOOD's leaderboard, 3 runs): energy AUROC near 87.58 +- 0.46, far 91.21 +- 0.92;
MSP near 88.03 +- 0.25, far 90.73 +- 0.43; KNN near 90.64 +- 0.20, far 92.96 +- 0.14; ID accuracy
95.06 %. Of OAL at 32 px nothing is published; time and memory: not measured. What differs from
OpenOOD: shifts by up to 4 pixels, zeros entering, are its padded crop; the warm-up and the clipped
gradient are this project's; an epoch leaves out its last, partial batch.
"""

from oal_jax.config import (
    Config,
    Data,
    Generator,
    Latents,
    Method,
    Outliers,
    Student,
    Teacher,
    Train,
)


def get_config() -> Config:
    """This project's form of OAL on the leaderboard's student, images and length."""
    config = Config()
    config.data = Data(source="imglist", id_set="cifar10", image_size=32, shift=4)
    config.teacher = Teacher(
        weights="vit_base_patch16_224.safetensors",
        train=True,
        patch=16,
        width=768,
        depth=12,
        heads=12,
        mlp_ratio=4.0,
        epochs=50,
        views=8,  # cached: the ViT would take nearly all of a step's time
    )
    config.generator = Generator(
        directory="hub:CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b"
    )
    config.outliers = Outliers(source="knn")
    config.latents = Latents(per_class=30, steps=20, guidance=7.5, chunk=768)
    config.method = Method(name="oal")
    config.student = Student(depth=18, width=64, stem="cifar")
    config.train = Train(epochs=100, learning_rate=0.1, floor=1e-5, log_every=100)
    config.evaluation.batch_size = 512
    return config
