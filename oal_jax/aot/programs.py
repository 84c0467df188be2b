"""The jitted programs of a config with abstract arguments: no data set, no weights, no devices.

Each program is the one that its stage calls, on arrays of the shapes that its stage makes.
"""

import dataclasses
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oal_jax.config import DECODED, GENERATED, PROCEDURAL, Config
from oal_jax.data import class_names, procedural
from oal_jax.data.info import DatasetInfo, known_info
from oal_jax.generator import create, stable_diffusion, stable_diffusion_v1
from oal_jax.generator.stable_diffusion import StableDiffusion
from oal_jax.methods import registry
from oal_jax.runtime import distributed
from oal_jax.runtime.batched import rows_per_batch
from oal_jax.runtime.keys import named
from oal_jax.scores.forward import make_forward
from oal_jax.scores.outputs import jitted
from oal_jax.stages import batches, generator, latents, outliers, teacher, train
from oal_jax.stages.context import Context
from oal_jax.training import arrays as streams
from oal_jax.training import loop
from oal_jax.training.state import fresh_state, make_train_step, with_average


class Program(NamedTuple):
    """A jitted function, and the shapes, types and shardings of its arguments.

    Attributes:
      function: the jitted function.
      arguments: trees of `jax.ShapeDtypeStruct`.
      batch: images or latents per step, over all devices.
      steps_per_call: training steps that a call runs; 1 for the other stages.
    """

    function: Any
    arguments: tuple[Any, ...]
    batch: int
    steps_per_call: int = 1


def make(stage: str, config: Config, mesh: Mesh) -> Program:
    """The program of a stage for the devices of a mesh, which need not be attached.

    Args:
      stage: "train", "latents" or "features".
      config: as the stage gets it (`smoke` applied).
      mesh: of the devices to compile for.

    Raises:
      UserError: the devices cannot share a batch evenly, or the data set's sizes are unknown.
    """
    context = Context(config, Path("unread"), mesh, jax.random.key(config.seed))
    return {"train": _train, "latents": _latents, "features": _features}[stage](context)


def generator_of(config: Config) -> StableDiffusion:
    """The Stable Diffusion of a config without its weights.

    One from the hub, or of a directory that is absent, has the sizes of Stable Diffusion v1.
    """
    directory, dtype = config.generator.directory, jnp.dtype(config.generator.dtype)
    if directory == GENERATED or (config.generator.train and not directory):
        with TemporaryDirectory() as folder:
            words = class_names.words(known_info(config.data).class_names)
            create.create(Path(folder), words, width=config.teacher.width)
            return stable_diffusion.build(Path(folder), dtype)
    path = Path(directory).expanduser() if directory else Path(str(generator.SHIPPED))
    if path.exists():
        return stable_diffusion.build(path, dtype)
    return stable_diffusion_v1.build(dtype)


def _train(context: Context) -> Program:
    """The call of `loop.fit` between two logged steps of stage `train`."""
    config, mesh, info = context.config, context.mesh, known_info(context.config.data)
    if config.method.name == "woods":
        half = info.num_train // 2  # the other images lose their labels
        info = dataclasses.replace(info, num_train=info.num_train - half)
    size, accumulate = config.train.batch_size, config.train.accumulate
    train.check_batches(config, mesh)
    arrays = _arrays(context, info)
    net = train.student(config, info.num_classes)
    # Numbers of the stage before, which change no shape.
    estimated = {"unmasked": 1.0, "constraint": 1.0}
    method = train.assemble(config, net, info.image_shape, arrays, estimated, info.num_train)
    plan = train.make_plan(config, info.num_train)
    key = named(context.key, "student")
    groups = list(jax.eval_shape(method.init, key)[0])
    optimizer = train.make_optimizer(config, groups, plan.steps)
    state = jax.eval_shape(partial(fresh_state, method, optimizer), key)
    if config.train.ema:
        state = jax.eval_shape(with_average, state)
    shardings = distributed.shardings(state, mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    one = on_cpu or config.data.stream
    steps_per_call = 1 if one else min(plan.log_every, plan.steps_per_epoch)
    step = loop.compile_step(
        make_train_step(method, optimizer, key, accumulate, unroll=on_cpu, ema=config.train.ema),
        batches.make_batches(context, arrays, teacher.model(config, info.num_classes)),
        plan,
        mesh,
        steps_per_call,
        shardings=shardings,
        streamed=config.data.stream,
    )
    if config.data.stream:
        source = _placed(_images(size, info) | {"index": _ints(size)}, distributed.over_data(mesh))
    else:
        source = _replicated(_ints(plan.steps_per_epoch, size), mesh)
    arguments = _placed(state, shardings), _replicated(arrays, mesh), source
    return Program(step, arguments, size, steps_per_call)


def _images(count: int, info: DatasetInfo) -> dict[str, Any]:
    return {
        "image": jax.ShapeDtypeStruct((count, *info.image_shape), jnp.uint8),
        "label": _ints(count),
    }


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _arrays(context: Context, info: DatasetInfo) -> dict[str, Any]:
    """Shapes of what `batches.make_arrays` makes."""
    config, count = context.config, info.num_train
    arrays = {}
    if not config.data.stream:
        stored = _images(count, info)
        arrays = {"images": _in_lines(stored["image"]), "labels": stored["label"]}
    recipe, width = registry.METHODS[config.method.name], config.teacher.width
    if recipe.teacher and config.teacher.views:
        views = (config.teacher.views, count)
        arrays["teacher_logits"] = jax.ShapeDtypeStruct((*views, info.num_classes), jnp.float16)
        arrays["teacher_features"] = jax.ShapeDtypeStruct((*views, width), jnp.float16)
    elif recipe.teacher:
        arrays["teacher"] = _teacher(context, info)
    sampled, limit = info.num_classes * config.latents.per_class, context.image_limit

    def shape_of(content: str) -> Any:
        if content == "knn":
            return outliers.shapes(config, info.num_classes, width)
        if content == "outlier images":
            drawn = min(count, limit) if limit else count
            if config.outliers.images == PROCEDURAL:
                drawn = procedural.size_of(info.image_shape, limit)
            return jax.ShapeDtypeStruct((drawn, *info.image_shape), jnp.uint8)
        if content == "unlabelled images":
            half = known_info(config.data).num_train // 2
            return jax.ShapeDtypeStruct((half, *info.image_shape), jnp.uint8)
        if content in DECODED.values():
            return jax.ShapeDtypeStruct((sampled, *info.image_shape), jnp.uint8)
        channels, height, wide = generator_of(config).latent_shape
        if content == "latents":
            return jax.ShapeDtypeStruct((sampled, height, wide, channels), jnp.float32)
        if content == "latents of ID images":
            return jax.ShapeDtypeStruct((count, height, wide, channels), jnp.float16)
        assert content == "reduced latents", content
        rows = 1 if config.latents.reduction == "channel_height_mean" else height
        return jax.ShapeDtypeStruct((sampled, rows * wide), jnp.float32)

    drawn = {name: _in_lines(shape_of(what)) for name, what in recipe.arrays(config).items()}
    return arrays | drawn | {"key": jax.eval_shape(lambda: batches.key_data(context))}


def _in_lines(shapes: Any) -> Any:
    return jax.eval_shape(streams.in_lines, shapes)


def _teacher(context: Context, info: DatasetInfo) -> Any:
    net, image = teacher.model(context.config, info.num_classes), (1, *info.image_shape)
    return jax.eval_shape(lambda key: net.init(key, jnp.zeros(image)), context.key)


def _features(context: Context) -> Program:
    """The teacher's forward pass on one batch of stage `features`."""
    config, info = context.config, known_info(context.config.data)
    rows = rows_per_batch(config.evaluation.batch_size, context.mesh)
    images = jax.ShapeDtypeStruct((rows, *info.image_shape), jnp.uint8)
    net, fields = teacher.model(config, info.num_classes), ("features",)
    forward = make_forward(net, _teacher(context, info), fields)
    arguments = _replicated((forward, images), context.mesh)
    return Program(jitted(frozenset(fields)), arguments, rows)


def _latents(context: Context) -> Program:
    """Text encoder and all sampling steps for one chunk of outlier latents of stage `latents`."""
    classes = known_info(context.config.data).num_classes
    sd = generator_of(context.config)
    params = jax.eval_shape(partial(stable_diffusion.init_params, sd), context.key)
    cast = lambda a: jax.ShapeDtypeStruct(a.shape, sd.unet.dtype)
    params |= jax.tree.map(cast, {name: params[name] for name in ("text_encoder", "unet")})
    rows = latents.chunk_size(context, sd.latent_shape, classes)
    length = sd.text_encoder.config.max_position_embeddings
    arguments = (
        params,
        jax.ShapeDtypeStruct((classes, length), jnp.int32),
        jax.ShapeDtypeStruct((classes, length), jnp.bool_),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, sd.text_width), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.uint32),
    )
    sample = latents.sampling(context, sd)
    return Program(sample, _replicated(arguments, context.mesh), rows)


def _replicated(tree: Any, mesh: Mesh) -> Any:
    return _placed(tree, distributed.replicated(mesh))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )
