"""What a training method is: parameters in named groups, and a loss."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
Groups = dict[str, Any]


def unchanged(params: Groups) -> Groups:
    """The parameters as they are trained, to be evaluated and saved so."""
    return params


class Method(NamedTuple):
    """`init(key) -> (params, model_state)`, both {group: tree}, and the loss of one batch.

    `loss(params, model_state, batch, step, key) -> (value, (model_state, metrics))`.
    A batch has `image` (float32 in [0, 1]) and `label`, and, where a method asks for them,
    `teacher_logits`, `teacher_features`, `latent`, `outlier`, `outlier_latent`, `outlier_image`.
    `finish(params)` are those to evaluate and to save: its group "student" is a plain model's.
    """

    init: Callable[[Key[Array, ""]], tuple[Groups, Groups]]
    loss: Callable[
        [Groups, Groups, Batch, Int[Array, ""], Key[Array, ""]],
        tuple[Float[Array, ""], tuple[Groups, Metrics]],
    ]
    finish: Callable[[Groups], Groups] = unchanged


def apply_group(
    module: Any, params: Groups, model_state: Groups, group: str, *inputs: Array, **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    """Apply a module with the variables of its group; returns outputs and new batch statistics.

    `options` are the module's own: `train`, and what else it takes.
    """
    variables = {"params": params[group], **model_state.get(group, {})}
    return module.apply(variables, *inputs, mutable=["batch_stats"], **options)


def split_variables(variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A module's variables as (parameters, the rest)."""
    rest = {k: v for k, v in variables.items() if k != "params"}
    return variables["params"], rest


def accuracy(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    """Share of right predictions, in [0, 1]."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
