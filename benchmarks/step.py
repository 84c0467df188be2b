"""Suite `step`: what a training step of each method costs, in units of one by cross-entropy.

    python -m benchmarks.run --suite step --output results.json [--cases um,umap] [--steps 40]
        [--config configs/fashion.py]

The student and batch size of the config, on a batch of random images that stays the same. The
methods take turns, a step each, after two steps that do not count (compilation).
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.cases import load_config
from benchmarks.run import row
from oal_jax.config import Config, flatten, unflatten
from oal_jax.data.benchmarks import CLASS_NAMES
from oal_jax.errors import UserError
from oal_jax.methods import build
from oal_jax.stages import train
from oal_jax.training.state import init_state, make_train_step

BASELINE = "ce"
CASES: dict[str, dict[str, Any]] = {
    "ce": {"method.name": "ce"},
    "um": {"method.name": "um"},
    "umap": {"method.name": "umap"},
    "umap-free": {"method.name": "umap", "method.freeze": False},
    "logitnorm": {"method.name": "logitnorm"},
    "oe": {"method.name": "oe"},
    "energy": {"method.name": "energy"},
}
_IMAGE_SHAPES = {"fashion": (28, 28, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the steps in turns; print the ratios; return the rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.run --suite step")
    parser.add_argument("--config", type=Path, default=Path("configs/fashion.py"))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)
    base = load_config(args.config)
    names = list(dict.fromkeys([BASELINE, *args.cases.split(",")]))
    for name in names:
        if name not in CASES:
            raise UserError(f"case '{name}' is unknown; known: {', '.join(CASES)}")
    steps = {name: stepper(unflatten(flatten(base) | CASES[name])) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.steps + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        ratios = np.array(times) / np.array(seconds[BASELINE])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(
            f"{name:10s} {1000 * np.median(times):7.1f} ms  {middle:5.2f} x {BASELINE}"
            f" (quartiles {low:.2f} to {high:.2f})"
        )
    return [row("step", name, times) for name, times in seconds.items()]


def stepper(config: Config) -> Callable[[], None]:
    """A function that takes the next training step of the config's method, and waits for it."""
    id_set = config.data.id_set
    if id_set not in _IMAGE_SHAPES:
        raise UserError(f"suite step knows no image size of '{id_set}'")
    shape, classes = _IMAGE_SHAPES[id_set], len(CLASS_NAMES.get(id_set, range(8)))
    net = train.student(config, classes)
    parts = build.Parts(
        config,
        net,
        shape,
        shapes={},
        steps=1000,
        epoch_steps=100,
        start_loss=None,
        ce_transform=None,
    )
    method = build.make(parts, constraint=0.5)
    key = jax.random.key(0)
    groups = list(jax.eval_shape(method.init, key)[0])
    optimizer = train.make_optimizer(config, groups, steps=1000)
    step = jax.jit(make_train_step(method, optimizer, key), donate_argnums=0)
    size = config.train.batch_size
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(size=(size, *shape)).astype(np.float32),
        "outlier_image": rng.uniform(size=(size, *shape)).astype(np.float32),
        "label": rng.integers(0, classes, size).astype(np.int32),
    }
    batch, state = jax.device_put(batch), init_state(method, optimizer, key)

    def take() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return take
