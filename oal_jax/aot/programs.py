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

from oal_jax.config import DECODED, GENERATED, PROCEDURAL, Config
from oal_jax.config.class_names import CLASS_NAMES, generated_names
from oal_jax.data import class_names, generated, procedural
from oal_jax.errors import UserError
from oal_jax.generator import create, stable_diffusion, stable_diffusion_v1
from oal_jax.generator.stable_diffusion import StableDiffusion
from oal_jax.methods import registry
from oal_jax.runtime import distributed
from oal_jax.runtime.keys import named
from oal_jax.stages import batches, generator, latents, outliers, teacher, train
from oal_jax.stages.context import Context, forward_pass
from oal_jax.training import arrays as streams
from oal_jax.training import loop
from oal_jax.training.state import fresh_state, make_train_step, with_average


class Images(NamedTuple):
    """What a program knows of the ID training images."""

    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    count: int

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.class_names)


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


# Training images of the ID sets whose sizes are known without their files.
_COUNTS = {
    "fashion": 12_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "imagenet200": 258_951,
    "imagenet": 1_281_167,
}


def images_of(config: Config) -> Images:
    """The ID training images of a config, as its source would give them.

    Raises:
      UserError: a set whose sizes are not known here.
    """
    data = config.data
    if data.leave_out:
        raise UserError(
            "config data.leave_out: how many images are left is known from the files alone; compile"
            " the config without it"
        )
    if data.source == GENERATED:
        side, names = data.image_size or generated.SIZE, generated_names(data.id_set)
        return Images(names, (side, side, 3), data.train_images or 10 * len(names))
    if data.id_set not in _COUNTS:
        raise UserError(
            f"config data.id_set='{data.id_set}': the sizes of this set are in its files alone;"
            f" known without them: {', '.join(_COUNTS)}"
        )
    count = min(data.train_images or _COUNTS[data.id_set], _COUNTS[data.id_set])
    if data.id_set == "fashion":
        return Images(create.FASHION_CLASSES, (28, 28, 1), count)
    side = data.image_size or (32 if data.id_set.startswith("cifar") else 224)
    return Images(CLASS_NAMES[data.id_set], (side, side, 3), count)


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
            words = class_names.words(images_of(config).class_names)
            create.create(Path(folder), words, width=config.teacher.width)
            return stable_diffusion.build(Path(folder), dtype), "the small Stable Diffusion"
    path = Path(directory).expanduser() if directory else Path(str(generator.SHIPPED))
    if path.exists():
        return stable_diffusion.build(path, dtype), str(path)
    return stable_diffusion_v1.build(dtype), "Stable Diffusion v1, as published"


def _train(context: Context, platform: str) -> Program:
    """What `loop.fit` calls between two logged steps, for stage `train`."""
    config, mesh, known = context.config, context.mesh, images_of(context.config)
    if config.method.name == "woods":
        known = known._replace(count=known.count - known.count // 2)  # the others lose their labels
    size, accumulate = config.train.batch_size, config.train.accumulate
    train.check_batches(config, mesh)
    arrays = _arrays(context, known)
    net = train.student(config, known.classes)
    # Numbers of the stage before, which change no shape.
    estimated = {"unmasked": 1.0, "constraint": 1.0}
    method = train.assemble(config, net, known.shape, arrays, estimated, known.count)
    plan = train.make_plan(config, known.count)
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
        batches.make_batches(context, arrays, teacher.model(config, known.classes)),
        plan,
        mesh,
        repeats,
        shardings=shardings,
        streamed=config.data.stream,
    )
    if config.data.stream:
        source = _placed(_images(size, known) | {"index": _ints(size)}, distributed.over_data(mesh))
    else:
        source = _replicated(_ints(plan.steps_per_epoch, size), mesh)
    return Program(
        step, (_placed(state, shardings), _replicated(arrays, mesh), source), repeats, size
    )


def _images(count: int, known: Images) -> dict[str, Any]:
    return {
        "image": jax.ShapeDtypeStruct((count, *known.shape), jnp.uint8),
        "label": _ints(count),
    }


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _arrays(context: Context, known: Images) -> dict[str, Any]:
    """Shapes of what `batches.make_arrays` makes."""
    config, count = context.config, known.count
    arrays = {}
    if not config.data.stream:
        stored = _images(count, known)
        arrays = {"images": _in_lines(stored["image"]), "labels": stored["label"]}
    recipe, width = registry.METHODS[config.method.name], config.teacher.width
    if recipe.teacher and config.teacher.views:
        views = (config.teacher.views, count)
        arrays["teacher_logits"] = jax.ShapeDtypeStruct((*views, known.classes), jnp.float16)
        arrays["teacher_features"] = jax.ShapeDtypeStruct((*views, width), jnp.float16)
    elif recipe.teacher:
        arrays["teacher"] = _teacher(context, known)
    sampled, limit = known.classes * config.latents.per_class, context.image_limit

    def shape_of(content: str) -> Any:
        if content == "knn":
            return outliers.shapes(config, known.classes, width)
        if content == "outlier images":
            drawn = min(count, limit) if limit else count
            if config.outliers.images == PROCEDURAL:
                drawn = procedural.size_of(known.shape, limit)
            return jax.ShapeDtypeStruct((drawn, *known.shape), jnp.uint8)
        if content == "unlabelled images":
            return jax.ShapeDtypeStruct((images_of(config).count // 2, *known.shape), jnp.uint8)
        if content in DECODED.values():
            return jax.ShapeDtypeStruct((sampled, *known.shape), jnp.uint8)
        channels, height, wide = generator_of(config)[0].latent_shape
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


def _teacher(context: Context, known: Images) -> Any:
    net, image = teacher.model(context.config, known.classes), (1, *known.shape)
    return jax.eval_shape(lambda key: net.init(key, jnp.zeros(image)), context.key)


def _features(context: Context) -> Program:
    """One batch of the teacher's forward pass, of stage `features`."""
    config, known, devices = context.config, images_of(context.config), context.mesh.shape["data"]
    rows = max(1, config.evaluation.batch_size // devices) * devices
    images = jax.ShapeDtypeStruct((rows, *known.shape), jnp.uint8)
    forward = forward_pass(teacher.model(config, known.classes), context.mesh)
    arguments = _replicated((_teacher(context, known), images), context.mesh)
    return Program(forward, arguments, 1, rows)


def _latents(context: Context) -> Program:
    """One chunk of outlier latents, of stage `latents`: text encoder and all sampling steps."""
    classes = images_of(context.config).classes
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
