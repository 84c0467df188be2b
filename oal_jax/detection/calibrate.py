"""A detector of any classifier: a score is fitted, its threshold set, and the arguments checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from oal_jax import scores as post_hoc
from oal_jax.data.decoding import Decoding
from oal_jax.detection.detector import Detector
from oal_jax.detection.images import check_images
from oal_jax.detection.model import (
    as_class_names,
    as_count,
    as_params,
    check_gradients,
    head_for,
    mesh_for,
    open_model,
)
from oal_jax.detection.parts import check_share, run_detector, sorted_scores, warn_of_few
from oal_jax.errors import UserError
from oal_jax.runtime import distributed
from oal_jax.scores import Outputs
from oal_jax.scores.parameters import checked

Labelled = tuple[Any, Any]  # images, labels


def calibrate(
    model: Any,
    train: Labelled,
    validation: Labelled,
    score: str = "energy",
    head: Any = None,
    keep_id: float = 0.95,
    params: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    decoding: Decoding | None = None,
) -> Detector:
    """Make a detector of any classifier: fit a score and set its threshold.

    Args:
      model: float images in [0, 1], (n, h, w, c), to what `as_forward` takes; or the file of a ViT
        or ResNet. In evaluation mode: the outputs of an image may not depend on the rest of the
        batch. One that JAX can't trace is called through `jax.pure_callback`.
      train: ID images and labels that scores are fitted on.
      validation: other ID images and labels, for the threshold, and for scores with
        `fit_on="validation"`.
      score: a key of `scores.SCORES`.
      head: (kernel (d, c), bias (c,)) of the last linear layer, or a dict with these names, for
        scores that read it. Without it, it is looked for among the model's own arrays.
      keep_id: share of the validation images that the threshold keeps.
      params: parameters of the score.
      class_names: name of each label: a list, {label: name} or {name: label}.
      batch_size: images of a call of the model.
      mesh: the devices; None for all.
      decoding: how files became such images, such as `Decoding(3, resize=256, crop=(224, 224))`;
        None: by as little resizing as fills them.

    Raises:
      UserError: an unknown score, wrong images or labels, a missing output that the score needs, a
        model in training mode, a NaN.
    """
    params = as_params(params, '{"k": 5}')
    scorer = post_hoc.make(score, **params)
    batch_size = as_count("batch_size", batch_size)
    check_share(keep_id)
    images, labels = check_labelled(train, "train")
    if decoding and (*(decoding.crop or ()), decoding.channels) != images.shape[1:]:
        raise UserError(f"{decoding} does not give images of shape {images.shape[1:]}")
    val_images, val_labels = check_labelled(validation, "validation", images.shape[1:])
    warn_of_few(len(val_images))
    forward, head = open_model(model, head, images)
    check_gradients(scorer, forward)
    if scorer.fit_on == "validation":
        images, labels = val_images, val_labels
    mesh = mesh_for(forward, mesh)
    forward = distributed.place_parameters(forward, mesh)
    check_rows_are_independent(forward, val_images[:batch_size], mesh)
    outputs = post_hoc.compute(forward, images, batch_size, scorer.needs, mesh)
    check_classes(outputs, labels)
    head = head_for([scorer], head, forward, outputs, images)
    detector = Detector(
        forward=forward,
        score=scorer,
        state=post_hoc.fit(scorer, outputs, labels, head, f"ID {scorer.fit_on}", mesh),
        id_val_scores=np.zeros(0, np.float32),
        image_shape=images.shape[1:],
        keep_id=keep_id,
        class_names=as_class_names(class_names, outputs.logits.shape[1]),
        batch_size=batch_size,
        params=checked(score, post_hoc.SCORES[score], params),
        mesh=mesh,
        decoding=decoding,
    )
    *_, values = run_detector(scorer, forward, detector.state, val_images, batch_size, mesh)
    return dataclasses.replace(detector, id_val_scores=sorted_scores(values, score))


def check_labelled(pair: Labelled, name: str, shape=None) -> tuple[np.ndarray, np.ndarray]:
    """Images from `check_images`, and an integer label for each; else a UserError."""
    try:
        images, labels = pair
    except (TypeError, ValueError):
        raise UserError(f"{name} must be (images, labels)") from None
    try:
        images, labels = check_images(images, shape), np.asarray(labels)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except (TypeError, ValueError):
        raise UserError(f"labels of {name} are no list of integers") from None
    if not len(images):
        raise UserError(f"{name} has no images")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels of {name} are {labels.dtype} of shape {labels.shape}: give one integer for"
            f" each of the {len(images)} images"
        )
    return images, labels


def check_classes(outputs: Outputs, labels: np.ndarray) -> None:
    """Raise a UserError where the logits are none, or do not match the labels."""
    logits = np.asarray(outputs.logits)
    count = logits.shape[1]
    if count < 2:
        raise UserError(
            f"the model gives {count} logit; return one for each class. For a binary model with"
            " one logit z: jnp.concatenate([0 * z, z], axis=1)"
        )
    if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise UserError(
            "the model gives probabilities (each row sums to 1); return the logits, or"
            " jnp.log(probabilities)"
        )
    if labels.min() < 0 or labels.max() >= count:
        raise UserError(
            f"labels are {labels.min()} to {labels.max()}, but the model gives {count} logits:"
            f" labels start at 0 and end at {count - 1}"
        )


def check_rows_are_independent(
    forward: Partial, images: np.ndarray, mesh: Mesh | None = None
) -> None:
    """Raise a UserError where an image's logits depend on the rest of its batch."""
    half = len(images) // 2
    if not half:
        return
    first, others = images[:half], images[half : 2 * half]

    def logits(batch):
        return np.asarray(post_hoc.compute(forward, batch, len(batch), (), mesh).logits)[:half]

    here = logits(np.concatenate([first, others]))
    there = logits(np.concatenate([first[::-1], np.zeros_like(others)]))[::-1]
    allowed = 0.01 * np.abs(np.nan_to_num(here)).max()
    if not np.allclose(here, there, rtol=0.01, atol=allowed, equal_nan=True):
        raise UserError(
            "the model's logits of an image change with the rest of the batch; call it in"
            " evaluation mode (running statistics in batch norm, no dropout)"
        )
