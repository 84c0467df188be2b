"""Stage `teacher`: the frozen classifier that is distilled; shipped, from a file, or trained.

`teacher.weights` names the file of a published ViT or ResNet (`oal_jax.pretrained.classifiers`). It
has its own image size and normalisation; the model resizes images of the ID set. `teacher.train`
fine-tunes it as arXiv 2406.16525's code does: Adam, with a rate of the body far below the head's.
"""

import logging
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from oal_jax.config import GENERATED, Config, Teacher
from oal_jax.data.augment import augment
from oal_jax.data.info import DatasetInfo
from oal_jax.errors import UserError
from oal_jax.methods import base
from oal_jax.methods.ce import cross_entropy
from oal_jax.models.normalise import moments
from oal_jax.models.resized import Resized
from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import VisionTransformer
from oal_jax.pretrained import classifiers
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import named
from oal_jax.scores.forward import make_forward
from oal_jax.stages import file_networks
from oal_jax.stages.context import Context, outputs_of_set
from oal_jax.training import arrays as streams
from oal_jax.training import loop, session
from oal_jax.training.optimizer import adam_by_part, adamw
from oal_jax.training.state import init_state, make_train_step

SHIPPED = files("oal_jax") / "pretrained" / "weights" / "fashion_teacher.safetensors"
_FILE = "teacher.safetensors"
_CARD = "teacher.json"  # the network of a file's weights
_HEADS = ("head", "fc")  # names of the head in a ViT and in a ResNet
_LOGGER = logging.getLogger("absl")
_FLOOR = 1e-4  # last multiplier of the fine-tuning rates: 1e-8 for the head's 1e-4


def model(config: Config, num_classes: int) -> Any:
    """The teacher's network by the config's sizes; it normalises its images itself.

    Without `teacher.weights` it normalises by the mean and standard deviation of the ID set.
    """
    t = config.teacher
    if t.weights:
        return Resized(_vit(config, num_classes, (0.5,) * 3, (0.5,) * 3), t.image_size or 224)
    if t.architecture == "resnet":
        return _resnet(config, num_classes)
    return _vit(config, num_classes, *moments(config.data.id_set))


def abstract_variables(config: Config, info: DatasetInfo) -> dict[str, Any]:
    """Shapes and types of the teacher's variables."""
    net, image = model(config, info.num_classes), (1, *info.image_shape)
    return jax.eval_shape(lambda key: net.init(key, jnp.zeros(image)), jax.random.key(0))


def network(context: Context, num_classes: int) -> Any:
    """The teacher's network: `model`, or the one that the stage read from `teacher.weights`."""
    if not context.config.teacher.weights:
        return model(context.config, num_classes)
    t = context.config.teacher
    card = artifacts.read_json(context.directory("teacher") / _CARD)
    options = {"num_classes": num_classes, "dtype": jnp.dtype(t.dtype), "remat": t.remat}
    return file_networks.rebuild(card, **options)


def _resnet(config: Config, num_classes: int) -> ResNet:
    t, (mean, std) = config.teacher, moments(config.data.id_set)
    return ResNet(
        num_classes=num_classes,
        depth=18,
        width=t.width // 8,
        stem=config.student.stem,
        mean=mean,
        std=std,
        dtype=jnp.dtype(t.dtype),
        remat=t.remat,
    )


def _vit(config: Config, num_classes: int, mean, std) -> VisionTransformer:
    t = config.teacher
    return VisionTransformer(
        num_classes=num_classes,
        patch=t.patch,
        width=t.width,
        depth=t.depth,
        heads=t.heads,
        mlp_ratio=t.mlp_ratio,
        mean=mean,
        std=std,
        dtype=jnp.dtype(t.dtype),
        remat=t.remat,
    )


def run(context: Context) -> list[Path]:
    """Write `teacher.safetensors`, and for weights from a file `teacher.json`, their network.

    The log has the validation accuracy of a trained teacher.
    """
    config, stage = context.config.teacher, context.directory("teacher")
    path, written = stage / _FILE, []
    if config.weights:
        classifier, tensors = _from_file(context)
        card = stage / _CARD
        size, _, channels = classifier.config.image_shape
        artifacts.write_json(card, file_networks.describe(classifier.net, size, channels))
        written.append(card)
        if config.train:
            tensors = _train(context, tensors)
    elif config.train:
        # Half precision, for the package: it does not change the features noticeably.
        tensors = {name: t.astype(np.float16) for name, t in _train(context).items()}
    else:
        tensors = _shipped(context)
        _warn_of_left_out(context)
    artifacts.write_tensors(path, tensors)
    variables(context)  # raises for shapes that do not fit the config
    return [path, *written]


def _warn_of_left_out(context: Context) -> None:
    """Warn where `data.leave_out` takes out classes that the shipped weights were trained on."""
    left = context.config.data.leave_out
    if not left:
        return
    _LOGGER.warning(
        "the shipped teacher has been trained on '%s', which data.leave_out takes out of the ID"
        " set, and so has the shipped generator: they know that near-OOD set. teacher.train=True"
        " and generator.train=True train them without it",
        "', '".join(left),
    )


def _shipped(context: Context) -> dict[str, np.ndarray]:
    """The tensors of the shipped weights, the head's for the ID classes alone."""
    tensors = artifacts.read_tensors(Path(str(SHIPPED)))
    left = context.config.data.leave_out
    if not left:
        return tensors
    labels, classes = context.info.kept_labels, len(context.info.all_class_names)
    return {n: t[..., labels] if _of_head(n, t, classes) else t for n, t in tensors.items()}


def _of_head(name: str, tensor: np.ndarray, classes: int) -> bool:
    return name.split(".")[0] in _HEADS and tensor.shape[-1] == classes


def variables(context: Context) -> dict[str, Any]:
    """The teacher's variables, as `apply` takes them.

    Raises:
      UserError: the shapes are not those of the config's teacher.
    """
    path = context.directory("teacher") / _FILE
    tensors = artifacts.read_tensors(path)
    _check_shapes(context, network(context, context.info.num_classes), tensors, path)
    return _unflat({name: tensor.astype(np.float32) for name, tensor in tensors.items()})


def check(context: Context) -> None:
    """Raise `UserError` if the teacher does not fit the ID set. Reads no image."""
    config, classes = context.config.teacher, context.info.num_classes
    if config.weights == GENERATED or (config.train and not config.weights):
        return
    if config.weights:
        _check_head(config, classes, Path(config.weights).expanduser())
        return
    _check_shapes(context, model(context.config, classes), _shipped(context), Path(str(SHIPPED)))


def _check_head(config: Teacher, classes: int, path: Path) -> int:
    """The number of classes of the file's head."""
    count = classifiers.describe(path)["num_classes"]
    if count != classes and not config.train:
        raise UserError(
            f"{path} has {f'a head of {count} classes' if count else 'no head'}, the ID set has"
            f" {classes} classes; set teacher.train=True to fine-tune it with a new head"
        )
    return count


def _check_shapes(context: Context, net: Any, tensors: Mapping[str, Any], path: Path) -> None:
    info = context.info
    image = jnp.zeros((1, *info.image_shape))
    expected = jax.eval_shape(lambda k: net.init(k, image), context.key)
    shapes = {name: leaf.shape for name, leaf in _flat(expected).items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        shape = tensors[name].shape if name in tensors else None
        if shape != shapes.get(name):
            raise UserError(
                f"{path}: tensor {name} has shape {shape}, not {shapes.get(name)} as in the"
                " config's teacher; set teacher.train=True, or the sizes of the weights"
            )


def load(context: Context):
    """The teacher as a function from float images in [0, 1] to `Outputs` with features."""
    net = network(context, context.info.num_classes)
    return make_forward(net, variables(context), ("features",))


def _flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by their path, other variables by COLLECTION/PATH."""
    flat = flatten_dict(variables)
    return {_prefix(path[0]) + ".".join(path[1:]): leaf for path, leaf in flat.items()}


def _prefix(collection: str) -> str:
    return "" if collection == "params" else f"{collection}/"


def _unflat(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    flat = {}
    for name, tensor in tensors.items():
        collection, _, path = name.rpartition("/")
        flat[(collection or "params", *path.split("."))] = tensor
    return unflatten_dict(flat)


def _from_file(context: Context) -> tuple[classifiers.Classifier, dict[str, np.ndarray]]:
    """The classifier of `teacher.weights`, with a new head where the ID classes need one.

    Raises:
      UserError: the file can't be read, or its head has other classes and is not trained.
    """
    config = context.config.teacher
    classes = context.info.num_classes
    path = Path(config.weights).expanduser()
    if config.weights == GENERATED:
        path = _generate(context, classes)
    count = _check_head(config, classes, path)
    key = named(context.key, "teacher head")
    classifier = classifiers.load_classifier(
        path,
        num_classes=classes,
        image_size=config.image_size or None,
        new_head=None if count == classes else key,
    )
    tensors = {name: np.asarray(leaf) for name, leaf in _flat(classifier.variables).items()}
    return classifier, tensors


def _generate(context: Context, classes: int) -> Path:
    """The file of a ViT of random weights in timm's format, for twice the ID images' size.

    It has one class more where it is to get a new head.
    """
    side = 2 * context.info.image_shape[0]
    net = _vit(context.config, classes + context.config.teacher.train, (0.5,) * 3, (0.5,) * 3)
    image = jnp.zeros((1, side, side, 3))
    params = jax.jit(net.init)(named(context.key, "generated teacher"), image)["params"]
    path = context.directory("teacher") / "generated.safetensors"
    return classifiers.save_timm(path, params, None, net, image_size=side)


def _train(
    context: Context, start: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Train from random weights, or fine-tune `start`; returns the tensors by name."""
    config, mesh = context.config.teacher, context.mesh
    distributed.check_batch("teacher.batch_size", config.batch_size, mesh)
    data, validation = context.all_train_images(), context.opened("validation")
    net = network(context, len(data.class_names))
    plan = loop.Plan(data.examples, config.batch_size, config.epochs, log_every=50)
    optimizer = _fine_tuning(context, plan.steps) if start else _from_scratch(context, plan.steps)
    method = cross_entropy(net, data.image_shape)
    key = named(context.key, "teacher")
    shift, flip = context.config.data.shift, context.config.data.flip
    state = init_state(method, optimizer, key, mesh)
    if start:
        params, rest = base.split_variables(_unflat(start))
        state = state.replace(params={"student": params}, model_state={"student": rest})

    def make_batch(arrays, indices, epoch, step):
        del step
        views = jnp.broadcast_to(epoch, indices.shape)
        stored, labels = streams.drawn(arrays, indices)
        images = augment(named(key, "views"), stored, indices, views, shift=shift, flip=flip)
        return {"image": images, "label": labels}

    def of(state):
        return {"params": state.params["student"], **state.model_state["student"]}

    def evaluate(state):
        forward = make_forward(net, of(state), ())
        outputs, labels = outputs_of_set(forward, validation, 500, mesh)
        return {"val_accuracy": float(np.mean(outputs.logits.argmax(-1) == labels))}

    state = session.train(
        make_train_step(method, optimizer, key),
        state,
        streams.arrays(data),
        make_batch,
        plan,
        workdir=context.workdir,
        directory=context.directory("teacher") / "checkpoints",
        name="teacher",
        evaluate=evaluate,
        key=key,
        mesh=mesh,
        rows=streams.rows(data, key, plan),
    )
    return {name: distributed.to_host(leaf) for name, leaf in _flat(of(state)).items()}


def _from_scratch(context: Context, steps: int):
    config = context.config.teacher
    return adamw(
        peak=config.learning_rate,
        steps=steps,
        warmup=0.1,
        floor=1e-3,
        weight_decay=config.weight_decay,
        clip=1.0,
    )


def _fine_tuning(context: Context, steps: int):
    config = context.config.teacher

    def part_of(path) -> str:
        return "head" if any(getattr(entry, "key", "") in _HEADS for entry in path) else "body"

    rates = {"body": config.body_rate, "head": config.head_rate}
    return adam_by_part(rates, part_of, steps=steps, floor=_FLOOR)
