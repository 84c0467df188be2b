"""The interface of a training method: parameters in named groups, and a loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Batch = dict[str, Any]  # arrays by name
Metrics = dict[str, Float[Array, ""]]
Groups = dict[str, Any]


def unchanged(params: Groups) -> Groups:
    """The parameters themselves."""
    return params


class Method(NamedTuple):
    """A training method as pure functions.

    Attributes:
      init: `init(key) -> (params, model_state)`, both {group: tree}.
      loss: `loss(params, model_state, batch, step, key) -> (value, (model_state, metrics))`. A
        batch has `image` (float32 in [0, 1]), `label` and the outliers of the method's pools;
        methods with a teacher also read `teacher_logits` and `teacher_features`.
      finish: `finish(params)` gives the parameters to evaluate and to save. In its group "student"
        they are those of a plain model.
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
    """Apply a module to the variables of its group.

    Args:
      module: a linen module.
      params: parameters of all groups.
      model_state: other variables of all groups.
      group: the module's group.
      *inputs: positional arguments of the module.
      mutable: collections that the call may change.
      **options: keyword arguments of the module, such as `train`.

    Returns:
      The module's outputs, and the new values of the `mutable` collections.
    """
    variables = {"params": params[group], **model_state.get(group, {})}
    return module.apply(variables, *inputs, mutable=list(mutable), **options)


def split_variables(variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A module's variables as (parameters, the rest)."""
    rest = {k: v for k, v in variables.items() if k != "params"}
    return variables["params"], rest


def accuracy(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    """Share of correct predictions, in [0, 1]."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
