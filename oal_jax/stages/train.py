"""Stage `train`: the student, by the method of the config, through the one loop."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from oal_jax import artifacts, distributed
from oal_jax.config import Config, Method
from oal_jax.data.augment import augment
from oal_jax.data.sources import ImageSet
from oal_jax.errors import UserError
from oal_jax.keys import at_step, named
from oal_jax.methods import base, ce, kd, oal, pixel
from oal_jax.models.resnet import ResNet
from oal_jax.outliers.knn import sample_random, unit
from oal_jax.stages import features, latents, outliers, teacher
from oal_jax.stages.context import Context, apply_in_batches, classifier
from oal_jax.training import loop, session
from oal_jax.training.optimizer import grouped_sgd
from oal_jax.training.state import TrainState, init_state, make_train_step

_FILE = "student.safetensors"
# What a source gives to the two outlier terms: feature outliers, latents.
SOURCES = {
    "knn": ("pool", None),
    "diffusion": ("pool", "pool"),
    "random": ("random", "random"),
    "mixed": ("half", "half"),
    "none": (None, None),  # the energy loss on the ID side alone: a control
}


def student(config: Config, num_classes: int) -> ResNet:
    """The student's architecture; gray images are normalised with the training set's moments."""
    return ResNet(
        num_classes=num_classes,
        depth=config.student.depth,
        width=config.student.width,
        stem=config.student.stem,
        mean=(0.33,),
        std=(0.35,),
    )


def needs(config: Config) -> dict[str, bool]:
    """Which outliers the method reads: feature outliers, latents, decoded latents."""
    name, source = config.method.name, config.outliers.source
    if name == "oal" and config.method.micl == "energy":
        feature, latent = SOURCES[source]
        pools = ("pool", "half")
        return {"outliers": feature in pools, "latents": latent in pools, "adapter": bool(latent)}
    club = name == "oal"
    return {"outliers": club, "latents": club or name == "pixel", "adapter": False}


def make_method(context: Context, net: ResNet, image_shape, arrays: dict[str, Any]) -> base.Method:
    """The method of the config, for arrays as `make_arrays` gives them."""
    m: Method = context.config.method
    if m.name == "ce":
        return ce.cross_entropy(net, image_shape)
    weights = {"logit_weight": m.logit_kd, "feature_weight": m.feature_kd}
    shapes = (net, image_shape, context.config.teacher.width)
    if m.name == "kd":
        return kd.distillation(*shapes, **weights)
    if m.name == "pixel":
        return pixel.outlier_exposure(*shapes, **weights, pixel_weight=m.pixel)
    if m.micl == "energy":
        total = make_plan(context.config, len(arrays["images"])).steps
        feature, latent = SOURCES[context.config.outliers.source]
        return oal.energy(
            *shapes,
            arrays["latents"].shape[1:] if latent else None,
            **weights,
            energy_weight=m.energy,
            adapter_weight=m.adapter,
            ramp_steps=(m.ramp_start * total, m.ramp_end * total),
            feature_outliers=feature is not None,
        )
    return oal.club(
        *shapes,
        arrays["outlier_latent"].shape[1],
        **weights,
        knn_weight=m.knn_club,
        latent_weight=m.latent_club,
        alternate=m.micl == "alternate",
    )


def make_arrays(context: Context, data: ImageSet) -> dict[str, Any]:
    """All that the batches are drawn from, on the host; the loop puts it on the devices."""
    config = context.config
    arrays: dict[str, Any] = {"images": data.images, "labels": data.labels}
    if config.method.name == "ce":
        return arrays
    if config.teacher.views:
        views = artifacts.read_tensors(context.directory("features") / "views.safetensors")
        arrays |= {f"teacher_{name}": value for name, value in views.items()}
    else:
        arrays["teacher"] = teacher.variables(context)
    wanted = needs(config)
    if wanted["outliers"]:
        arrays["outlier"] = outliers.flat(context)
    if wanted["adapter"]:
        arrays["latents"] = latents.of_training_images(context)
    if wanted["latents"]:
        if config.method.name == "pixel":
            arrays["outlier_image"] = latents.decoded(context)
        elif config.method.micl == "energy":
            arrays["outlier_latent"] = latents.channels_last(context)
        else:
            arrays["outlier_latent"] = latents.reduced(context)
    return arrays


def make_batches(context: Context, arrays: dict[str, Any], net: Any) -> loop.MakeBatch:
    """`make_batch(arrays, indices, epoch, step)` for the loop: pure, runs inside jit.

    Images are augmented by view (see `augment`), with the teacher's cached outputs of that very
    view; `teacher.views=0` draws a new view an epoch and runs the teacher `net` in the step.
    Outliers are drawn anew every step, without replacement where the pool is large enough.
    """
    config, key, image_key = context.config, named(context.key, "train"), features.view_key(context)
    views_cached, data = config.teacher.views, config.data
    feature, latent = SOURCES[config.outliers.source]
    energy = config.method.name == "oal" and config.method.micl == "energy"
    width = config.teacher.width
    latent_shape = arrays["latents"].shape[1:] if "latents" in arrays else ()

    def pool(step, arrays, name, count):
        size = arrays[name].shape[0]
        # The same rows for `outlier` and `outlier_latent` would be a pairing; draw them apart.
        rows = jax.random.choice(at_step(key, name, step), size, (count,), replace=size < count)
        return arrays[name][rows]

    def outliers_of(kind, step, arrays, name, count, draw):
        if kind == "random":
            return draw(at_step(key, f"random {name}", step), count)
        if kind == "pool":
            return pool(step, arrays, name, count)
        half = count // 2
        mixed = (
            pool(step, arrays, name, half),
            draw(at_step(key, f"random {name}", step), count - half),
        )
        return jnp.concatenate([unit(m) if name == "outlier" else m for m in mixed])

    def make_batch(arrays, indices, epoch, step):
        count = config.method.outlier_batch or indices.shape[0]
        if views_cached:
            views = (epoch + indices) % views_cached
        else:
            views = jnp.broadcast_to(epoch, indices.shape)
        images = augment(
            image_key, arrays["images"][indices], indices, views, shift=data.shift, flip=data.flip
        )
        batch = {"image": images, "label": arrays["labels"][indices]}
        if "teacher" in arrays:
            outputs = net.apply(arrays["teacher"], images)
            batch["teacher_logits"], batch["teacher_features"] = outputs
        elif views_cached and "teacher_logits" in arrays:
            batch["teacher_logits"] = arrays["teacher_logits"][views, indices]
            batch["teacher_features"] = arrays["teacher_features"][views, indices]
        if "latents" in arrays:
            batch["latent"] = arrays["latents"][indices].astype(jnp.float32)
        if energy and feature:
            batch["outlier"] = outliers_of(
                feature, step, arrays, "outlier", count, lambda k, n: sample_random(k, n, width)
            )
        if energy and latent:
            batch["outlier_latent"] = outliers_of(
                latent,
                step,
                arrays,
                "outlier_latent",
                count,
                lambda k, n: jax.random.normal(k, (n, *latent_shape)),
            )
        if not energy:
            for name in ("outlier", "outlier_latent", "outlier_image"):
                if name in arrays:
                    batch[name] = pool(step, arrays, name, count)
        if "outlier_image" in batch:
            batch["outlier_image"] = batch["outlier_image"].astype(jnp.float32) / 255
        return batch

    return make_batch


def make_plan(config: Config, examples: int) -> loop.Plan:
    """Length and rhythm of the student's training."""
    t = config.train
    return loop.Plan(examples, t.batch_size, t.epochs, t.log_every, t.checkpoint_every)


def make_optimizer(config: Config, groups: list[str], steps: int):
    """SGD with the rate of each group that the method has."""
    t = config.train
    rates = {
        "student": t.learning_rate,
        "projector": t.projector_rate,
        "adapter": t.adapter_rate,
        "club": t.club_rate,
        "energy": t.energy_rate,
    }
    return grouped_sgd(
        {g: rates[g] for g in groups},
        steps=steps,
        warmup=t.warmup,
        floor=t.floor,
        momentum=t.momentum,
        weight_decay=t.weight_decay,
        clip=t.clip,
    )


def run(context: Context) -> list[Path]:
    """Train; write `student.safetensors` (and in it the groups that map outliers, if any)."""
    config, mesh, directory = context.config, context.mesh, context.directory("train")
    distributed.check_batch("train.batch_size", config.train.batch_size, mesh)
    data, validation = context.train_images(), context.images("validation")
    net = student(config, len(data.class_names))
    arrays = make_arrays(context, data)
    method = make_method(context, net, data.images.shape[1:], arrays)
    plan = make_plan(config, len(data.images))
    key = named(context.key, "student")
    groups = list(jax.eval_shape(method.init, key)[0])
    optimizer = make_optimizer(config, groups, plan.steps)
    forward = classifier(net, mesh)

    def evaluate(state):
        variables = student_variables(state.params, state.model_state)
        logits, _ = apply_in_batches(
            forward(variables), validation.images, config.evaluation.batch_size, mesh
        )
        accuracy = float(np.mean(logits.argmax(-1) == validation.labels))
        _check_collapse(accuracy, logits.shape[-1], int(state.step), plan)
        return {"val_accuracy": accuracy}

    state = session.train(
        make_train_step(method, optimizer, key),
        _started(context, init_state(method, optimizer, key)),
        arrays,
        make_batches(context, arrays, teacher.model(config.teacher, len(data.class_names))),
        plan,
        workdir=context.workdir,
        directory=directory / "checkpoints",
        name="train",
        evaluate=evaluate,
        key=key,
        mesh=mesh,
    )
    path = directory / _FILE
    tree = {"params": state.params, "state": state.model_state}
    flat = {".".join(k): distributed.to_host(v) for k, v in flatten_dict(tree).items()}
    artifacts.write_tensors(path, flat)
    return [path]


def _started(context: Context, fresh: TrainState) -> TrainState:
    """The fresh state, its student replaced by that of the run `train.start`, if there is one."""
    if not context.config.train.start:
        return fresh
    path = Path(context.config.train.start) / "train" / _FILE
    params, model_state = _read(path)
    old, new = jax.tree.map(np.shape, (fresh.params["student"], params["student"]))
    if old != new:
        raise UserError(f"{path} has a student of another size than this config's; see student.*")
    return fresh.replace(
        params=fresh.params | {"student": params["student"]},
        model_state=fresh.model_state | {"student": model_state["student"]},
    )


def _check_collapse(accuracy: float, classes: int, step: int, plan: loop.Plan) -> None:
    # Past a third of the training a sound run is far above twice the rate of guessing; the
    # first hundred steps say nothing.
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
    return _read(context.directory("train") / _FILE)


def _read(path: Path) -> tuple[dict, dict]:
    tensors = artifacts.read_tensors(path)
    tree = unflatten_dict({tuple(k.split(".")): v for k, v in tensors.items()})
    return tree["params"], tree["state"]
