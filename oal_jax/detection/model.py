"""A model as `calibrate` and `benchmark` take it: a function, a module, or a file of weights."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from oal_jax import scores as post_hoc
from oal_jax.errors import UserError
from oal_jax.runtime import distributed
from oal_jax.scores import Head, Outputs, Score
from oal_jax.scores.forward import as_forward, is_on_host
from oal_jax.scores.head import as_head, find_head


def open_model(model: Any, head: Any, images: np.ndarray) -> tuple[Partial, Head | None]:
    """The model's forward function, and its last linear layer where that is known.

    Args:
      model: what `as_forward` takes; the name of a weight file, or what `load_classifier` returned.
      head: what `as_head` takes.
      images: a few images that the model takes.

    Raises:
      UserError: as `as_forward`, `as_head` and `load_classifier`.
    """
    if isinstance(model, str | os.PathLike):
        from oal_jax.pretrained.classifiers import load_classifier

        model = load_classifier(model)
    if hasattr(model, "forward") and hasattr(model, "head") and hasattr(model, "config"):
        model, head = model.forward, model.head if head is None else head
    return as_forward(model, images), as_head(head)


def head_for(
    scorers: list[Score], head: Head | None, forward: Partial, outputs: Outputs, images
) -> Head | None:
    """The given head, or one found among the model's arrays if a score needs it."""
    if head is None and any(score.needs_head for score in scorers):
        return find_head(forward, outputs, images[:2])
    return head


def mesh_for(forward: Partial, mesh: Mesh | None) -> Mesh:
    """The devices to use: a model on the host is called for one device, as it is one itself."""
    if not isinstance(mesh, Mesh | None):
        raise UserError(f"mesh must be a jax.sharding.Mesh or None, is a {type(mesh).__name__}")
    if is_on_host(forward):
        return distributed.make_mesh(devices=jax.local_devices()[:1])
    return mesh or distributed.make_mesh()


def check_gradients(score: Score, forward: Partial) -> None:
    """Raise a UserError where a score takes gradients of a model that has none."""
    if score.perturb and is_on_host(forward):
        raise UserError(
            f"{score.name} takes gradients, which a model of NumPy arrays does not have; take"
            " another score"
        )


def as_params(params: Any, example: str) -> dict[str, Any]:
    """A dict of parameters; None is an empty one."""
    if params is None:
        return {}
    if not hasattr(params, "items") or not all(isinstance(key, str) for key in params):
        raise UserError(f"params must be a dict such as {example}, got {params!r}")
    return dict(params)


def as_count(name: str, value: Any) -> int:
    """A whole number, 1 or more."""
    is_number = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, bool) or not is_number or value != value // 1 or value < 1:
        raise UserError(f"{name} must be a whole number, 1 or more, got {value!r}")
    return int(value)


def as_class_names(class_names: Any, count: int) -> tuple[str, ...] | None:
    """The name of each of `count` labels: of a list, {label: name} or {name: label}."""
    if class_names is None:
        return None
    if hasattr(class_names, "items"):
        pairs = [
            (value, key) if isinstance(value, int | np.integer) else (key, value)
            for key, value in class_names.items()
        ]
        names = {str(label): name for label, name in pairs}
        missing = [label for label in range(count) if str(label) not in names]
        if missing or len(pairs) != count:
            raise UserError(
                f"class_names is a dict of {len(pairs)} names for a model of {count} logits; give"
                f" one name for each label from 0 to {count - 1}"
            )
        return tuple(str(names[str(label)]) for label in range(count))
    if isinstance(class_names, str) or not hasattr(class_names, "__getitem__"):
        raise UserError(f"class_names must be a list of names, got {class_names!r}")
    if len(class_names) != count:
        raise UserError(f"{len(class_names)} class_names for a model of {count} logits")
    return tuple(map(str, class_names))


def score_names(scores: Any) -> list[str]:
    """Names of scores, of one name, a list of names, or "all"."""
    if isinstance(scores, str):
        return list(post_hoc.SCORES) if scores == "all" else [scores]
    try:
        names = list(scores)
    except TypeError:
        names = []
    if not names:
        raise UserError(f"scores must be names such as ('msp', 'energy') or 'all', got {scores!r}")
    return names
