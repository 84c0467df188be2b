"""What a run must know of its ID set before any image is decoded."""

import dataclasses

import numpy as np
from jaxtyping import Int

from oal_jax.config import GENERATED, Data
from oal_jax.config.class_names import CLASS_NAMES, FASHION, generated_names
from oal_jax.data import generated, openood
from oal_jax.data.image_files import Decoding
from oal_jax.data.leave_out import relabelled
from oal_jax.data.sources import open_source
from oal_jax.data.stored import SetSpec
from oal_jax.errors import UserError

# Training images of the ID sets whose sizes are known without their files.
_COUNTS = {
    "fashion": 12_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "imagenet200": 258_951,
    "imagenet": 1_281_167,
}


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Classes and sizes of an ID set.

    Attributes:
      name: the set, as `data.id_set` names it.
      class_names: the classes that labels 0, 1, ... mean.
      decoding: how a file becomes an image, of one size.
      num_train: images that the student trains on.
      all_class_names: the classes of the whole set, before `data.leave_out`.
    """

    name: str
    class_names: tuple[str, ...]
    decoding: Decoding
    num_train: int
    all_class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        return (*self.decoding.crop, self.decoding.channels)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def kept_labels(self) -> Int[np.ndarray, " c"]:
        """Label of each class in the whole set; 0, 1, ... unless classes are left out."""
        return np.array([self.all_class_names.index(name) for name in self.class_names])


def read_info(spec: SetSpec) -> DatasetInfo:
    """The info of an ID set, from its files. Decodes no image.

    Reads the header of one image if neither the source nor `image_size` determines the size of the
    images, and all labels if classes are left out.

    Args:
      spec: the train split, with the student's `limit`.

    Raises:
      UserError: the set is missing or damaged, or has no class of a name in `leave_out`.
    """
    if spec.source == GENERATED:
        whole = generated_names(spec.name)
        names = relabelled(whole, spec.leave_out)[1]
        side, count = spec.image_size or generated.SIZE, generated.PER_CLASS * len(names)
        decoding = Decoding.to_shape((side, side, 3))
        return DatasetInfo(spec.name, names, decoding, spec.limit or count, whole)
    train = open_source(spec)
    whole = open_source(dataclasses.replace(spec, leave_out=())) if spec.leave_out else train
    decoding = train.decoding
    if decoding.crop is None:
        decoding = Decoding.to_shape(train.image_shape())
    return DatasetInfo(spec.name, train.class_names, decoding, len(train), whole.class_names)


def known_info(data: Data) -> DatasetInfo:
    """The info of a well-known ID set, or of a generated one, without any files.

    Raises:
      UserError: the sizes of the set are not known here.
    """
    if data.leave_out:
        raise UserError(
            "config data.leave_out: how many images are left is known from the files alone; compile"
            " the config without it"
        )
    name = data.id_set
    if data.source == GENERATED:
        side, names = data.image_size or generated.SIZE, generated_names(name)
        count = data.train_images or generated.PER_CLASS * len(names)
        return DatasetInfo(name, names, Decoding.to_shape((side, side, 3)), count, names)
    if name not in _COUNTS:
        raise UserError(
            f"config data.id_set='{name}': the sizes of this set are in its files alone; known"
            f" without them: {', '.join(_COUNTS)}"
        )
    count = min(data.train_images or _COUNTS[name], _COUNTS[name])
    if name == "fashion":
        return DatasetInfo(name, FASHION, Decoding.to_shape((28, 28, 1)), count, FASHION)
    names = CLASS_NAMES[name]
    decoding = openood.decoding(name, name, data.image_size, data.channels or 3)
    return DatasetInfo(name, names, decoding, count, names)
