"""Suite `features`: images a second through the teacher.

    python -m benchmarks.run --suite features --output results.json [--frameworks jax,torch]
        [--forms reference,tuned] [--cases vit-b16,shipped] [--runs 5] [--batch 32] [--side 224]
        [--depth 12] [--teacher-dtype float32] [--twin-dtype float32] [--device auto]

`vit-b16` is ViT-B/16 at --side pixels (random weights), `shipped` the teacher of the package at 28
pixels, in batches sixteen times as large. PyTorch runs timm's model, as it is (`-official`) and by
torch.compile.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing
from benchmarks.plots import draw as draw
from benchmarks.timing import Job
from oal_jax.errors import UserError

CASES = ("vit-b16", "shipped")
_IMAGENET = ((0.5,), (0.5,))


class Network(NamedTuple):
    """A Vision Transformer and the images it is given."""

    image_shape: tuple[int, int, int]
    classes: int
    sizes: dict[str, Any]
    batch: int


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the networks in turns; print ratios; return the rows."""
    parser = timing.parser("features")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--depth", type=int, default=12, help="blocks of vit-b16")
    timing.add_teacher_dtype(parser)
    args = parser.parse_args(argv)
    timing.settle(args)
    rows = []
    for case in args.cases.split(","):
        if case not in CASES:
            raise UserError(f"case '{case}' is unknown; known: {', '.join(CASES)}")
        network = _network(case, args)
        images = np.random.default_rng(0).random((network.batch, *network.image_shape), np.float32)
        jobs = []
        if "jax" in args.frameworks:
            more = {"teacher_dtype": args.teacher_dtype}
            job = ours(network, images, args.teacher_dtype)
            jobs.append(Job(case, "jax", job, more=more, items=network.batch))
        if "torch" in args.frameworks:
            jobs += [_twin(case, form, network, images, args) for form in args.forms[:2]]
        rows += timing.measure("features", jobs, args)
    return rows


def _network(case: str, args: argparse.Namespace) -> Network:
    if case == "shipped":
        sizes = {"patch": 4, "width": 128, "depth": 4, "heads": 4, "mlp_ratio": 2.0}
        return Network((28, 28, 1), 8, sizes, 16 * args.batch)
    sizes = {"patch": 16, "width": 768, "depth": args.depth, "heads": 12, "mlp_ratio": 4.0}
    return Network((args.side, args.side, 3), 1000, sizes, args.batch)


def ours(network: Network, images: np.ndarray, dtype: str = "float32") -> Callable[[], Any]:
    """The forward pass in JAX: images on the device to logits and features."""
    import jax
    import jax.numpy as jnp

    from oal_jax.models.vit import VisionTransformer

    sizes = network.sizes | {"mean": _IMAGENET[0], "std": _IMAGENET[1], "dtype": jnp.dtype(dtype)}
    net = VisionTransformer(network.classes, **sizes)
    first = jnp.zeros((1, *network.image_shape))
    variables, images = jax.jit(net.init)(jax.random.key(0), first), jax.device_put(images)
    apply = jax.jit(net.apply)
    return lambda: jax.block_until_ready(apply(variables, images))


def theirs(network: Network, images: np.ndarray, form: Any, device: str) -> Callable[[], Any]:
    """The same in PyTorch."""
    import torch

    from benchmarks.torch_twin import forms
    from benchmarks.torch_twin.models import Teacher

    where = torch.device(device)
    teacher = Teacher(network.image_shape, network.classes, _IMAGENET, **network.sizes)
    look = forms.compiled(form, teacher.to(where).eval())
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(where)
    return partial(_look, form, look, forms.images_as(form, tensor), where)


def _look(form, look, images, device) -> None:
    from benchmarks.torch_twin import forms

    forms.prepare(form, device)
    with forms.inference(form, device):
        look(images)
    forms.synchronise(device)


def _twin(case, name, network, images, args) -> Job:
    from benchmarks.torch_twin import forms

    form = forms.make(name, eager=args.twin_eager, dtype=args.twin_dtype)
    job = theirs(network, images, form, args.device)
    shown = f"{case}-official" if name == "reference" else case
    more = {"form": name, "twin_dtype": args.twin_dtype}
    return Job(shown, "torch", job, (case,), more, network.batch)
