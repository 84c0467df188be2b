"""What a training method is: parameters in named groups, and a loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Batch = dict[str, Any]  # of arrays; in a microbatch also `part`, a `Part`
Metrics = dict[str, Float[Array, ""]]
Groups = dict[str, Any]


def unchanged(params: Groups) -> Groups:
    """The parameters as they are trained, to be evaluated and saved so."""
    return params


class Part(NamedTuple):
    """What a microbatch is told of the batch that it is a part of, as the entry "part".

    Losses that are means over examples need not look: the mean over the microbatches of their
    gradients is that of the whole. Others read the means of the whole by `whole_mean`, and state
    that moves once a step, not once a microbatch, goes by `last`.
    """

    means: Metrics  # of the whole batch, at the same parameters
    last: Bool[Array, ""] | bool  # whether the batch ends with this microbatch


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


def whole_mean(part: Part | None, name: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
    """The mean over the whole batch of which `value`, the metric `name`, is that of a microbatch.

    Its gradient is that of `value`: so for any function f the mean over the microbatches of the
    gradients of f(whole_mean) is the gradient of f at the whole batch's mean.
    """
    if part is None:
        return value
    return value + jax.lax.stop_gradient(part.means[name] - value)


def after_the_last(part: Part | None, new: Any, old: Any) -> Any:
    """A state that moves once a step: `new` once its last microbatch is through, else `old`."""
    if part is None:
        return new
    return jax.tree.map(lambda a, b: jnp.where(part.last, a, b), new, old)


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
