"""Suite `outliers`: k-NN boundary sampling at the size of CIFAR-10.

    python -m benchmarks.run --suite outliers --output results.json [--frameworks jax,torch]
        [--forms reference,tuned,shortcuts] [--runs 5] [--repeats 1] [--classes 10] [--features 500]
        [--width 768] [--neighbour 300] [--anchors 50] [--noise-rows 1500] [--device auto]

All classes, from unit features on the device to the outliers there; 50 x 1500 = 75,000 candidates
a class and repeat. Cases, named for how distances are found: `faiss` (all candidates stacked, full
lists of neighbours: the official code, on the CPU), `matmul` (products with all candidates),
`products` (sums of products with anchors and with noise: ours). Rows have `peak_bytes`: the growth
of the resident memory of a fresh process in its first run, compilation too (of CPU runs alone).
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
from oal_jax.config import Knn

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


def make_features(sizes: dict[str, int]) -> np.ndarray:
    """Unit features of every class, (classes, features, width): blobs around random means."""
    rng = np.random.default_rng(0)
    shape = sizes["classes"], sizes["features"], sizes["width"]
    features = rng.normal(size=shape) + rng.normal(size=(shape[0], 1, shape[2]))
    return (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)


def make_config(sizes: dict[str, int], selection: str) -> Knn:
    """The sampling; as many boundary points as anchors, the published noise."""
    return Knn(
        features_per_class=sizes["features"],
        neighbour=sizes["neighbour"],
        boundary=sizes["anchors"],
        anchors=sizes["anchors"],
        noise_rows=sizes["noise_rows"],
        repeats=sizes["repeats"],
        selection=selection,
    )


def ours(sizes: dict[str, int]) -> Callable[[], Any]:
    """The job in JAX."""
    import jax

    from oal_jax.outliers.knn import sample_class
    from oal_jax.stages.outliers import sampling

    knn, key = make_config(sizes, "top"), jax.random.key(0)
    classes = jax.device_put(list(make_features(sizes)))

    def job():
        found = [
            sample_class(jax.random.fold_in(key, c), features, **sampling(knn))
            for c, features in enumerate(classes)
        ]
        return jax.block_until_ready(found)

    return job


def theirs(sizes: dict[str, int], form: str, device: str) -> Callable[[], Any]:
    """The job in PyTorch."""
    import torch

    from benchmarks.torch_twin import forms, outliers

    how, where = forms.FORMS[form].knn, torch.device(device)
    knn = make_config(sizes, "reference" if form == "reference" else "top")
    classes = torch.from_numpy(make_features(sizes)).to(where)
    random = torch.Generator().manual_seed(0)

    def job():
        found = [outliers.sample_class(features, knn, how, random) for features in classes]
        forms.synchronise(where)
        return found

    return job


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the jobs in turns; print ratios; return the rows."""
    parser = timing.parser("outliers")
    for name, size in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    args = parser.parse_args(argv)
    timing.settle(args, ("torch", "timm", "faiss"))
    sizes = {name: getattr(args, name) for name in _SIZES}
    kept = 2 * sizes["classes"] * sizes["anchors"] * sizes["repeats"]
    jobs = []
    if "jax" in args.frameworks:
        jobs.append(Job(_OURS, "jax", ours(sizes), more=_memory("jax", sizes, args), items=kept))
    if "torch" in args.frameworks:
        jobs += [_twin(form, sizes, args, kept) for form in args.forms]
    return timing.measure("outliers", jobs, args)


def _twin(form: str, sizes: dict[str, int], args: argparse.Namespace, kept: int) -> Job:
    from benchmarks.torch_twin.forms import FORMS

    more = {"form": form, **_memory(form, sizes, args)}
    job = theirs(sizes, form, args.device)
    return Job(FORMS[form].knn, "torch", job, against=(_OURS,), more=more, items=kept)


def _memory(who: str, sizes: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    if not (_on_cpu(who, args) and Path("/proc/self/clear_refs").exists()):
        return {"sizes": sizes}
    code = f"from benchmarks.outliers import measure_memory; measure_memory({who!r}, {sizes!r})"
    printed = timing.python(["-c", code]).splitlines()
    return {"sizes": sizes, "peak_bytes": json.loads(printed[-1])}


def _on_cpu(who: str, args: argparse.Namespace) -> bool:
    if who != "jax":
        return args.device == "cpu"
    import jax

    return jax.default_backend() == "cpu"


def measure_memory(who: str, sizes: dict[str, int]) -> None:
    """Print the bytes that "jax", or a form of the twin, takes; in a process of its own."""
    job = ours(sizes) if who == "jax" else theirs(sizes, who, "cpu")
    print(json.dumps(timing.peak_growth(job)))
