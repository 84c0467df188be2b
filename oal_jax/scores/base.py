"""The type of a post-hoc score, and the functions that fit and apply one.

A score is a NamedTuple of pure functions. `fit` turns the outputs of an ID set into a state, a dict
of arrays that can be saved, sharded and exported. `score` turns a state and the outputs of any
inputs into one `ood_score` an input. **Higher always means more OOD.** Parameters are arguments of
the factory that makes the score, and enter the state or the shapes from there. So a search over
them never reads a state that was fitted with other parameters.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from oal_jax.errors import UserError
from oal_jax.runtime import batched, distributed
from oal_jax.runtime.ops import to_unit
from oal_jax.scores.outputs import Forward, Outputs, as_pytree, check

State = Mapping[str, Array]


class Head(NamedTuple):
    """The last linear layer: `logits = features @ kernel + bias`."""

    kernel: Float[Array, "d c"]
    bias: Float[Array, " c"]


class Score(NamedTuple):
    """A post-hoc OOD score; see the module's docstring.

    `fit(outputs, labels, head, mesh) -> state` runs once, on the host's arrays of the ID set
    `fit_on`; statistics of large sets are computed on the devices of `mesh`.
    `score(state, outputs) -> (n,)` is traceable, works row by row, and gives ood_scores.
    `perturb(state, forward, images) -> outputs`, if not None, moves the images along a gradient and
    returns the outputs of the moved images, which `score` then reads. Traceable, row by row.
    """

    fit: Callable[[Outputs, Int[np.ndarray, " n"], Head | None, Mesh], State]
    score: Callable[[State, Outputs], Float[Array, " n"]]
    needs: tuple[str, ...] = ()  # fields of `Outputs` that it reads besides the logits
    needs_head: bool = False
    fit_on: str = "train"  # or "validation": what the publication fits it on
    perturb: Callable[[State, Forward, Float[Array, "n h w c"]], Outputs] | None = None
    name: str = ""  # for error messages; `make` sets it


def fit(
    score: Score,
    outputs: Outputs,
    labels,
    head: Head | None = None,
    set_name: str = "ID train",
    mesh: Mesh | None = None,
) -> State:
    """Check the outputs of an ID set, then fit `score` on them.

    Args:
      score: from `oal_jax.scores.make`.
      outputs: of n ID inputs, of the set that `score.fit_on` names.
      labels: (n,) class indices.
      head: the last linear layer of the classifier; None unless `score.needs_head`.
      set_name: name of the set in error messages.
      mesh: the devices; None for all.

    Returns:
      The state, a dict of arrays on the default device.

    Raises:
      UserError: wrong shapes, a NaN or an infinity in the outputs, outputs or a head that the
        score needs are missing, or too few inputs for the score.
    """
    outputs = check(outputs, score.needs, f"{score.name}: the {{}} of {set_name}")
    labels = np.asarray(labels)
    count = len(outputs.logits)
    if labels.shape != (count,):
        raise UserError(
            f"{score.name}: {set_name} has {count} outputs but labels of shape {labels.shape}"
        )
    if not count:
        raise UserError(f"{score.name}: {set_name} has no inputs to fit on")
    if score.needs_head:
        head = _checked_head(score, outputs, head)
    return jax.device_put(score.fit(outputs, labels, head, mesh or distributed.make_mesh()))


def apply(
    score: Score,
    state: State,
    outputs: Outputs,
    batch_size: int | None = None,
    set_name: str = "inputs",
    mesh: Mesh | None = None,
) -> Float[np.ndarray, " n"]:
    """The ood_score of every input, `batch_size` at a time, split over the devices.

    A score compiles once for a batch size, whatever the sizes of the sets.

    Args:
      score: from `oal_jax.scores.make`.
      state: what `fit` returned for this score.
      outputs: of n inputs; other fields than `score.needs` are ignored.
      batch_size: rows a call; rounded up to a multiple of the devices. None: 1024, or 8192 for a
        score that reads the logits alone.
      set_name: name of the set in error messages.
      mesh: the devices; None for all.

    Returns:
      (n,) float32, higher = more OOD.

    Raises:
      UserError: wrong shapes, a NaN or an infinity, or a missing field.
    """
    outputs = check(outputs, score.needs, f"{score.name}: the {{}} of {set_name}")
    mesh = mesh or distributed.make_mesh()
    run = partial(_score_rows, score.score, distributed.replicate(state, mesh))
    batch_size = batch_size or (1024 if score.needs else 8192)
    return batched.apply(run, [outputs], batch_size, mesh)


def apply_to_images(
    score: Score,
    state: State,
    forward: Forward,
    images: np.ndarray,
    batch_size: int = 512,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, " n"]:
    """The ood_score of every image, after `score.perturb` if the score has one.

    Args:
      score: from `oal_jax.scores.make`.
      state: what `fit` returned for this score.
      forward: pure; float32 images in [0, 1] to `Outputs`.
      images: (n, h, w, c), uint8 or floats in [0, 1].
    """
    mesh = mesh or distributed.make_mesh()
    forward = distributed.place_parameters(as_pytree(forward), mesh)
    run = partial(_score_images, score, forward, distributed.replicate(state, mesh))
    return batched.apply(run, [images], batch_size, mesh)


@partial(jax.jit, static_argnums=0)
def _score_rows(score_fn, state, outputs):
    return score_fn(state, outputs)


@partial(jax.jit, static_argnums=0)
def _score_images(score: Score, forward: Forward, state, images):
    images = to_unit(images)
    perturb = score.perturb or (lambda state, forward, images: forward(images))
    return score.score(state, perturb(state, forward, images))


def _checked_head(score: Score, outputs: Outputs, head: Head | None) -> Head:
    if head is None:
        raise UserError(
            f"{score.name} needs the last linear layer, and none was found; give head=(kernel,"
            " bias), or take another score"
        )
    head = Head(*(np.asarray(x, np.float32) for x in head))
    classes = outputs.logits.shape[1]
    width = head.kernel.shape[0] if outputs.features is None else outputs.features.shape[1]
    if head.kernel.shape != (width, classes) or head.bias.shape != (classes,):
        raise UserError(
            f"{score.name}: the head has shapes {head.kernel.shape} and {head.bias.shape}; features"
            f" of width {width} and {classes} logits want ({width}, {classes}) and ({classes},)"
        )
    return head
