"""Your own images: a folder with a folder of images for each class.

python -m oal_jax.main --config configs/own.py --config.data.root=DIR

DIR/CLASS/... is enough: images of any sizes, formats and numbers of channels, 2 to 1,000 classes.
Folders DIR/ood/NAME are OOD sets. What is 0, -1 or empty here is chosen from the images, printed
before the training, and written to config.json; any flag replaces it. Few images: give a pretrained
network, --config.student.weights=FILE (docs/data.md). `--config.method.name=oal` trains a teacher
first and needs no generator. `--check` lists what is wrong without training.
"""

from oal_jax.config import (
    Config,
    Data,
    Generator,
    Knn,
    Method,
    Outliers,
    Student,
    Teacher,
    Train,
)


def get_config() -> Config:
    """Cross-entropy on a folder of images."""
    config = Config()
    config.data = Data(source="own", id_set="own", shift=-1)
    config.method = Method(name="ce")
    config.student = Student(tune="", width=0, stem="")
    config.train = Train(epochs=0, batch_size=0, learning_rate=0.0, checkpoint_every=0)
    # For methods with a teacher or outliers.
    config.teacher = Teacher(
        train=True, architecture="resnet", patch=0, epochs=0, batch_size=0, views=-1
    )
    knn = Knn(
        features_per_class=0, neighbour=0, boundary_points=0, anchors=0, sigma=0.17, repeats=5
    )
    config.outliers = Outliers(source="knn", images="procedural", image_share=0.125, knn=knn)
    config.generator = Generator(
        train=True, vae_epochs=0, vae_batch_size=0, diffusion_epochs=0, batch_size=0
    )
    return config
