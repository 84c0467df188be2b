"""What a training method is: parameters in named groups, and a loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Batch = dict[str, Any]  # of arrays
Metrics = dict[str, Float[Array, ""]]
Groups = dict[str, Any]


def unchanged(params: Groups) -> Groups:
    """The parameters as they are trained, to be evaluated and saved so."""
    return params


class Method(NamedTuple):
    """A training method as pure functions.

    Attributes:
      init: `init(key) -> (params, model_state)`, both {group: tree}.
      loss: `loss(params, model_state, batch, step, key) -> (value, (model_state, metrics))`. A
        batch has `image` (float32 in [0, 1]) and `label`. Methods with a teacher also read
        `teacher_logits` and `teacher_features`; others read the outliers of their pools.
      finish: `finish(params)` gives the parameters to evaluate and to save. Its group "student" is
        that of a plain model.
    """

    init: Callable[[Key[Array, ""]], tuple[Groups, Groups]]
    loss: Callable[
        [Groups, Groups, Batch, Int[Array, ""], Key[Array, ""]],
        tuple[Float[Array, ""], tuple[Groups, Metrics]],
    ]
    finish: Callable[[Groups], Groups] = unchanged


def apply_group(
    module: Any,
    params: Groups,
    model_state: Groups,
    group: str,
    *inputs: Array,
    mutable: Sequence[str] = ("batch_stats",),
    **options: Any,
) -> tuple[Any, Mapping[str, Any]]:
    """Apply a module with the variables of its group; returns outputs and new batch statistics.

    Collections other than those that are `mutable` are left out; `options` are the module's own:
    `train`, and what else it takes.
    """
    variables = {"params": params[group], **model_state.get(group, {})}
    return module.apply(variables, *inputs, mutable=list(mutable), **options)


def split_variables(variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A module's variables as (parameters, the rest)."""
    rest = {k: v for k, v in variables.items() if k != "params"}
    return variables["params"], rest


def accuracy(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    """Share of right predictions, in [0, 1]."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
