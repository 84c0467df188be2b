"""Which image sets an OOD benchmark consists of.

Near-OOD sets resemble the in-distribution (ID) classes, far-OOD sets do not (OpenOOD,
arXiv 2210.07242). The validation OOD sets choose hyper-parameters; they share neither images nor
families with the near and far sets, so that nothing is tuned on what is reported.
"""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """Names of image sets, as `oal_jax.data.sources.load` takes them.

    Attributes:
      id_set: the in-distribution set, with splits `train`, `extra` (more training images, for the
        teacher and the generator alone), `validation` and `test`.
      near: near-OOD sets, split `test`.
      far: far-OOD sets, split `test`.
      validation: OOD sets for choosing hyper-parameters, split `validation`.
    """

    id_set: str
    near: tuple[str, ...]
    far: tuple[str, ...]
    validation: tuple[str, ...]


BENCHMARKS = {
    "fashion": Benchmark(
        id_set="fashion",
        near=("sandal", "bag"),
        far=("mnist", "letters", "photos"),
        validation=("val_rotated", "val_jigsaw", "val_blend", "val_shapes", "val_noise"),
    ),
}
