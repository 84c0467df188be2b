"""Stage `train`: the student, by the method of the config, through the one loop."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from oal_jax.config import Config
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.errors import UserError
from oal_jax.methods import base, registry
from oal_jax.models.densenet import DenseNet
from oal_jax.models.normalise import moments
from oal_jax.models.resnet import ResNet
from oal_jax.models.wide_resnet import WideResNet
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import named
from oal_jax.scores.forward import make_forward
from oal_jax.stages import batches, teacher
from oal_jax.stages.context import Context, outputs_of_set
from oal_jax.training import arrays as streams
from oal_jax.training import loop, session
from oal_jax.training.optimizer import grouped_sgd
from oal_jax.training.state import (
    TrainState,
    averaged,
    check_split,
    init_state,
    make_train_step,
    with_average,
)

STUDENT = "student.safetensors"
CHECKPOINTS = "checkpoints"
CLASSIFIER = "classifier.json"
CONSTRAINT = "constraint.json"  # of stage `estimate_loss`


def student(config: Config, num_classes: int) -> Any:
    """The student's network; it normalises images by the ID set's mean and standard deviation."""
    s, (mean, std) = config.student, moments(config.data.id_set)
    common = {"num_classes": num_classes, "depth": s.depth, "affine_bn": s.affine_bn}
    common |= {"mean": mean, "std": std, "dtype": jnp.dtype(s.dtype), "remat": s.remat}
    if s.architecture == "densenet":
        return DenseNet(**common, growth=s.width, dropout=s.dropout)
    if s.architecture == "wide_resnet":
        return WideResNet(**common, widen=s.width, dropout=s.dropout)
    return ResNet(**common, width=s.width, stem=s.stem)


def make_method(
    context: Context, net: Any, image_shape: tuple[int, int, int], arrays: dict, examples: int
) -> base.Method:
    """The method of the config, for `examples` images and arrays as `make_arrays` gives them."""
    estimate = {}
    if registry.reads_estimate(context.config):
        estimate = artifacts.read_json(context.directory("estimate_loss") / CONSTRAINT)
    return assemble(context.config, net, image_shape, arrays, estimate, examples)


def assemble(
    config: Config,
    net: Any,
    image_shape: tuple[int, int, int],
    arrays: dict[str, Any],
    estimate: dict[str, float],
    examples: int,
) -> base.Method:
    """The method of the config; of `arrays` the shapes alone matter.

    `estimate` is what stage `estimate_loss` wrote, where the config has that stage.
    """
    plan = make_plan(config, examples)
    parts = registry.Parts(
        config,
        net,
        image_shape,
        shapes={name: array.shape for name, array in arrays.items() if hasattr(array, "shape")},
        steps=plan.steps,
        epoch_steps=plan.steps_per_epoch,
        start_loss=estimate.get("unmasked"),
        ce_transform=None,
    )
    constraint = config.method.um.constraint
    return registry.build(parts, constraint if constraint >= 0 else estimate.get("constraint"))


def make_plan(config: Config, examples: int) -> loop.Plan:
    """Length of the student's training, and how often it logs and saves."""
    t = config.train
    return loop.Plan(examples, t.batch_size, t.epochs, t.log_every, t.checkpoint_every)


def make_optimizer(config: Config, groups: list[str], steps: int):
    """SGD with the rate of each group that the method has; a frozen student has none."""
    t = config.train
    rates = registry.rates(config)
    return grouped_sgd(
        {g: rates[g] for g in groups},
        steps=steps,
        warmup=t.warmup,
        floor=t.floor,
        momentum=t.momentum,
        weight_decay=t.weight_decay,
        clip=t.clip,
        nesterov=t.nesterov,
        rate_every=1 if t.schedule == "per_step" else steps // t.epochs,
    )


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raise `UserError` where devices and microbatches can't share a step's batches evenly."""
    size, method = config.train.batch_size, config.method
    distributed.check_batch("train.batch_size", size, mesh)
    sizes = {"train.batch_size": size, "method.outlier_batch": method.outlier_batch}
    for name, count in sizes.items():
        check_split(name, count, config.train.accumulate, mesh.shape["data"])


def run(context: Context) -> list[Path]:
    """Train; write `student.safetensors` and `classifier.json`.

    The weights file also has the groups that map outliers, if the method has some. The card has the
    image shape, how files become such images, the class names and the architecture, for readers
    without the data set.
    """
    config, mesh, directory = context.config, context.mesh, context.directory("train")
    accumulate = config.train.accumulate
    check_batches(config, mesh)
    data, validation = batches.labelled_images(context), context.opened("validation")
    net = student(config, len(data.class_names))
    arrays = batches.make_arrays(context, data)
    method = make_method(context, net, data.image_shape, arrays, data.examples)
    plan = make_plan(config, data.examples)
    key = named(context.key, "student")
    groups = list(jax.eval_shape(method.init, key)[0])
    optimizer = make_optimizer(config, groups, plan.steps)
    finish = jax.jit(method.finish)
    in_step = "teacher" in arrays
    teacher_net = teacher.network(context, len(data.class_names)) if in_step else None

    def evaluate(state):
        state = averaged(state)
        variables = student_variables(finish(state.params), state.model_state)
        batch = config.evaluation.batch_size
        forward = make_forward(net, variables, ())
        outputs, labels = outputs_of_set(forward, validation, batch, mesh)
        accuracy = float(np.mean(outputs.logits.argmax(-1) == labels))
        _check_collapse(accuracy, outputs.logits.shape[-1], int(state.step), plan)
        return {"val_accuracy": accuracy}

    fresh = _started(context, net, data, init_state(method, optimizer, key, mesh))
    state = session.train(
        make_train_step(method, optimizer, key, accumulate, ema=config.train.ema),
        with_average(fresh) if config.train.ema else fresh,
        arrays,
        batches.make_batches(context, teacher_net),
        plan,
        workdir=context.workdir,
        directory=directory / CHECKPOINTS,
        keep=config.train.keep_checkpoints,
        name="train",
        evaluate=evaluate,
        key=key,
        mesh=mesh,
        rows=streams.rows(data, key, plan),
    )
    state = averaged(state)
    path = directory / STUDENT
    # Queues and multipliers of a method are for resuming alone: they stay in the checkpoints.
    statistics = {group: s for group, s in state.model_state.items() if group in state.params}
    tree = {"params": finish(state.params), "state": statistics}
    flat = {".".join(k): distributed.to_host(v) for k, v in flatten_dict(tree).items()}
    artifacts.write_tensors(path, flat)
    card = directory / CLASSIFIER
    artifacts.write_json(
        card,
        {
            "image_shape": data.image_shape,
            "decoding": dataclasses.asdict(context.info.decoding),
            "class_names": data.class_names,
            "architecture": _architecture(net),
        },
    )
    return [path, card]


def _architecture(net: Any) -> dict[str, Any]:
    """Name and fields of a linen module, for readers outside of this package."""
    fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(net)}
    for name in ("parent", "name", "num_classes", "remat"):
        del fields[name]
    fields["dtype"] = jnp.dtype(net.dtype).name
    return {"name": type(net).__name__.lower(), **fields}


def _started(
    context: Context, net: Any, data: ImageSet | Streamed, fresh: TrainState
) -> TrainState:
    """The fresh state, its student replaced by that of `train.start`, if there is one."""
    if not context.config.train.start:
        return fresh
    params, model_state = start(context, net, data)
    return fresh.replace(
        params=fresh.params | {"student": params},
        model_state=fresh.model_state | {"student": model_state},
    )


def start_file(config: Config) -> Path:
    """The weights that `train.start` names: those of a run's directory, or the file itself."""
    path = Path(config.train.start).expanduser()
    return path if path.suffix == ".safetensors" else path / "train" / STUDENT


def start(context: Context, net: Any, data: ImageSet | Streamed) -> tuple[dict, dict]:
    """(params, model_state) of the student of `train.start`.

    Raises:
      UserError: it is missing, differs from `net` in a tensor, or was trained on other classes or
        images than `data`. So no training starts from partly random weights.
    """
    path = start_file(context.config)
    if not path.is_file():
        raise UserError(
            f"config train.start={context.config.train.start}: there is no {path}; give the"
            " directory of a finished run"
        )
    card_path = path.with_name(CLASSIFIER)
    card = artifacts.read_json(card_path) if card_path.exists() else {}
    classes = card.get("class_names")
    if classes is not None and classes != list(data.class_names):
        raise UserError(
            f"{path} knows other classes than {data.name}: {len(classes)} such as"
            f" '{classes[0]}', not {len(data.class_names)} such as '{data.class_names[0]}'"
        )
    params, model_state = _read(path)
    saved = params.get("student", {}), model_state.get("student", {})
    image = jnp.zeros((1, *data.image_shape))
    expected = base.split_variables(jax.eval_shape(net.init, context.key, image))
    saved_shapes, expected_shapes = _shapes(*saved), _shapes(*expected)
    for name in sorted(saved_shapes.keys() | expected_shapes.keys()):
        if saved_shapes.get(name) != expected_shapes.get(name):
            raise UserError(
                f"{path} has a student of another size than this config's: tensor {name} has shape"
                f" {saved_shapes.get(name)}, not {expected_shapes.get(name)}; see student.*"
            )
    # Strides leave no trace in the shapes. Dropout and precision may differ: no weight depends on
    # them.
    now = {"image_shape": data.image_shape, **_architecture(net)}
    before = {"image_shape": card.get("image_shape"), **card.get("architecture", {})}
    for name, value in json.loads(json.dumps(now)).items():
        if card and name not in ("dropout", "dtype") and before.get(name, value) != value:
            raise UserError(
                f"{path} has another architecture than this config's: {name} is"
                f" {before[name]}, not {value}; see student.* and data.*"
            )
    return saved


def _shapes(params: dict, rest: dict) -> dict[str, tuple[int, ...]]:
    flat = flatten_dict({"params": params, **rest})
    return {".".join(path): tuple(leaf.shape) for path, leaf in flat.items()}


def _check_collapse(accuracy: float, classes: int, step: int, plan: loop.Plan) -> None:
    # Past a third of the training a sound run is far above twice the accuracy of guessing. The
    # first hundred steps are too noisy to tell.
    if step > max(100, plan.steps / 3) and accuracy < 2 / classes:
        raise loop.TrainingFailed(
            f"student: collapsed, validation accuracy {accuracy:.1%} at step {step};"
            " lower train.learning_rate or train.clip, or raise train.warmup"
        )


def student_variables(params: dict, model_state: dict) -> dict[str, Any]:
    """The variables of the student alone, as `apply` takes them."""
    return {"params": params["student"], **model_state["student"]}


def load(context: Context) -> tuple[dict, dict]:
    """(params, model_state) of the trained groups."""
    return _read(context.directory("train") / STUDENT)


def _read(path: Path) -> tuple[dict, dict]:
    tensors = artifacts.read_tensors(path)
    tree = unflatten_dict({tuple(k.split(".")): v for k, v in tensors.items()})
    return tree["params"], tree["state"]
