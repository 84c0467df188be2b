"""One training step of the twin: teacher (or what is cached of it), loss, SGD."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.torch_twin import forms
from benchmarks.torch_twin.forms import Form
from benchmarks.torch_twin.losses import Oal, Terms
from oal_jax.config import Config
from oal_jax.config import Train as TrainConfig

Batch = dict[str, Tensor]
Step = Callable[[Batch], Terms]
_IMAGES = ("image", "outlier_image")


def multiplier(steps: int, warmup: float, floor: float) -> Callable[[int], float]:
    """Of all learning rates, at a step: linear warm-up, then a cosine down to `floor`."""
    warm = round(warmup * steps)

    def at(step: int) -> float:
        if step < warm:
            return (1 + (warm - 1) * step / warm) / warm
        share = min(1.0, (step - warm) / max(1, steps - warm))
        return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return at


def make_optimizer(
    oal: Oal, train: TrainConfig, form: Form
) -> tuple[torch.optim.SGD, dict[str, list[nn.Parameter]]]:
    """SGD with a rate a group and weight decay on every tensor; and the tensors of each group."""
    rates = {
        "student": train.learning_rate,
        "projector": train.projector_rate,
        "adapter": train.adapter_rate,
        "club": train.club_rate,
        "energy": train.energy_rate,
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
    """A function that takes the next step on a batch; without a teacher its outputs are given."""
    train, method = config.train, config.method
    device = next(oal.parameters()).device
    optimizer, groups = make_optimizer(oal, train, form)
    rate = multiplier(steps, train.warmup, train.floor)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    clipped = [
        [p for name, tensors in groups.items() if (name == "club") == apart for p in tensors]
        for apart in (False, True)
    ]
    loss_of = forms.compiled(form, oal)
    look = forms.compiled(form, teacher.eval()) if teacher is not None else None
    start, end = method.ramp_start * steps, method.ramp_end * steps
    done = 0

    def step(batch: Batch) -> Terms:
        nonlocal done
        shown = {n: forms.images_as(form, batch[n]) for n in _IMAGES if n in batch}
        batch = batch | shown
        if look is not None:
            with forms.inference(form, device):
                outputs = look(batch["image"])
            # Copies: what inference mode makes can't be part of a gradient.
            batch["teacher_logits"], batch["teacher_features"] = (o.clone() for o in outputs)
        ramp = min(1.0, max(0.0, (done - start) / max(end - start, 1.0)))
        with forms.autocast(form, device):
            loss, terms = loss_of(batch, torch.full((), method.energy * ramp, device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if train.clip:
            for tensors in filter(None, clipped):
                nn.utils.clip_grad_norm_(tensors, train.clip)
        optimizer.step()
        schedule.step()
        done += 1
        return {name: value.detach() for name, value in terms.items()} | {"loss": loss.detach()}

    return step
