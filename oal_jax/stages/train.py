"""Stage `train`: the student, by the method of the config, through the one loop."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Float, Int

from oal_jax.config import Config
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.errors import UserError
from oal_jax.methods import base, registry
from oal_jax.models.linear_head import LinearHead, standardise, unstandardised
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import named
from oal_jax.scores.forward import make_forward
from oal_jax.stages import batches, student, teacher
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
    net = student.network(config, len(data.class_names))
    if config.student.weights and config.student.tune == "head":
        return _write(context, net, data, *_train_head(context, net, data, validation))
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
        _check_collapse(outputs.logits, labels, int(state.step), plan)
        return {"val_accuracy": float(np.mean(outputs.logits.argmax(-1) == labels))}

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
    # Queues and multipliers of a method are for resuming alone: they stay in the checkpoints.
    statistics = {group: s for group, s in state.model_state.items() if group in state.params}
    return _write(context, net, data, finish(state.params), statistics)


def _train_head(
    context: Context, net: Any, data: ImageSet | Streamed, validation: ImageSet | Streamed
) -> tuple[dict, dict]:
    """(params, statistics) of the file's network with a linear head, trained on its features.

    Every image passes through the network once, without augmentation.
    """
    config, mesh = context.config, context.mesh
    key, classes = named(context.key, "student"), len(data.class_names)
    variables = student.variables_of_file(config, classes, named(key, "head"))
    forward = make_forward(net, variables, ("features",))
    forward = distributed.place_parameters(forward, mesh)

    def features_of(images):
        size = config.evaluation.batch_size
        outputs, labels = outputs_of_set(forward, images, size, mesh, ("features",))
        return outputs.features, labels

    features, labels = features_of(data)
    val_features, val_labels = features_of(validation)
    features, mean, deviation = standardise(features)
    head = LinearHead(classes)
    method = assemble(config, head, features.shape[1:], {}, {}, len(features))
    plan = make_plan(config, len(features))
    optimizer = make_optimizer(config, ["student"], plan.steps)

    def make_batch(arrays, indices, epoch, step):
        del epoch, step
        return {"image": arrays["features"][indices], "label": arrays["labels"][indices]}

    def evaluate(state):
        trained = jax.device_get(averaged(state).params["student"]["fc"])
        fc = unstandardised(trained, mean, deviation)
        logits = val_features @ fc["kernel"] + fc["bias"]
        return {"val_accuracy": float(np.mean(logits.argmax(-1) == val_labels))}

    fresh = init_state(method, optimizer, key, mesh)
    state = session.train(
        make_train_step(method, optimizer, key, config.train.accumulate, ema=config.train.ema),
        with_average(fresh) if config.train.ema else fresh,
        {"features": features, "labels": labels},
        make_batch,
        plan,
        workdir=context.workdir,
        directory=context.directory("train") / CHECKPOINTS,
        keep=config.train.keep_checkpoints,
        name="train",
        evaluate=evaluate,
        key=key,
        mesh=mesh,
    )
    trained = jax.tree.map(distributed.to_host, averaged(state).params["student"]["fc"])
    params, statistics = base.split_variables(variables)
    fc = jax.tree.map(jnp.asarray, unstandardised(trained, mean, deviation))
    params = params | {student.HEAD: fc}
    return {"student": params}, {"student": statistics}


def _write(
    context: Context, net: Any, data: ImageSet | Streamed, params: Any, statistics: Any
) -> list[Path]:
    """Write `student.safetensors` and `classifier.json`."""
    path = context.directory("train") / STUDENT
    flat = flatten_dict({"params": params, "state": statistics})
    artifacts.write_tensors(path, {".".join(k): distributed.to_host(v) for k, v in flat.items()})
    card = path.with_name(CLASSIFIER)
    content = {
        "image_shape": data.image_shape,
        "decoding": dataclasses.asdict(context.info.decoding),
        "class_names": data.class_names,
        "architecture": student.architecture(net),
    }
    if described := student.description(net):
        content["network"] = described
    artifacts.write_json(card, content)
    return [path, card]


def _started(
    context: Context, net: Any, data: ImageSet | Streamed, fresh: TrainState
) -> TrainState:
    """The fresh state, its student replaced by that of `train.start` or `student.weights`."""
    config = context.config
    if config.train.start:
        params, model_state = start(context, net, data)
    elif config.student.weights:
        key = named(context.key, "student head")
        variables = student.variables_of_file(config, len(data.class_names), key)
        params, model_state = base.split_variables(variables)
    else:
        return fresh
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
    path, card = check_start(context.config, data.class_names)
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
    now = {"image_shape": data.image_shape, **student.architecture(net)}
    before = {"image_shape": card.get("image_shape"), **card.get("architecture", {})}
    for name, value in json.loads(json.dumps(now)).items():
        if card and name not in ("dropout", "dtype") and before.get(name, value) != value:
            raise UserError(
                f"{path} has another architecture than this config's: {name} is"
                f" {before[name]}, not {value}; see student.* and data.*"
            )
    return saved


def check_start(config: Config, class_names: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The weights that `train.start` names, and the card beside them.

    Raises:
      UserError: they are missing, or know other classes.
    """
    path = start_file(config)
    if not path.is_file():
        raise UserError(
            f"config train.start={config.train.start}: there is no {path}; give the directory of a"
            " finished run"
        )
    card_path = path.with_name(CLASSIFIER)
    card = artifacts.read_json(card_path) if card_path.exists() else {}
    classes = card.get("class_names")
    if classes is not None and classes != list(class_names):
        raise UserError(
            f"{path} knows other classes than {config.data.id_set}: {len(classes)} such as"
            f" '{classes[0]}', not {len(class_names)} such as '{class_names[0]}'"
        )
    return path, card


def _shapes(params: dict, rest: dict) -> dict[str, tuple[int, ...]]:
    flat = flatten_dict({"params": params, **rest})
    return {".".join(path): tuple(leaf.shape) for path, leaf in flat.items()}


def _check_collapse(
    logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], step: int, plan: loop.Plan
) -> None:
    """Raise `TrainingFailed` where every validation image gets the same label.

    The first third of a training, its first hundred steps, and sets of a few images are too noisy
    to tell. A set that is mostly of one class may deserve one label.
    """
    predictions = logits.argmax(-1)
    accuracy, constant = float(np.mean(predictions == labels)), len(set(predictions.tolist())) == 1
    late = step > max(100, plan.steps / 3)
    if late and constant and len(labels) >= 20 and accuracy < 1.5 / logits.shape[-1]:
        raise loop.TrainingFailed(
            f"student: collapsed, validation accuracy {accuracy:.1%} at step {step};"
            " lower train.learning_rate or train.clip, or raise train.warmup"
        )


def student_variables(params: dict, model_state: dict) -> dict[str, Any]:
    """The variables of the student alone, as `apply` takes them."""
    return {"params": params["student"], **model_state["student"]}


def load(context: Context) -> tuple[dict, dict]:
    """(params, model_state) of the trained groups.

    Raises:
      UserError: the file is damaged, or does not hold a student.
    """
    path = context.directory("train") / STUDENT
    try:
        params, state = _read(path)
        head = params["student"][student.HEAD]
        head["kernel"].shape, head["bias"].shape
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} does not hold the weights of a student") from None
    return params, state


def _read(path: Path) -> tuple[dict, dict]:
    tensors = artifacts.read_tensors(path)
    tree = unflatten_dict({tuple(k.split(".")): v for k, v in tensors.items()})
    # A network without batch normalisation has no state.
    return tree["params"], {group: {} for group in tree["params"]} | tree.get("state", {})
