"""Suite `step`: what a training step costs: each method's, and OAL's beside PyTorch's.

    python -m benchmarks.run --suite step --output results.json [--cases um,oal] [--steps 40]
        [--config configs/fashion.py] [--frameworks jax,torch] [--forms reference,tuned,shortcuts]
        [--runs 20] [--batch 16] [--side 224] [--teacher-depth 12]
        [--teacher-dtype float32] [--twin-dtype float32] [--device auto]

Methods, ours alone, in units of a step by cross-entropy (`ce`): the student and batch size of the
config. They take turns, a step each, after steps that do not count: compilation, full queues.

OAL in two frameworks, in turns too, on the student and batch size of the two recipes of suite
`job`, and with ViT-B/16 and ResNet-18 at --side pixels (random weights, --batch images):

    oal, oal-large                  our default, outlier images apart: the teacher's outputs are
                                    cached
    oal-sharded                     beside oal, as training calls it: sharded over one device
    oal-teacher, oal-large-teacher  the published recipe: the teacher runs in the step; and
    ...-official                    the same in PyTorch as the official code does it

Every step is on a batch of random images that stays the same.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import timing
from benchmarks.cases import load_config
from benchmarks.job import RECIPE, configs
from benchmarks.plots import draw as draw
from benchmarks.run import row
from benchmarks.timing import Job
from oal_jax.config import Config, flatten, unflatten
from oal_jax.config.class_names import CLASS_NAMES
from oal_jax.errors import UserError
from oal_jax.methods import registry
from oal_jax.models.normalise import moments
from oal_jax.runtime import distributed
from oal_jax.stages import teacher, train
from oal_jax.training import loop
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
    "woods": {"method.name": "woods"},
    # From the first step on, as later in a training.
    "vos": {"method.name": "vos", "method.virtual.start": 0.0},
    "npos": {"method.name": "npos", "method.virtual.start": 0.0},
}
_STEPS = 1000  # of a training that the steps stand in
_FILLED = 70  # steps until the queues of 1,000 features a class are full, and the loss begins
_IMAGE_SHAPES = {"fashion": (28, 28, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}


# The recipe of suite `job`, and whether at full size.
OAL_CASES = {
    "oal": ("default", False),
    "oal-teacher": ("reference", False),
    "oal-large": ("default", True),
    "oal-large-teacher": ("reference", True),
}


class Problem(NamedTuple):
    """A step of OAL: what is trained, and on which batch of ours (images with channels last)."""

    config: Config
    classes: int
    batch: dict[str, np.ndarray]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.batch["image"].shape[1:]


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the steps in turns; print the ratios; return the rows."""
    parser = timing.parser("step", runs=20)
    parser.add_argument("--config", type=Path, default=Path("configs/fashion.py"))
    parser.add_argument("--cases", default=",".join([*CASES, *OAL_CASES]))
    parser.add_argument("--steps", type=int, default=40, help="of each method")
    parser.add_argument("--batch", type=int, default=16, help="of the large cases")
    parser.add_argument("--side", type=int, default=224, help="of the large cases")
    parser.add_argument("--teacher-depth", type=int, default=12, help="of the large cases")
    timing.add_teacher_dtype(parser)
    args = parser.parse_args(argv)
    names = args.cases.split(",")
    for name in names:
        if name not in (*CASES, *OAL_CASES):
            known = ", ".join([*CASES, *OAL_CASES])
            raise UserError(f"case '{name}' is unknown; known: {known}")
    timing.settle(args)
    rows = []
    methods = [name for name in names if name in CASES]
    if methods and "jax" in args.frameworks:
        rows += _methods(load_config(args.config), [BASELINE, *methods], args.steps)
    for name in names:
        if name in OAL_CASES:
            rows += timing.measure("step", _oal(name, args), args)
    return rows


def _methods(base: Config, names: Sequence[str], turns: int) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(names))
    steps = {name: stepper(unflatten(flatten(base) | CASES[name])) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name, step in steps.items():
        for _ in range(_FILLED if name in ("vos", "npos") else 2):
            step()
    for _ in range(turns):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        ratios = np.array(times) / np.array(seconds[BASELINE])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(
            f"{name:10s} {1000 * np.median(times):7.1f} ms  {middle:5.2f} x {BASELINE}"
            f" (quartiles {low:.2f} to {high:.2f})"
        )
    return [row("step", name, times) for name, times in seconds.items()]


def _oal(name: str, args: argparse.Namespace) -> list[Job]:
    """The jobs of a case of OAL."""
    recipe, large = OAL_CASES[name]
    problem = make_problem(recipe, large, args)
    jobs, size = [], problem.config.train.batch_size
    if "jax" in args.frameworks:
        more = {"teacher_dtype": args.teacher_dtype}
        jobs.append(Job(name, "jax", ours(problem), more=more, items=size))
        if name == "oal":
            mesh = distributed.make_mesh(devices=jax.devices()[:1])
            jobs.append(Job("oal-sharded", "jax", ours(problem, mesh), (name,), items=size))
    if "torch" in args.frameworks:
        for form in args.forms:
            if RECIPE[form] == recipe:
                case = f"{name}-official" if form == "reference" else name
                step = theirs(problem, form, args)
                more = {"form": form, "twin_dtype": args.twin_dtype}
                jobs.append(Job(case, "torch", step, (name,), more, size))
    return jobs


def make_problem(recipe: str, large: bool, args: argparse.Namespace) -> Problem:
    """A recipe's step, on a batch of random numbers."""
    config, shape, side = configs(smoke=False)[recipe], (28, 28, 1), 8
    config.outliers.image_share = 0.0
    if large:
        sizes = {
            **{"teacher.patch": 16, "teacher.width": 768, "teacher.depth": args.teacher_depth},
            **{"teacher.heads": 12, "teacher.mlp_ratio": 4.0, "train.batch_size": args.batch},
            **{"student.width": 64, "student.stem": "imagenet", "data.id_set": "cifar10"},
        }
        config = unflatten(flatten(config) | sizes)
        shape, side = (args.side, args.side, 3), 64
    config.teacher.dtype = args.teacher_dtype
    classes, size = (10 if large else 8), config.train.batch_size
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(size, *shape)).astype(np.float32)

    batch = {
        "image": rng.random((size, *shape), np.float32),
        "label": rng.integers(0, classes, size).astype(np.int32),
        "outlier": normal(config.teacher.width),
    }
    if config.method.micl == "energy":
        batch |= {"outlier_latent": normal(side, side, 4), "latent": normal(side, side, 4)}
    else:
        batch["outlier_latent"] = normal(side)
    if config.teacher.views:
        batch["teacher_logits"] = normal(classes)
        batch["teacher_features"] = normal(config.teacher.width)
    return Problem(config, classes, batch)


def ours(problem: Problem, mesh: Mesh | None = None) -> Callable[[], None]:
    """A function that takes the next step of OAL in JAX, and waits for it.

    Without a mesh the step is jitted as it is; with one, it is sharded over it as in training.
    """
    config, classes, batch = problem
    net, seen = train.student(config, classes), teacher.model(config, classes)
    shapes = {"latents": batch["outlier_latent"].shape} | {k: v.shape for k, v in batch.items()}
    parts = registry.Parts(config, net, problem.image_shape, shapes, _STEPS, 100, None, None)
    method, key = registry.make(parts, None), jax.random.key(0)
    optimizer = train.make_optimizer(config, list(jax.eval_shape(method.init, key)[0]), _STEPS)
    train_step, variables = make_train_step(method, optimizer, key), {}
    if not config.teacher.views:
        variables = jax.jit(seen.init)(key, jnp.zeros((1, *problem.image_shape)))

    def step(state, variables, batch):
        if variables:
            outputs = seen.apply(variables, batch["image"])
            batch = batch | dict(zip(("teacher_logits", "teacher_features"), outputs, strict=True))
        return train_step(state, batch)

    if mesh is None:
        batch, state = jax.device_put(batch), init_state(method, optimizer, key)
        compiled = jax.jit(step, donate_argnums=0)
        arguments = variables, batch
    else:
        assert not variables, "the teacher in the step is of the plain form alone"
        state = init_state(method, optimizer, key, mesh)
        plan = loop.Plan(_STEPS * config.train.batch_size, config.train.batch_size, 1, 1, 1)
        compiled = loop.compile_step(train_step, lambda arrays, *_: arrays, plan, mesh)
        order = jnp.zeros((_STEPS, config.train.batch_size), jnp.int32)
        arguments = distributed.replicate((batch, order), mesh)

    def take() -> None:
        nonlocal state
        state, metrics = compiled(state, *arguments)
        jax.block_until_ready((state, metrics))

    return take


def theirs(problem: Problem, form_name: str, args: argparse.Namespace) -> Callable[[], None]:
    """The same in a form of the PyTorch twin."""
    import torch

    from benchmarks.torch_twin import forms, training
    from benchmarks.torch_twin.losses import Oal
    from benchmarks.torch_twin.models import Teacher

    config, classes, arrays = problem
    form = forms.make(form_name, eager=args.twin_eager, dtype=args.twin_dtype)
    device = torch.device(args.device)
    batch = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array).to(device)
        batch[name] = tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor
    batch["label"] = batch["label"].long()
    stats = moments(config.data.id_set)
    latent_shape = tuple(batch["outlier_latent"].shape[1:])
    oal = Oal(config, problem.image_shape[2], classes, stats, latent_shape, form.club)
    look = None
    if not config.teacher.views:
        t = config.teacher
        sizes = {n: getattr(t, n) for n in ("patch", "width", "depth", "heads", "mlp_ratio")}
        look = Teacher(problem.image_shape, classes, stats, **sizes).to(device)
    step = training.make_step(oal.to(device).train(), look, config, form, 1000)

    def take() -> None:
        forms.prepare(form, device)
        step(batch)
        forms.synchronise(device)

    return take


def stepper(config: Config) -> Callable[[], None]:
    """A function that takes the next training step of the config's method, and waits for it."""
    id_set = config.data.id_set
    if id_set not in _IMAGE_SHAPES:
        raise UserError(f"suite step knows no image size of '{id_set}'")
    shape, classes = _IMAGE_SHAPES[id_set], len(CLASS_NAMES.get(id_set, range(8)))
    net = train.student(config, classes)
    parts = registry.Parts(
        config,
        net,
        shape,
        shapes={},
        steps=1000,
        epoch_steps=100,
        start_loss=0.5,
        ce_transform=None,
    )
    method = registry.make(parts, constraint=0.5)
    key = jax.random.key(0)
    groups = list(jax.eval_shape(method.init, key)[0])
    optimizer = train.make_optimizer(config, groups, steps=1000)
    step = jax.jit(make_train_step(method, optimizer, key), donate_argnums=0)
    size = config.train.batch_size
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(size=(size, *shape)).astype(np.float32),
        "outlier_image": rng.uniform(size=(size, *shape)).astype(np.float32),
        "wild_image": rng.uniform(size=(size, *shape)).astype(np.float32),
        "label": np.arange(size, dtype=np.int32) % classes,
    }
    batch, state = jax.device_put(batch), init_state(method, optimizer, key)

    def take() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return take
