"""Stage `teacher`: the frozen Vision Transformer, shipped or trained anew."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from oal_jax import artifacts, distributed
from oal_jax.config import Config
from oal_jax.data.augment import augment
from oal_jax.errors import UserError
from oal_jax.keys import named
from oal_jax.methods.ce import cross_entropy
from oal_jax.models.normalise import moments
from oal_jax.models.vit import VisionTransformer
from oal_jax.stages.context import Context, apply_in_batches, classifier
from oal_jax.training import loop, session
from oal_jax.training.optimizer import adamw
from oal_jax.training.state import init_state, make_train_step

SHIPPED = files("oal_jax") / "pretrained" / "weights" / "fashion_teacher.safetensors"
_FILE = "teacher.safetensors"


def model(config: Config, num_classes: int) -> VisionTransformer:
    """The teacher's architecture, for images of the ID set's mean and standard deviation."""
    t, (mean, std) = config.teacher, moments(config.data.id_set)
    return VisionTransformer(
        num_classes=num_classes,
        patch=t.patch,
        width=t.width,
        depth=t.depth,
        heads=t.heads,
        mlp_ratio=t.mlp_ratio,
        mean=mean,
        std=std,
    )


def run(context: Context) -> list[Path]:
    """Write `teacher.safetensors`, its validation accuracy in the log when it is trained."""
    path = context.directory("teacher") / _FILE
    if context.config.teacher.train:
        tensors = _train(context)
    else:
        tensors = artifacts.read_tensors(Path(str(SHIPPED)))
    artifacts.write_tensors(path, tensors)
    variables(context)  # a shape that does not fit the config is found here, not three stages later
    return [path]


def variables(context: Context) -> dict[str, Any]:
    """The teacher's variables, as `apply` takes them.

    Raises:
      UserError: the weights are not those of the architecture in the config.
    """
    data = context.images("validation", limit=1)
    net = model(context.config, len(data.class_names))
    path = context.directory("teacher") / _FILE
    tensors = artifacts.read_tensors(path)
    image = jnp.zeros((1, *data.images.shape[1:]))
    expected = jax.eval_shape(lambda k: net.init(k, image)["params"], context.key)
    shapes = {".".join(k): v.shape for k, v in flatten_dict(expected).items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        have = tensors[name].shape if name in tensors else None
        if have != shapes.get(name):
            raise UserError(
                f"{path}: tensor {name} has shape {have}, the config's teacher wants"
                f" {shapes.get(name)}; set teacher.train=True, or its sizes back"
            )
    params = {tuple(k.split(".")): v.astype(np.float32) for k, v in tensors.items()}
    return {"params": unflatten_dict(params)}


def load(context: Context):
    """The teacher as `uint8 images -> (logits, features)`."""
    data = context.images("validation", limit=1)
    net = model(context.config, len(data.class_names))
    return classifier(net, context.mesh)(variables(context))


def _train(context: Context) -> dict[str, np.ndarray]:
    config, mesh = context.config.teacher, context.mesh
    distributed.check_batch("teacher.batch_size", config.batch_size, mesh)
    data, validation = context.all_train_images(), context.images("validation")
    net = model(context.config, len(data.class_names))
    plan = loop.Plan(len(data.images), config.batch_size, config.epochs, log_every=50)
    optimizer = adamw(
        peak=config.learning_rate,
        steps=plan.steps,
        warmup=0.1,
        floor=1e-3,
        weight_decay=config.weight_decay,
        clip=1.0,
    )
    method = cross_entropy(net, data.images.shape[1:])
    key = named(context.key, "teacher")
    shift, flip = context.config.data.shift, context.config.data.flip
    forward = classifier(net, mesh)

    def make_batch(arrays, indices, epoch, step):
        del step
        views = jnp.broadcast_to(epoch, indices.shape)
        images = augment(
            named(key, "views"), arrays["images"][indices], indices, views, shift=shift, flip=flip
        )
        return {"image": images, "label": arrays["labels"][indices]}

    def evaluate(state):
        logits, _ = apply_in_batches(
            forward({"params": state.params["student"]}), validation.images, 500, mesh
        )
        return {"val_accuracy": float(np.mean(logits.argmax(-1) == validation.labels))}

    state = session.train(
        make_train_step(method, optimizer, key),
        init_state(method, optimizer, key),
        {"images": data.images, "labels": data.labels},
        make_batch,
        plan,
        workdir=context.workdir,
        directory=context.directory("teacher") / "checkpoints",
        name="teacher",
        evaluate=evaluate,
        key=key,
        mesh=mesh,
    )
    params = flatten_dict(state.params["student"])
    # Half precision: the weights ship inside the package, and features do not notice.
    return {".".join(k): distributed.to_host(v).astype(np.float16) for k, v in params.items()}
