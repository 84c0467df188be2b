"""What a detector consists of: a classifier, a fitted score and its threshold; and running them."""

import dataclasses
import numbers
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Bool, Float, Int32

from oal_jax.data.image_files import Decoding
from oal_jax.errors import UserError
from oal_jax.evaluation.protocol import threshold
from oal_jax.runtime import batched, distributed
from oal_jax.runtime.ops import to_unit
from oal_jax.scores import Score, State


class Result(NamedTuple):
    """Verdicts on n images. Scalars for a single image."""

    label: Int32[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]  # the largest softmax probability
    ood_score: Float[np.ndarray, " n"]  # higher = more OOD
    is_ood: Bool[np.ndarray, " n"]  # ood_score above the threshold
    class_names: np.ndarray | None  # (n,) the names of the labels, where they are known
    # Percent of ID validation images with a lower ood_score; the same scale for every score.
    percentile: Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Parts:
    """The data of a detector. `oal_jax.Detector` adds what it does.

    Attributes:
      forward: float images in [0, 1] to `scores.Outputs`; its leaves are the weights.
      score: a post-hoc score.
      state: what the score was fitted to.
      id_val_scores: sorted ood_scores of ID validation images, from which the threshold follows.
      image_shape: (height, width, channels) of an image.
      keep_id: share of the ID validation images that the threshold keeps.
      class_names: name of each label, or None.
      batch_size: images of a call of the model.
      params: the score's parameters; those left out have their defaults.
      mesh: the devices; None for all.
      decoding: how files become its images; None: by as little resizing as fills `image_shape`.
      about: where the classifier comes from and what was measured, for the model card; JSON.
    """

    forward: Partial
    score: Score
    state: State
    id_val_scores: Float[np.ndarray, " m"]
    image_shape: tuple[int, int, int]
    keep_id: float = 0.95
    class_names: tuple[str, ...] | None = None
    batch_size: int = 256
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    decoding: Decoding | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_share(self.keep_id)
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}")

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        rule = f"{self.score.name} > {self.threshold:.6g} is OOD"
        return f"{type(self).__name__}({rule}, {shape} images)"

    @property
    def threshold(self) -> float:
        """An image with a higher ood_score is OOD."""
        return threshold(self.id_val_scores, self.keep_id)

    @property
    def function(self) -> Partial:
        """The detector as a pure function of images on the device.

        Takes uint8 images, or floats in [0, 1], (n, *image_shape); gives (label, confidence,
        ood_score, is_ood), each (n,). It works inside jit, vmap, grad of the ood_score, scan, and
        another model's jitted step. It is a pytree whose leaves are the weights, so a jitted
        function can take it as an argument. It checks neither the type nor the range of the images.
        """
        arrays = self.forward, dict(self.state), np.float32(self.threshold)
        return Partial(_decision(self.score), *arrays)

    def with_keep_id(self, keep_id: float) -> Self:
        """The same detector with the threshold that keeps another share of ID images."""
        return dataclasses.replace(self, keep_id=keep_id)


def predict(
    score: Score, forward: Callable, state: State, images
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(label, confidence, ood_score) of a batch, uint8 or float32 in [0, 1]. Traceable."""
    images = to_unit(images)
    outputs = forward(images)
    label = jnp.argmax(outputs.logits, axis=-1).astype(jnp.int32)
    confidence = jnp.max(jax.nn.softmax(outputs.logits, axis=-1), axis=-1)
    if score.perturb:
        outputs = score.perturb(state, forward, images)
    return label, confidence, score.score(state, outputs)


# Cached, so that equal scores are one function to jit.
@cache
def _decision(score: Score) -> Callable:
    return partial(decide, score)


def decide(
    score: Score, forward: Callable, state: State, threshold, images
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(label, confidence, ood_score, is_ood) of a batch. Traceable."""
    label, confidence, ood_score = predict(score, forward, state, images)
    # `~(<=)`, not `>`: a NaN is OOD.
    return label, confidence, ood_score, ~(ood_score <= threshold)


_predict = jax.jit(predict, static_argnums=0)


def run_detector(
    score: Score,
    forward: Partial,
    state: State,
    images: np.ndarray,
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`predict` over a set, split over the devices of `mesh` (None: all); NumPy arrays."""
    mesh = mesh or distributed.make_mesh()
    forward = distributed.place_parameters(forward, mesh)
    run = partial(_predict, score, forward, distributed.replicate(state, mesh))
    # A power of two for small sets: few programs, and a single image stays cheap.
    size = min(batch_size, 1 << max(len(images) - 1, 0).bit_length())
    return batched.apply(run, [images], size, mesh)


def check_share(keep_id: float) -> None:
    """Raise a UserError unless some threshold can keep this share."""
    if not isinstance(keep_id, numbers.Real) or not 0 < keep_id < 1:
        raise UserError(f"keep_id must lie between 0 and 1, got {keep_id!r}; for example 0.95")


def check_runs(parts: Parts, directory: Path, remedy: str) -> None:
    """Trace a detector that was read from files; `UserError` where its parts do not fit."""
    images = jax.ShapeDtypeStruct((1, *parts.image_shape), jnp.uint8)
    try:
        logits = jax.eval_shape(lambda x: parts.forward(x / 255).logits, images)
        jax.eval_shape(parts.function, images)
    except Exception as error:  # whatever a model or a score of another form raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{directory}: model, weights and score do not fit ({reason[:120]}); {remedy}"
        ) from None
    names = parts.class_names
    if names is not None and len(names) != logits.shape[1]:
        raise UserError(
            f"{directory}: {len(names)} class_names for a model of {logits.shape[1]} classes;"
            f" {remedy}"
        )


def sorted_scores(values, name) -> np.ndarray:
    """The ood_scores in rising order; `UserError` where one is not finite."""
    if np.ndim(values) != 1 or not np.size(values):
        raise UserError(f"{name}: ood_scores of shape {np.shape(values)} are not a list")
    if not np.isfinite(values).all():
        raise UserError(f"{name}: {int((~np.isfinite(values)).sum())} ood_scores are not finite")
    return np.sort(values)


def warn_of_few(count: int) -> None:
    """Print a line on stderr where a threshold is set on fewer than 20 validation images."""
    if count < 20:  # one of them is more than the 5 % that a threshold gives away by default
        print(
            f"oal_jax: the threshold is set on {count} validation images; with fewer than 20 it is"
            " not reliable",
            file=sys.stderr,
        )
