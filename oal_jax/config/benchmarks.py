"""The image sets of each OOD benchmark.

Near-OOD sets resemble the in-distribution (ID) classes, far-OOD sets do not (OpenOOD,
arXiv 2210.07242). Covariate-shifted ID sets show the ID classes in another style or quality;
full-spectrum detection counts them as ID (arXiv 2204.05306). The validation OOD sets are for
choosing hyper-parameters and share no image with the near and far sets. Those of `fashion` are of
other kinds too; those of OpenOOD v1.5 (arXiv 2306.09301) are held-out images of one of these sets.
"""

from collections.abc import Sequence
from typing import NamedTuple

from oal_jax.errors import UserError

NO_SETS = ("none",)  # empties a group of the benchmark
# Validation sets of an ID set whose benchmark has none; `oal_jax.data.made` makes them of it.
MADE = ("made_rotated", "made_jigsaw", "made_blended", "made_noise", "made_shapes")
# Sets of the ID classes that `data.leave_out` takes out, by group.
LEFT_OUT = {"near": "left_out", "validation": "val_left_out"}


class Benchmark(NamedTuple):
    """Names of image sets, as `oal_jax.data.sources.load` takes them; no name twice.

    Attributes:
      id_set: the in-distribution set, with splits `train`, `validation` and `test`. The bundled one
        has `extra` too: more training images for the teacher and the generator.
      near: near-OOD sets, split `test`.
      far: far-OOD sets, split `test`.
      validation: OOD sets for choosing hyper-parameters, split `validation`.
      csid: covariate-shifted ID sets with labels as those of the ID set, split `test`.
    """

    id_set: str
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    csid: tuple[str, ...] = ()


_CIFAR_FAR = ("mnist", "svhn", "texture", "places365")
_IMAGENET = Benchmark(
    id_set="imagenet",
    near=("ssb_hard", "ninco"),
    far=("inaturalist", "textures", "openimage_o"),
    validation=("val_openimage_o",),
    csid=("imagenet_v2", "imagenet_c", "imagenet_r"),
)
# All but "fashion" are OpenOOD v1.5's, read by source "imglist" from its own directory.
BENCHMARKS = {
    "fashion": Benchmark(
        id_set="fashion",
        near=("sandal", "bag"),
        far=("mnist", "letters", "photos"),
        validation=("val_rotated", "val_jigsaw", "val_blend", "val_shapes", "val_noise"),
        csid=(
            *("fashion_gaussian", "fashion_blur", "fashion_contrast"),
            *("fashion_jpeg", "fashion_pixelate"),
        ),
    ),
    # OpenOOD's download of the CIFAR-10 benchmark lacks cifar10c (download it under "misc"). It has
    # a list of cinic10 too, for data.csid=cinic10.
    "cifar10": Benchmark("cifar10", ("cifar100", "tin"), _CIFAR_FAR, ("val_tin",), ("cifar10c",)),
    "cifar100": Benchmark("cifar100", ("cifar10", "tin"), _CIFAR_FAR, ("val_tin",)),
    "imagenet200": _IMAGENET._replace(id_set="imagenet200"),
    "imagenet": _IMAGENET,
}


def split_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names as a flag gives them: "a,b" is two."""
    return tuple(part.strip() for name in names for part in name.split(","))


def resolve(
    id_set: str,
    near: Sequence[str] = (),
    far: Sequence[str] = (),
    validation: Sequence[str] = (),
    csid: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    source: str = "bundled",
) -> Benchmark:
    """The benchmark of an ID set, with some of its groups replaced.

    Args:
      id_set: a key of `BENCHMARKS`, or any set. Its validation sets are then `MADE` unless
        `validation` names others. Sources with fixed sets want near- or far-OOD sets too.
      near: sets of the group, `NO_SETS`, or nothing for those of the benchmark. "a,b" is two sets,
        as a flag gives them.
      far: as `near`; so are `validation` and `csid`.
      validation: as `near`.
      csid: as `near`.
      leave_out: classes to take out of the ID set; if any, the sets `LEFT_OUT` are added.
      source: where the sets come from, as `data.source`.

    Raises:
      UserError: an ID set that the source does not have and no OOD sets, or a set in two places.
    """
    replaced = {
        group: split_names(names)
        for group, names in zip(Benchmark._fields[1:], (near, far, validation, csid), strict=True)
    }
    named = source in ("bundled", "imglist")
    if named and id_set not in BENCHMARKS and not (near or far or leave_out):
        raise UserError(
            f"config data.id_set='{id_set}' has no benchmark: give its OOD sets as data.near and"
            f" data.far, or choose one of {', '.join(BENCHMARKS)}"
        )
    benchmark = BENCHMARKS.get(id_set, Benchmark(id_set, validation=MADE))._replace(
        **{group: () if names == NO_SETS else names for group, names in replaced.items() if names}
    )
    if leave_out:
        more = {group: (*getattr(benchmark, group), name) for group, name in LEFT_OUT.items()}
        benchmark = benchmark._replace(**more)
    places: dict[str, str] = {benchmark.id_set: "id_set"}
    for group in replaced:
        for name in getattr(benchmark, group):
            if name in places:
                raise UserError(
                    f"image set '{name}' is in data.{places[name]} and in data.{group}: name"
                    " different sets, validation sets different from those that are reported"
                )
            places[name] = group
    return benchmark
