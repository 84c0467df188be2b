"""The near/far protocol for any classifier, given as a function of images."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from oal_jax import scores as post_hoc
from oal_jax.config.benchmarks import resolve
from oal_jax.data import own, sources
from oal_jax.detection.calibrate import (
    Labelled,
    check_classes,
    check_labelled,
    check_rows_are_independent,
)
from oal_jax.detection.images import check_images
from oal_jax.detection.model import (
    as_count,
    as_params,
    check_gradients,
    head_for,
    mesh_for,
    open_model,
    score_names,
)
from oal_jax.detection.parts import check_share
from oal_jax.errors import UserError
from oal_jax.evaluation import protocol
from oal_jax.evaluation.protocol import Evaluation, Inputs
from oal_jax.evaluation.search import search as search_parameters
from oal_jax.runtime import distributed
from oal_jax.scores import Score
from oal_jax.scores.forward import is_on_host
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
        Source "own" has one: the classes of the folder `root`, with `root`/ood/NAME as far sets.
      source, root, image_size: as for `oal_jax.data.sources.load`; OpenOOD's own directory is
        source "imglist".
      train_images: number of ID training images to read; 0: all.

    Raises:
      UserError: no such benchmark, or a set that is not there.
    """
    far: tuple[str, ...] = ()
    if source == own.NAME:
        if not root:
            raise UserError("source='own' reads a folder with a folder per class: give root=DIR")
        id_set, far = own.NAME, tuple(own.summarise(root, sample=0).ood)
    benchmark = resolve(id_set, far=far, source=source)

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
    model: Any,
    sets: Sets,
    scores: Sequence[str] | str = ("msp", "energy"),
    head: Any = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    search: bool = False,
    keep_id: float = 0.95,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> Evaluation:
    """How well scores separate ID from OOD inputs of your classifier.

    The outputs of every set are computed once for all scores.

    Args:
      model: as of `calibrate`.
      sets: from `load_sets`, or made of your own images. Labels of OOD sets are not read.
      scores: keys of `scores.SCORES`; or "all", which leaves out what this model can't give, with
        one line on stderr for each.
      head: as of `calibrate`.
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
    batch_size = as_count("batch_size", batch_size)
    params = _as_params(params)
    names = score_names(scores)
    scorers = [post_hoc.make(name, **params.get(name, {})) for name in names]
    groups = _groups(sets)
    if search and not sets.validation_ood:
        raise UserError("search=True needs OOD sets to choose on: give Sets(validation_ood={...})")
    train_images, _ = check_labelled(sets.train, "set ID train")
    shape = train_images.shape[1:]
    forward, head = open_model(model, head, train_images)
    if scores == "all":
        scorers = _possible(scorers, forward, train_images)
    for score in scorers:
        check_gradients(score, forward)
    mesh = mesh_for(forward, mesh)
    forward = distributed.place_parameters(forward, mesh)
    fields = sorted({field for score in scorers for field in score.needs})
    check_rows_are_independent(forward, train_images[:batch_size], mesh)

    def labelled(pair: Labelled, name: str) -> Inputs:
        images, labels = check_labelled(pair, f"set {name}", shape)
        data = unlabelled(images, name)
        check_classes(data.outputs, labels)
        return data._replace(labels=labels)

    def unlabelled(images, name: str) -> Inputs:
        if isinstance(images, tuple) and len(images) == 2 and np.ndim(images[1]) == 1:
            images, _ = images
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
    head = head_for(scorers, head, forward, id_sets[0].outputs, train_images)
    if scores == "all":
        scorers = _fitting(scorers, *id_sets[:2], head, mesh)
    names = [score.name for score in scorers]
    ood = {
        name: (labelled if group == protocol.CSID else unlabelled)(members[name], name)
        for group, members in _members(sets).items()
        for name in members
    }
    if search:
        validation = {name: ood[name] for name in sets.validation_ood}
        for name in names:
            if name in post_hoc.GRIDS and name not in params:
                params[name], _ = search_parameters(
                    *(name, post_hoc.GRIDS[name], *id_sets[:2], validation),
                    *(head, forward, batch_size, mesh),
                )
    return protocol.evaluate(
        names, *id_sets, ood, groups, head, forward, params, keep_id, batch_size, mesh
    )


def _possible(scorers: list[Score], forward: Partial, images) -> list[Score]:
    """The scores whose outputs this model gives; the others are named on stderr."""
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), np.float32)
    outputs = jax.eval_shape(forward, one)

    def problem(score):
        missing = [field for field in score.needs if getattr(outputs, field) is None]
        if missing:
            return f"the model gives no {' and '.join(missing)}"
        return "the model has no gradients" if score.perturb and is_on_host(forward) else ""

    return [score for score in scorers if not _left_out(score, problem(score))]


def _fitting(scorers: list[Score], train: Inputs, validation: Inputs, head, mesh) -> list[Score]:
    """The scores that can be fitted on these sets; the others are named on stderr."""

    def problem(score):
        try:
            protocol.fit(score, train, validation, head, mesh)
        except UserError as error:
            return str(error)
        return ""

    return [score for score in scorers if not _left_out(score, problem(score))]


def _left_out(score: Score, problem: str) -> bool:
    if problem:
        print(f"oal_jax: score {score.name} is left out: {problem}", file=sys.stderr)
    return bool(problem)


def _as_params(params: Any) -> dict[str, dict[str, Any]]:
    """Parameters by score name."""
    params = as_params(params, '{"knn": {"k": 5}}')
    return {name: as_params(value, f'{{"{name}": {{"k": 5}}}}') for name, value in params.items()}


def _members(sets: Sets) -> dict[str, Mapping[str, Any]]:
    if not isinstance(sets, Sets):
        raise UserError(f"sets must be oal_jax.Sets(train=..., ...), is a {type(sets).__name__}")
    for name in ("near", "far", "validation_ood", "csid"):
        group = getattr(sets, name)
        if not isinstance(group, Mapping):
            raise UserError(
                f"{name} must be a dict of sets by name, {name}={{'NAME': images}}, is a"
                f" {type(group).__name__}"
            )
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
