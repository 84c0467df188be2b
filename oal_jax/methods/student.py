"""Helpers shared by all methods: parameter initialisation, forward pass, ID cross-entropy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from oal_jax.methods import losses
from oal_jax.methods.base import (
    Groups,
    Metrics,
    accuracy,
    apply_group,
    split_variables,
)
from oal_jax.runtime.keys import named

Transform = Callable[[Float[Array, ""]], Float[Array, ""]]
Outputs = tuple[Float[Array, "b k"], Float[Array, "b d"]]


def init_student(
    key: Key[Array, ""], model: Any, image_shape: tuple[int, int, int]
) -> tuple[Groups, Groups]:
    """Fresh parameters and batch statistics of the group "student"."""
    variables = model.init(named(key, "student"), jnp.zeros((1, *image_shape)))
    params, rest = split_variables(variables)
    return {"student": params}, {"student": rest}


def output_sizes(model: Any, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Numbers of classes and features of a model that maps images to (logits, features)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    (logits, features), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    return logits.shape[1], features.shape[1]


def join(first: Shaped[Array, "b ..."], second: Shaped[Array, "m ..."]) -> Shaped[Array, "b+m ..."]:
    """Join two batches in gcd(b, m) groups, each with rows of the first and then of the second.

    Devices that split both batches evenly also split the groups evenly, so each joins its own rows.
    A plain concatenation would move rows between devices. `separate` is the inverse.
    """
    groups = math.gcd(first.shape[0], second.shape[0])
    pieces = [a.reshape(groups, a.shape[0] // groups, *a.shape[1:]) for a in (first, second)]
    return _rows(jnp.concatenate(pieces, axis=1))


def separate(
    rows: Shaped[Array, "n ..."], count: int
) -> tuple[Shaped[Array, "b ..."], Shaped[Array, "m ..."]]:
    """The two batches of a joined one, the first with `count` rows."""
    total = rows.shape[0]
    groups = math.gcd(count, total - count)
    pieces, each = rows.reshape(groups, total // groups, *rows.shape[1:]), count // groups
    return _rows(pieces[:, :each]), _rows(pieces[:, each:])


def _rows(pieces: Shaped[Array, "g n ..."]) -> Shaped[Array, "g*n ..."]:
    return pieces.reshape(pieces.shape[0] * pieces.shape[1], *pieces.shape[2:])


def forward(
    model: Any,
    params: Groups,
    model_state: Groups,
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    others: Float[Array, "m h w c"] | None = None,
    *,
    shared_statistics: bool = False,
    mutable: Sequence[str] = ("batch_stats",),
) -> tuple[Outputs, Outputs, Any]:
    """One pass in training mode: outputs of `images`, of `others`, and the student's new state.

    ID images and outliers pass as one batch (see `join`). By default batch and running statistics
    are those of the ID images alone. Then outliers are normalised as they will be in evaluation,
    the running statistics of a trained start stay valid, and no result depends on the number of
    outliers. `shared_statistics` takes the statistics over both, as the published codes do (one
    concatenated batch in PyTorch's training mode). With "maps" in `mutable` the new state has the
    maps too, with their rows joined.
    """
    count, options = images.shape[0], {}
    if others is not None:
        if not shared_statistics:
            options["statistics"] = join(jnp.ones(count, bool), jnp.zeros(others.shape[0], bool))
        images = join(images, others)
    rngs = {"dropout": named(key, "dropout")}
    outputs, state = apply_group(
        model,
        params,
        model_state,
        "student",
        images,
        train=True,
        rngs=rngs,
        mutable=mutable,
        **options,
    )
    (logits, other_logits), (features, other_features) = (separate(rows, count) for rows in outputs)
    return (logits, features), (other_logits, other_features), state


def id_loss(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"],
    ce_transform: Transform | None,
) -> tuple[Float[Array, ""], Metrics]:
    """The mean cross-entropy on ID images after `ce_transform`, and the metrics.

    `ce_transform` maps the batch mean of the cross-entropy and no other term of a method's loss. So
    any method can take a constraint on the ID loss, such as Unleashing Mask's (arXiv 2306.03715).
    The metric `ce` is the cross-entropy before it.
    """
    ce = jnp.mean(losses.cross_entropy(logits, labels))
    value = ce if ce_transform is None else ce_transform(ce)
    return value, {"ce": ce, "accuracy": accuracy(logits, labels)}
