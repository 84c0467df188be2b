"""SGD with one rate per group, as in OAL's code, and Adam for teachers, on cosine schedules."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import optax


def one_cycle(peak: float, steps: int, warmup: float, floor: float) -> optax.Schedule:
    """Linear warm-up over a fraction of the steps, then a cosine to `floor` times the peak.

    Without warm-up it is peak (floor + (1 - floor) (1 + cos(pi t / steps)) / 2), as in OAL's code.
    """
    warm = round(warmup * steps)
    if not warm:
        return optax.cosine_decay_schedule(peak, steps, alpha=floor)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warm,
        peak_value=peak,
        warmup_steps=warm,
        decay_steps=max(steps, warm + 1),
        end_value=floor * peak,
    )


def grouped_sgd(
    rates: Mapping[str, float],
    *,
    steps: int,
    warmup: float,
    floor: float,
    momentum: float,
    weight_decay: float,
    clip: float,
    clip_separately: Collection[str] = ("club",),
    nesterov: bool = True,
    rate_every: int = 1,
) -> optax.GradientTransformation:
    """SGD for params of the form {group: tree}.

    Weight decay applies to every tensor and is added to the gradient before the momentum, as in
    PyTorch (arXiv 2406.16525's code).

    Args:
      rates: peak rate of each group; 0 freezes it.
      steps: of the whole training.
      warmup: fraction of the steps of linear warm-up.
      floor: last multiplier of the cosine schedule.
      momentum: of all groups.
      weight_decay: of all groups.
      clip: largest joint norm of the gradients of all groups, before weight decay; 0: no clipping.
      clip_separately: groups with a norm of their own. The likelihood of CLUB's q has gradients
        several times the student's, and would slow the student.
      nesterov: use Nesterov momentum.
      rate_every: steps between two changes of the rates. With the steps of an epoch it is PyTorch's
        usual schedule.
    """

    def sgd(rate: float) -> optax.GradientTransformation:
        if not rate:
            return optax.set_to_zero()
        by_step = one_cycle(rate, steps, warmup, floor)
        schedule = lambda step: by_step(step // rate_every * rate_every)
        return optax.chain(
            optax.add_decayed_weights(weight_decay),
            optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
        )

    def by_group(transforms, label):
        def labels(params):
            return {g: jax.tree.map(lambda _, g=g: label(g), tree) for g, tree in params.items()}

        return optax.multi_transform(transforms, labels)

    groups = by_group({g: sgd(rate) for g, rate in rates.items()}, lambda g: g)
    if not clip:
        return groups
    norms = {name: optax.clip_by_global_norm(clip) for name in ("separate", "joint")}
    label = lambda g: "separate" if g in clip_separately else "joint"
    return optax.chain(by_group(norms, label), groups)


def adamw(
    *, peak: float, steps: int, warmup: float, floor: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW on the same schedule; tensors of rank 0 and 1 (biases, norms) do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            one_cycle(peak, steps, warmup, floor),
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def adam_by_part(
    rates: Mapping[str, float],
    part_of: Callable[[tuple[Any, ...]], str],
    *,
    steps: int,
    floor: float,
) -> optax.GradientTransformation:
    """Adam without weight decay, with one rate per part of the network, on one cosine schedule.

    `part_of(path)` gives the part (a key of `rates`) of the parameter at a path of the tree. With a
    low rate for the body and a high one for a new head it fine-tunes a teacher, as arXiv
    2406.16525's code does.
    """

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: part_of(path), params)

    parts = {name: optax.adam(one_cycle(rate, steps, 0.0, floor)) for name, rate in rates.items()}
    return optax.multi_transform(parts, labels)
