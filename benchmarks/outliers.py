"""k-NN boundary sampling at the size of CIFAR-10, against PyTorch and faiss.

    python -m benchmarks.run --suite outliers --output results.json [--frameworks jax,torch]
        [--forms reference,tuned,shortcuts] [--runs 5] [--repeats 1] [--classes 10] [--features 500]
        [--width 768] [--neighbour 300] [--anchors 50] [--noise-rows 1500] [--device auto]

All classes, from unit features on the device to outliers on the device, with 50 x 1500 = 75,000
candidates a class and repeat. Cases are named for how distances are computed:

    products  sums of products with anchors and with noise (ours)
    matmul    products with all candidates
    faiss     stacked candidates and full lists of neighbours on the CPU, as the official code does

Rows of CPU runs have `peak_bytes`: the growth of a fresh process's resident memory in the first
run, compilation included.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.plots import draw as draw
from benchmarks.timing import Job
from oal_jax.config import Knn, Outliers

_SIZES = {
    "repeats": 1,
    "classes": 10,
    "features": 500,
    "width": 768,
    "neighbour": 300,
    "anchors": 50,
    "noise_rows": 1500,
}
_OURS = "products"


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the jobs, print ratios, and return the rows."""
    parser = timing.make_parser("outliers", __doc__)
    for name, size in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    args = parser.parse_args(argv)
    timing.settle(args, ("torch", "timm", "faiss"))
    sizes = {name: getattr(args, name) for name in _SIZES}
    count = 2 * sizes["classes"] * sizes["anchors"] * sizes["repeats"]
    jobs = []
    if "jax" in args.frameworks:
        jobs.append(Job(_OURS, "jax", ours(sizes), (), _fields("jax", sizes, args), count))
    if "torch" in args.frameworks:
        from benchmarks.torch_twin.forms import FORMS

        for form in args.forms:
            fields = {"form": form, **_fields(form, sizes, args)}
            job = theirs(sizes, form, args.device)
            jobs.append(Job(FORMS[form].knn, "torch", job, (_OURS,), fields, count))
    return timing.measure("outliers", jobs, args)


def make_features(sizes: dict[str, int]) -> np.ndarray:
    """Unit features (classes, features, width), scattered around a random mean a class."""
    rng = np.random.default_rng(0)
    shape = sizes["classes"], sizes["features"], sizes["width"]
    features = rng.normal(size=shape) + rng.normal(size=(shape[0], 1, shape[2]))
    return (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)


def make_config(sizes: dict[str, int], *, official_code: bool = False) -> Outliers:
    """The sampling's config: as many boundary points as anchors, and the published noise."""
    knn = Knn(
        features_per_class=sizes["features"],
        neighbour=sizes["neighbour"],
        boundary_points=sizes["anchors"],
        anchors=sizes["anchors"],
        noise_rows=sizes["noise_rows"],
        repeats=sizes["repeats"],
    )
    return Outliers(knn=knn, official_code=official_code)


def ours(sizes: dict[str, int]) -> Callable[[], Any]:
    """The work in JAX."""
    import jax

    from oal_jax.outliers.knn import sample_class
    from oal_jax.stages.outliers import sampling

    options, key = sampling(make_config(sizes)), jax.random.key(0)
    classes = jax.device_put(list(make_features(sizes)))

    def job() -> Any:
        outliers = [
            sample_class(jax.random.fold_in(key, c), features, **options)
            for c, features in enumerate(classes)
        ]
        return jax.block_until_ready(outliers)

    return job


def theirs(sizes: dict[str, int], form: str, device: str) -> Callable[[], Any]:
    """The work in a form of the PyTorch twin."""
    import torch

    from benchmarks.torch_twin import forms, outliers

    how, torch_device = forms.FORMS[form].knn, torch.device(device)
    config = make_config(sizes, official_code=form == "reference")
    classes = torch.from_numpy(make_features(sizes)).to(torch_device)
    random = torch.Generator().manual_seed(0)

    def job() -> Any:
        sampled = [outliers.sample_class(features, config, how, random) for features in classes]
        forms.synchronise(torch_device)
        return sampled

    return job


def _fields(form: str, sizes: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """The fields `sizes` and, on CPU, `peak_bytes` of "jax" or a form of the twin."""
    if not (_on_cpu(form, args) and Path("/proc/self/clear_refs").exists()):
        return {"sizes": sizes}
    code = f"from benchmarks.outliers import measure_memory; measure_memory({form!r}, {sizes!r})"
    output = timing.python(["-c", code])
    return {"sizes": sizes, "peak_bytes": json.loads(output.splitlines()[-1])}


def _on_cpu(form: str, args: argparse.Namespace) -> bool:
    if form != "jax":
        return args.device == "cpu"
    import jax

    return jax.default_backend() == "cpu"


def measure_memory(form: str, sizes: dict[str, int]) -> None:
    """Print the peak bytes of "jax" or a form of the twin. Needs a process of its own."""
    job = ours(sizes) if form == "jax" else theirs(sizes, form, "cpu")
    print(json.dumps(timing.peak_growth(job)))
