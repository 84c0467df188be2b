"""Images a second through the teacher, against timm.

    python -m benchmarks.run --suite features --output results.json [--frameworks jax,torch]
        [--forms reference,tuned] [--cases vit-b16,shipped] [--runs 5] [--batch 32] [--side 224]
        [--depth 12] [--teacher-dtype float32] [--twin-dtype float32] [--device auto]

`vit-b16` is ViT-B/16 with random weights on --side pixels. `shipped` is the packaged teacher on 28
pixels, with batches 16 times as large. PyTorch runs timm's model eagerly (`-official`) and with
torch.compile.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing
from benchmarks.plots import draw as draw
from benchmarks.run import choose
from benchmarks.timing import Job

CASES = ("vit-b16", "shipped")
_MOMENTS = ((0.5,), (0.5,))


class Network(NamedTuple):
    """A Vision Transformer and the shape of its input."""

    image_shape: tuple[int, int, int]
    classes: int
    sizes: dict[str, Any]
    batch: int


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the networks, print ratios, and return the rows."""
    parser = timing.make_parser("features", __doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--depth", type=int, default=12, help="blocks of vit-b16")
    timing.add_teacher_dtype(parser)
    args = parser.parse_args(argv)
    names = choose("case", args.cases, CASES)
    timing.settle(args)
    rows = []
    for case in names:
        network = _network(case, args)
        images = np.random.default_rng(0).random((network.batch, *network.image_shape), np.float32)
        jobs = []
        if "jax" in args.frameworks:
            fields = {"teacher_dtype": args.teacher_dtype}
            job = ours(network, images, args.teacher_dtype)
            jobs.append(Job(case, "jax", job, (), fields, network.batch))
        if "torch" in args.frameworks:
            for form in args.forms:
                if form == "shortcuts":  # runs the teacher as "tuned" does
                    continue
                name = f"{case}-official" if form == "reference" else case
                fields = {"form": form, "twin_dtype": args.twin_dtype}
                job = theirs(network, images, form, args)
                jobs.append(Job(name, "torch", job, (case,), fields, network.batch))
        rows += timing.measure("features", jobs, args)
    return rows


def _network(case: str, args: argparse.Namespace) -> Network:
    if case == "shipped":
        sizes = {"patch": 4, "width": 128, "depth": 4, "heads": 4, "mlp_ratio": 2.0}
        return Network((28, 28, 1), 8, sizes, 16 * args.batch)
    sizes = {"patch": 16, "width": 768, "depth": args.depth, "heads": 12, "mlp_ratio": 4.0}
    return Network((args.side, args.side, 3), 1000, sizes, args.batch)


def ours(network: Network, images: np.ndarray, dtype: str = "float32") -> Callable[[], Any]:
    """The forward pass in JAX, from images on the device to logits and features."""
    import jax
    import jax.numpy as jnp

    from oal_jax.models.vit import VisionTransformer

    mean, std = _MOMENTS
    net = VisionTransformer(
        network.classes, **network.sizes, mean=mean, std=std, dtype=jnp.dtype(dtype)
    )
    first = jnp.zeros((1, *network.image_shape))
    variables, images = jax.jit(net.init)(jax.random.key(0), first), jax.device_put(images)
    apply = jax.jit(net.apply)
    return lambda: jax.block_until_ready(apply(variables, images))


def theirs(
    network: Network, images: np.ndarray, form_name: str, args: argparse.Namespace
) -> Callable[[], Any]:
    """The same forward pass in a form of the PyTorch twin."""
    import torch

    from benchmarks.torch_twin import forms
    from benchmarks.torch_twin.models import Teacher

    form = forms.make(form_name, eager=args.twin_eager, dtype=args.twin_dtype)
    device = torch.device(args.device)
    teacher = Teacher(network.image_shape, network.classes, _MOMENTS, **network.sizes)
    apply = forms.compiled(form, teacher.to(device).eval())
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    tensor = forms.images_as(form, tensor)

    def job() -> None:
        forms.prepare(form, device)
        with forms.inference(form, device):
            apply(tensor)
        forms.synchronise(device)

    return job
