"""The jitted programs of a config, with abstract arguments: no data set, no weights, no devices.

Each is what its stage itself calls, on the arrays that its stage makes.
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
from oal_jax.data.info import known_info
from oal_jax.generator import create, stable_diffusion, stable_diffusion_v1
from oal_jax.generator.stable_diffusion import StableDiffusion
from oal_jax.methods import registry
from oal_jax.runtime import distributed
from oal_jax.runtime.keys import named
from oal_jax.stages import batches, generator, latents, teacher, train
from oal_jax.stages.context import Context, forward_pass
from oal_jax.training import loop
from oal_jax.training.state import fresh_state, make_train_step, with_average


class Program(NamedTuple):
    """A jitted function, and the shapes, types and shardings of its arguments.

    Attributes:
      repeats: training steps a call; 1 for the others.
      batch: images or latents a repeat, over all devices.
    """

    function: Any
    arguments: tuple[Any, ...]
    repeats: int
    batch: int


def make(stage: str, config: Config, mesh: Mesh, platform: str) -> Program:
    """The program of a stage for the devices of a mesh, which may not be there.

    Args:
      stage: "train", "latents" or "features".
      config: as the stage gets it (`smoke` applied).
      mesh: of the devices to compile for.
      platform: of these devices: how many training steps a call depends on it.

    Raises:
      UserError: a batch that the devices can't share evenly, sizes that are not known.
    """
    context = Context(config, Path("unread"), mesh, jax.random.key(config.seed))
    if stage == "train":
        return _train(context, platform)
    return _latents(context) if stage == "latents" else _features(context)


def generator_of(config: Config) -> tuple[StableDiffusion, str]:
    """The Stable Diffusion of a config without its weights, and whose sizes it has.

    One of the hub, or of a directory that is not there, counts as Stable Diffusion v1.
    """
    directory, dtype = config.generator.directory, jnp.dtype(config.generator.dtype)
    if directory == GENERATED or (config.generator.train and not directory):
        with TemporaryDirectory() as folder:
            words = class_names.words(known_info(config.data).class_names)
            create.create(Path(folder), words, width=config.teacher.width)
            return stable_diffusion.build(Path(folder), dtype), "the small Stable Diffusion"
    path = Path(directory).expanduser() if directory else Path(str(generator.SHIPPED))
    if path.exists():
        return stable_diffusion.build(path, dtype), str(path)
    return stable_diffusion_v1.build(dtype), "Stable Diffusion v1, as published"


def _train(context: Context, platform: str) -> Program:
    """What `loop.fit` calls between two logged steps, for stage `train`."""
    config, mesh, known = context.config, context.mesh, known_info(context.config.data)
    size, accumulate = config.train.batch_size, config.train.accumulate
    train.check_batches(config, mesh)
    pools = registry.recipe_of(config).pools(config)
    latent_shape = generator_of(config)[0].latent_shape if any(p.reads for p in pools) else None
    arrays = batches.abstract_arrays(context, known, latent_shape)
    examples = -(-known.num_train // registry.recipe_of(config).label_every)
    net = train.student(config, known.num_classes)
    # Numbers of the stage before, which change no shape.
    estimated = {"unmasked": 1.0, "constraint": 1.0}
    method = train.assemble(config, net, known.image_shape, arrays, estimated, examples)
    plan = train.make_plan(config, examples)
    key = named(context.key, "student")
    groups = list(jax.eval_shape(method.init, key)[0])
    optimizer = train.make_optimizer(config, groups, plan.steps)
    state = jax.eval_shape(partial(fresh_state, method, optimizer), key)
    if config.train.ema:
        state = jax.eval_shape(with_average, state)
    shardings = distributed.shardings(state, mesh)
    in_scan = platform != "cpu" and not config.data.stream
    repeats = min(plan.log_every, plan.steps_per_epoch) if in_scan else 1
    step = loop.compile_step(
        make_train_step(
            method, optimizer, key, accumulate, unroll=platform == "cpu", ema=config.train.ema
        ),
        batches.make_batches(context, teacher.model(config, known.num_classes)),
        plan,
        mesh,
        repeats,
        shardings=shardings,
        streamed=config.data.stream,
    )
    if config.data.stream:
        source = _placed(
            {
                "image": jax.ShapeDtypeStruct((size, *known.image_shape), jnp.uint8),
                "label": _ints(size),
                "index": _ints(size),
            },
            distributed.over_data(mesh),
        )
    else:
        source = _replicated(_ints(plan.steps_per_epoch, size), mesh)
    return Program(
        step, (_placed(state, shardings), _replicated(arrays, mesh), source), repeats, size
    )


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _features(context: Context) -> Program:
    """One batch of the teacher's forward pass, of stage `features`."""
    config, known, devices = (
        context.config,
        known_info(context.config.data),
        context.mesh.shape["data"],
    )
    rows = max(1, config.evaluation.batch_size // devices) * devices
    images = jax.ShapeDtypeStruct((rows, *known.image_shape), jnp.uint8)
    forward = forward_pass(teacher.model(config, known.num_classes), context.mesh)
    arguments = _replicated((teacher.abstract_variables(config, known), images), context.mesh)
    return Program(forward, arguments, 1, rows)


def _latents(context: Context) -> Program:
    """One chunk of outlier latents, of stage `latents`: text encoder and all sampling steps."""
    classes = known_info(context.config.data).num_classes
    sd, _ = generator_of(context.config)
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
    return Program(sample, _replicated(arguments, context.mesh), 1, rows)


def _replicated(tree: Any, mesh: Mesh) -> Any:
    return _placed(tree, distributed.replicated(mesh))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )
