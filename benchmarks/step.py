"""One training step of every method, and of OAL against PyTorch.

    python -m benchmarks.run --suite step --output results.json [--cases um,oal] [--runs 20]
        [--config configs/fashion.py] [--frameworks jax,torch] [--forms reference,tuned,shortcuts]
        [--batch 16] [--side 224] [--teacher-depth 12] [--teacher-dtype float32]
        [--twin-dtype float32] [--device auto]

Methods are timed in JAX with the student and batch size of the config, and compared with a step of
cross-entropy (`ce`). OAL is timed in both frameworks:

    oal, oal-large                  the default recipe of suite `job` with cached teacher outputs
    oal-teacher, oal-large-teacher  its reference recipe: the teacher runs in the step
    ...-official                    the reference recipe in PyTorch as the official code runs it

`large` is ViT-B/16 and ResNet-18 with random weights on --batch images of --side pixels. JAX runs
the program that training runs, on one device. Every step sees the same batch of random images and
no outlier images.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.cases import CONFIGS, load_config
from benchmarks.job import RECIPE, configs
from benchmarks.plots import draw as draw
from benchmarks.run import choose
from benchmarks.timing import Job
from oal_jax.config import Config, flatten, unflatten
from oal_jax.config.class_names import CLASS_NAMES
from oal_jax.errors import UserError
from oal_jax.models.normalise import moments
from oal_jax.runtime import distributed
from oal_jax.stages import student, teacher, train
from oal_jax.training import loop
from oal_jax.training.state import init_state, make_train_step

BASELINE = "ce"
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"method.name": "ce"},
    "um": {"method.name": "um"},
    "umap": {"method.name": "umap"},
    "umap-free": {"method.name": "umap", "method.umap.freeze": False},
    "logitnorm": {"method.name": "logitnorm"},
    "oe": {"method.name": "oe"},
    "energy": {"method.name": "energy"},
    "woods": {"method.name": "woods"},
    # With their loss from the first step, as later in a training.
    "vos": {"method.name": "vos", "method.vos.start": 0.0},
    "npos": {"method.name": "npos", "method.npos.start": 0.0},
}
# Recipe of suite `job`, and whether the networks are large.
OAL = {
    "oal": ("default", False),
    "oal-teacher": ("reference", False),
    "oal-large": ("default", True),
    "oal-large-teacher": ("reference", True),
}
_EPOCH_STEPS = 100  # of the training that the timed steps are part of
_QUEUE_STEPS = 70  # until the queues of vos and npos are full and their loss begins
_IMAGE_SHAPES = {"fashion": (28, 28, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}


class Problem(NamedTuple):
    """A training step: the config, and a batch on the host (images with channels last)."""

    config: Config
    classes: int
    batch: dict[str, np.ndarray]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.batch["image"].shape[1:]

    @property
    def plan(self) -> loop.Plan:
        """The training that the step is part of."""
        return train.make_plan(self.config, _EPOCH_STEPS * self.config.train.batch_size)


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the steps, print ratios, and return the rows."""
    parser = timing.make_parser("step", __doc__, runs=20)
    parser.add_argument("--config", type=Path, default=CONFIGS / "fashion.py", help="of methods")
    parser.add_argument("--cases", default=",".join([*METHODS, *OAL]))
    parser.add_argument("--batch", type=int, default=16, help="of the large cases")
    parser.add_argument("--side", type=int, default=224, help="of the large cases")
    parser.add_argument("--teacher-depth", type=int, default=12, help="of the large cases")
    timing.add_teacher_dtype(parser)
    args = parser.parse_args(argv)
    names = choose("case", args.cases, [*METHODS, *OAL])
    timing.settle(args)
    rows = []
    methods = [name for name in names if name in METHODS]
    if methods and "jax" in args.frameworks:
        base = load_config(args.config)
        names_timed = dict.fromkeys([BASELINE, *methods])
        rows += timing.measure("step", [_method_job(n, base) for n in names_timed], args)
    for name in names:
        if name in OAL:
            rows += timing.measure("step", _oal_jobs(name, args), args)
    return rows


def _method_job(name: str, base: Config) -> Job:
    config = unflatten(flatten(base) | METHODS[name])
    step = ours(method_problem(config))
    if config.method.name in ("vos", "npos"):
        for _ in range(_QUEUE_STEPS):
            step()
    against = () if name == BASELINE else (BASELINE,)
    return Job(name, "jax", step, against, items=config.train.batch_size)


def _oal_jobs(name: str, args: argparse.Namespace) -> list[Job]:
    recipe, large = OAL[name]
    problem = oal_problem(recipe, large, args)
    jobs, size = [], problem.config.train.batch_size
    if "jax" in args.frameworks:
        fields = {"teacher_dtype": args.teacher_dtype}
        jobs.append(Job(name, "jax", ours(problem), (), fields, size))
    if "torch" in args.frameworks:
        for form in args.forms:
            if RECIPE[form] == recipe:
                case = f"{name}-official" if form == "reference" else name
                fields = {"form": form, "twin_dtype": args.twin_dtype}
                jobs.append(Job(case, "torch", theirs(problem, form, args), (name,), fields, size))
    return jobs


def method_problem(config: Config) -> Problem:
    """A step of the config's method on images, outlier images and wild images.

    Raises:
      UserError: the config's ID set has no known image size.
    """
    id_set, size = config.data.id_set, config.train.batch_size
    if id_set not in _IMAGE_SHAPES:
        known = ", ".join(_IMAGE_SHAPES)
        raise UserError(f"suite step has no image size for data.id_set '{id_set}'; known: {known}")
    classes = len(CLASS_NAMES.get(id_set, range(8)))
    rng = np.random.default_rng(0)
    names = ("image", "outlier_image", "wild_image")
    images = {n: rng.random((size, *_IMAGE_SHAPES[id_set]), np.float32) for n in names}
    return Problem(config, classes, images | {"label": np.arange(size, dtype=np.int32) % classes})


def oal_problem(recipe: str, large: bool, args: argparse.Namespace) -> Problem:
    """A step of OAL by a recipe of suite `job`, on a batch of random numbers."""
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

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(size, *shape)).astype(np.float32)

    batch = {
        "image": rng.random((size, *shape), np.float32),
        "label": rng.integers(0, classes, size).astype(np.int32),
        "outlier": normal(config.teacher.width),
    }
    if config.method.oal.objective == "energy":
        batch |= {"outlier_latent": normal(side, side, 4), "latent": normal(side, side, 4)}
    else:
        batch["outlier_latent"] = normal(side)
    if config.teacher.views:
        batch["teacher_logits"] = normal(classes)
        batch["teacher_features"] = normal(config.teacher.width)
    return Problem(config, classes, batch)


def ours(problem: Problem) -> Callable[[], None]:
    """A function that takes the next step in JAX and waits for it.

    OAL without cached teacher outputs runs the teacher in the step.
    """
    config, classes, batch = problem
    net = student.network(config, classes)
    estimate = {"unmasked": 0.5, "constraint": 0.5}
    method = train.assemble(
        config, net, problem.image_shape, batch, estimate, problem.plan.examples
    )
    key, steps = jax.random.key(0), problem.plan.steps
    optimizer = train.make_optimizer(config, list(jax.eval_shape(method.init, key)[0]), steps)
    look = teacher.model(config, classes)
    runs_teacher = config.method.name == "oal" and not config.teacher.views
    variables = {}
    if runs_teacher:
        variables = jax.jit(look.init)(key, jnp.zeros((1, *problem.image_shape)))

    def make_batch(arrays, *_):
        batch, variables = arrays
        if runs_teacher:
            logits, features = look.apply(variables, batch["image"])
            batch = batch | {"teacher_logits": logits, "teacher_features": features}
        return batch

    mesh = distributed.make_mesh(devices=jax.devices()[:1])
    state = init_state(method, optimizer, key, mesh)
    train_step = make_train_step(method, optimizer, key)
    step = loop.compile_step(train_step, make_batch, problem.plan, mesh)
    order = jnp.zeros((problem.plan.steps_per_epoch, config.train.batch_size), jnp.int32)
    arguments = distributed.replicate(((batch, variables), order), mesh)

    def take() -> None:
        nonlocal state
        state, metrics = step(state, *arguments)
        jax.block_until_ready((state, metrics))

    return take


def theirs(problem: Problem, form_name: str, args: argparse.Namespace) -> Callable[[], None]:
    """The same step in a form of the PyTorch twin."""
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
    step = training.make_step(oal.to(device).train(), look, config, form, problem.plan.steps)

    def take() -> None:
        forms.prepare(form, device)
        step(batch)
        forms.synchronise(device)

    return take
