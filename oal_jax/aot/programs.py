"""The jitted programs of a config with abstract arguments: no data set, no weights, no devices.

Each program is the one that its stage calls, on arrays of the shapes that its stage makes.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oal_jax.config import GENERATED, Config
from oal_jax.data import class_names
from oal_jax.data.info import DatasetInfo, known_info
from oal_jax.generator import create, stable_diffusion, stable_diffusion_v1
from oal_jax.generator.stable_diffusion import StableDiffusion
from oal_jax.methods import registry
from oal_jax.runtime import distributed
from oal_jax.runtime.batched import rows_per_batch
from oal_jax.runtime.keys import named
from oal_jax.scores.forward import make_forward
from oal_jax.scores.outputs import jitted
from oal_jax.stages import batches, generator, latents, student, teacher, train
from oal_jax.stages.context import Context
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
    directory = config.generator.directory
    form = jnp.dtype(config.generator.dtype), config.generator.backend
    if directory == GENERATED or (config.generator.train and not directory):
        with TemporaryDirectory() as folder:
            words = class_names.words(known_info(config.data).class_names)
            create.create(Path(folder), words, width=config.teacher.width)
            return stable_diffusion.build(Path(folder), *form)
    path = Path(directory).expanduser() if directory else Path(str(generator.SHIPPED))
    if path.exists():
        return stable_diffusion.build(path, *form)
    return stable_diffusion_v1.build(*form)


def _train(context: Context) -> Program:
    """The call of `loop.fit` between two logged steps of stage `train`."""
    config, mesh, info = context.config, context.mesh, known_info(context.config.data)
    size, accumulate = config.train.batch_size, config.train.accumulate
    train.check_batches(config, mesh)
    recipe = registry.recipe_of(config)
    generated = any(pool.reads for pool in recipe.pools(config))
    latent_shape = generator_of(config).latent_shape if generated else None
    arrays = batches.abstract_arrays(context, info, latent_shape)
    examples = -(-info.num_train // recipe.label_every)
    net = student.network(config, info.num_classes)
    # Numbers of the stage before, which change no shape.
    estimated = {"unmasked": 1.0, "constraint": 1.0}
    method = train.assemble(config, net, info.image_shape, arrays, estimated, examples)
    plan = train.make_plan(config, examples)
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
        batches.make_batches(context, teacher.model(config, info.num_classes)),
        plan,
        mesh,
        steps_per_call,
        shardings=shardings,
        streamed=config.data.stream,
    )
    if config.data.stream:
        batch = {"image": _images(size, info), "label": _ints(size), "index": _ints(size)}
        source = _placed(batch, distributed.over_data(mesh))
    else:
        source = _replicated(_ints(plan.steps_per_epoch, size), mesh)
    arguments = _placed(state, shardings), _replicated(arrays, mesh), source
    return Program(step, arguments, size, steps_per_call)


def _images(count: int, info: DatasetInfo) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *info.image_shape), jnp.uint8)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _features(context: Context) -> Program:
    """The teacher's forward pass on one batch of stage `features`."""
    config, info = context.config, known_info(context.config.data)
    rows = rows_per_batch(config.evaluation.batch_size, context.mesh)
    net, fields = teacher.model(config, info.num_classes), ("features",)
    forward = make_forward(net, teacher.abstract_variables(config, info), fields)
    images = _placed(_images(rows, info), distributed.over_data(context.mesh))
    arguments = _replicated(forward, context.mesh), images
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
        _ints(classes, length),
        jax.ShapeDtypeStruct((classes, length), jnp.bool_),
        _ints(1, length),
        jax.ShapeDtypeStruct((rows, sd.text_width), jnp.float32),
        _ints(rows),
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
