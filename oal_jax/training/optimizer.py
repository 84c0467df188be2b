"""SGD with a rate a group, on one schedule, as the reference trains; and AdamW for the teacher."""

from collections.abc import Mapping

import jax
import optax


def one_cycle(peak: float, steps: int, warmup: float, floor: float) -> optax.Schedule:
    """Linear warm-up over a fraction of the steps, then a cosine down to `floor` times the peak."""
    warm = max(1, round(warmup * steps))
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
) -> optax.GradientTransformation:
    """Nesterov SGD for params of the form {group: tree}, `rates[group]` being its peak rate.

    Weight decay falls on every tensor and is added to the gradient before the momentum, as in
    PyTorch (arXiv 2406.16525's code); the norm of all gradients together is clipped before.
    """

    def sgd(rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(weight_decay),
            optax.sgd(one_cycle(rate, steps, warmup, floor), momentum=momentum, nesterov=True),
        )

    def labels(params):
        return {
            group: jax.tree.map(lambda _, g=group: g, tree) for group, tree in params.items()
        }

    groups = optax.multi_transform({g: sgd(rate) for g, rate in rates.items()}, labels)
    return optax.chain(optax.clip_by_global_norm(clip), groups) if clip else groups


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
