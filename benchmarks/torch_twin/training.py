"""One training step of the twin: teacher or its cached outputs, loss, SGD."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.torch_twin import forms
from benchmarks.torch_twin.forms import Form
from benchmarks.torch_twin.losses import Oal, Terms
from oal_jax.config import Config

Batch = dict[str, Tensor]
Step = Callable[[Batch], Terms]
_IMAGES = ("image", "outlier_image")


def multiplier(steps: int, warmup: float, floor: float) -> Callable[[int], float]:
    """Learning-rate factor by step: linear warm-up, then a cosine down to `floor`."""
    warm = round(warmup * steps)

    def factor(step: int) -> float:
        if step < warm:
            return (1 + (warm - 1) * step / warm) / warm
        progress = min(1.0, (step - warm) / max(1, steps - warm))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def make_optimizer(
    oal: Oal, config: Config, form: Form
) -> tuple[torch.optim.SGD, dict[str, list[nn.Parameter]]]:
    """SGD with a rate a group and weight decay on all tensors, and the tensors of each group."""
    train, method = config.train, config.method
    rates = {
        "student": train.learning_rate,
        "projector": method.kd.projector_rate,
        "adapter": method.oal.latent_projector_rate,
        "club": method.oal.club_rate,
        "energy": method.oal.energy_rate,
    }
    groups = {name: list(child.parameters()) for name, child in oal.named_children()}
    optimizer = torch.optim.SGD(
        [{"params": tensors, "lr": rates[name]} for name, tensors in groups.items()],
        momentum=train.momentum,
        nesterov=train.nesterov,
        weight_decay=train.weight_decay,
        fused=form.compile,
    )
    return optimizer, groups


def make_step(oal: Oal, teacher: nn.Module | None, config: Config, form: Form, steps: int) -> Step:
    """A function that takes the next step. Without a teacher, batches hold its cached outputs."""
    train, options = config.train, config.method.oal
    device = next(oal.parameters()).device
    optimizer, groups = make_optimizer(oal, config, form)
    rate = multiplier(steps, train.warmup, train.floor)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    # CLUB's gradients are clipped by their own norm, all others by a common one.
    clip_groups = [
        [p for name, tensors in groups.items() if (name == "club") == is_club for p in tensors]
        for is_club in (False, True)
    ]
    loss_of = forms.compiled(form, oal)
    look = forms.compiled(form, teacher.eval()) if teacher is not None else None
    start, end = options.ramp_start * steps, options.ramp_end * steps
    steps_taken = 0

    def step(batch: Batch) -> Terms:
        nonlocal steps_taken
        batch = batch | {n: forms.images_as(form, batch[n]) for n in _IMAGES if n in batch}
        if look is not None:
            with forms.inference(form, device):
                outputs = look(batch["image"])
            # Copies, because tensors made in inference mode cannot enter a gradient.
            batch["teacher_logits"], batch["teacher_features"] = (o.clone() for o in outputs)
        ramp = min(1.0, max(0.0, (steps_taken - start) / max(end - start, 1.0)))
        with forms.autocast(form, device):
            loss, terms = loss_of(
                batch, torch.full((), options.energy_weight * ramp, device=device)
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if train.clip:
            for tensors in filter(None, clip_groups):
                nn.utils.clip_grad_norm_(tensors, train.clip)
        optimizer.step()
        schedule.step()
        steps_taken += 1
        return {name: value.detach() for name, value in terms.items()} | {"loss": loss.detach()}

    return step
