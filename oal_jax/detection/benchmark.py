"""The near/far protocol for any classifier, given as a function of images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from oal_jax import scores as post_hoc
from oal_jax.config.benchmarks import resolve
from oal_jax.data import sources
from oal_jax.detection.calibrate import (
    Labelled,
    check_classes,
    check_labelled,
    check_rows_are_independent,
)
from oal_jax.detection.images import check_images
from oal_jax.detection.parts import check_share
from oal_jax.errors import UserError
from oal_jax.evaluation import protocol
from oal_jax.evaluation.protocol import Evaluation, Inputs
from oal_jax.evaluation.search import search as search_parameters
from oal_jax.runtime import distributed
from oal_jax.scores.forward import as_forward
from oal_jax.scores.outputs import check as check_outputs


class Sets(NamedTuple):
    """Image sets of a benchmark: uint8 or floats in [0, 1], (n, h, w, c); dicts by set name."""

    train: Labelled  # ID: scores are fitted on it
    validation: Labelled  # ID: thresholds are set on it
    test: Labelled  # ID: what the others are compared with
    near: Mapping[str, Any] = {}  # near-OOD
    far: Mapping[str, Any] = {}  # far-OOD
    validation_ood: Mapping[str, Any] = {}  # for choosing parameters of scores
    csid: Mapping[str, Labelled] = {}  # covariate-shifted ID


def load_sets(
    id_set: str = "fashion",
    source: str = "bundled",
    root: str | None = None,
    train_images: int = 0,
    image_size: int = 0,
) -> Sets:
    """The sets of a benchmark in `oal_jax.config.benchmarks`, in memory.

    Args:
      id_set: "fashion" (inside the package), "cifar10", "cifar100", "imagenet200", "imagenet", or
        any set of the source: its validation OOD sets are then made from it, and it has no other.
      source, root, image_size: as for `oal_jax.data.sources.load`; OpenOOD's own directory is
        source "imglist".
      train_images: number of ID training images to read; 0: all.

    Raises:
      UserError: no such benchmark, or a set that is not there.
    """
    benchmark = resolve(id_set, source=source)

    def read(name, split, labelled=False, limit=0):
        data = sources.load(
            source,
            name,
            split,
            root=root,
            limit=limit,
            id_set=id_set,
            labelled=labelled,
            image_size=image_size,
        )
        return (data.images, data.labels) if labelled else data.images

    return Sets(
        train=read(id_set, "train", labelled=True, limit=train_images),
        validation=read(id_set, "validation", labelled=True),
        test=read(id_set, "test", labelled=True),
        near={name: read(name, "test") for name in benchmark.near},
        far={name: read(name, "test") for name in benchmark.far},
        validation_ood={name: read(name, "validation") for name in benchmark.validation},
        csid={name: read(name, "test", labelled=True) for name in benchmark.csid},
    )


def benchmark(
    forward: Callable,
    sets: Sets,
    scores: Sequence[str] = ("msp", "energy"),
    head: post_hoc.Head | tuple | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    search: bool = False,
    keep_id: float = 0.95,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> Evaluation:
    """How well scores separate ID from OOD inputs of your classifier.

    The outputs of every set are computed once for all scores.

    Args:
      forward: float images in [0, 1] to what `oal_jax.as_forward` takes: logits, and, for scores
        that read them, features and feature maps. Pure, traceable, in evaluation mode.
      sets: from `load_sets`, or made of your own images.
      scores: keys of `scores.SCORES`.
      head: (kernel (d, c), bias (c,)) of the last linear layer, for scores that read it.
      params: parameters of scores, by score name.
      search: choose the parameters of scores that have a grid, and none in `params`, on
        `sets.validation_ood`.
      keep_id: share of ID validation images that a threshold keeps.
      batch_size: images of a call of the model.
      mesh: the devices; None for all.

    Returns:
      The result; `print(oal_jax.evaluation.format_table(result.rows))` shows it.

    Raises:
      UserError: wrong images or labels, an unknown score, a missing output that a score needs, a
        model in training mode, a NaN.
    """
    check_share(keep_id)
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}")
    mesh = mesh or distributed.make_mesh()
    forward = distributed.place_parameters(as_forward(forward), mesh)
    params = dict(params or {})
    head = None if head is None else post_hoc.Head(*head)
    all_scores = [post_hoc.make(name, **params.get(name, {})) for name in scores]
    fields = sorted({field for score in all_scores for field in score.needs})
    groups = _groups(sets)
    if search and not sets.validation_ood:
        raise UserError("search=True needs OOD sets to choose on: give Sets(validation_ood={...})")

    train_images, _ = check_labelled(sets.train, "set ID train")
    shape = train_images.shape[1:]
    check_rows_are_independent(forward, train_images[:batch_size], mesh)

    def labelled(pair: Labelled, name: str) -> Inputs:
        images, labels = check_labelled(pair, f"set {name}", shape)
        data = unlabelled(images, name)
        check_classes(data.outputs, labels)
        return data._replace(labels=labels)

    def unlabelled(images, name: str) -> Inputs:
        try:
            images = check_images(images, shape)
            outputs = post_hoc.compute(forward, images, batch_size, fields, mesh)
            check_outputs(outputs, (), "the {}")
        except UserError as error:
            raise UserError(f"set {name}: {error}") from None
        return Inputs(outputs, lambda: images)

    id_sets = [
        labelled(getattr(sets, name), f"ID {name}") for name in ("train", "validation", "test")
    ]
    ood = {
        name: (labelled if group == protocol.CSID else unlabelled)(members[name], name)
        for group, members in _members(sets).items()
        for name in members
    }
    if search:
        validation = {name: ood[name] for name in sets.validation_ood}
        for name in scores:
            if name in post_hoc.GRIDS and name not in params:
                params[name], _ = search_parameters(
                    *(name, post_hoc.GRIDS[name], *id_sets[:2], validation),
                    *(head, forward, batch_size, mesh),
                )
    return protocol.evaluate(
        scores, *id_sets, ood, groups, head, forward, params, keep_id, batch_size, mesh
    )


def _members(sets: Sets) -> dict[str, Mapping[str, Any]]:
    return {
        "near": sets.near,
        "far": sets.far,
        "validation": sets.validation_ood,
        protocol.CSID: sets.csid,
    }


def _groups(sets: Sets) -> dict[str, str]:
    """The group of every set that is not ID."""
    groups: dict[str, str] = {}
    for group, members in _members(sets).items():
        for name in members:
            if name in groups:
                raise UserError(f"set {name!r} is in two groups: {groups[name]} and {group}")
            groups[name] = group
    return groups
