"""The arrays of the student's batches, and the pure function that draws a batch inside jit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from oal_jax.config import Config
from oal_jax.data.augment import augment
from oal_jax.data.info import DatasetInfo
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.errors import UserError
from oal_jax.methods import registry
from oal_jax.outliers.pools import ID_LATENTS, Draw, Sizes
from oal_jax.runtime import artifacts
from oal_jax.runtime.keys import named
from oal_jax.stages import features, teacher
from oal_jax.stages.context import Context
from oal_jax.training import arrays as stored_arrays
from oal_jax.training import loop


def labelled_images(context: Context) -> ImageSet | Streamed:
    """The ID images whose labels the student sees: all, or every n-th one (`label_every`)."""
    data, every = context.train_images(), registry.recipe_of(context.config).label_every
    if every == 1:
        return data
    return data._replace(images=data.images[::every], labels=data.labels[::every])


def make_arrays(context: Context, data: ImageSet | Streamed) -> dict[str, Any]:
    """The arrays of all batches on the host; the loop moves them to the devices."""
    config, recipe = context.config, registry.recipe_of(context.config)
    arrays = stored_arrays.arrays(data)
    if recipe.teacher and config.teacher.views:
        views = artifacts.read_tensors(context.directory("features") / "views.safetensors")
        arrays |= {f"teacher_{name}": value for name, value in views.items()}
    elif recipe.teacher:
        arrays["teacher"] = teacher.variables(context)
    for pool in recipe.pools(config):
        if pool.load:
            arrays[pool.name] = jax.tree.map(stored_arrays.in_lines, pool.load(context))
    return arrays | {"key": np.asarray(key_data(context))}


def abstract_arrays(
    context: Context, info: DatasetInfo, latent_shape: tuple[int, int, int] | None
) -> dict[str, Any]:
    """Shapes and types of `make_arrays`, from the data set's facts alone.

    Args:
      info: of the ID set; its `num_train` counts the images whose labels the student sees.
      latent_shape: (h, w, c) of the generator's latents; None where no pool reads them.
    """
    config, recipe = context.config, registry.recipe_of(context.config)
    labelled = -(-info.num_train // recipe.label_every)
    arrays: dict[str, Any] = {}
    if not config.data.stream:
        arrays["images"] = jax.ShapeDtypeStruct((labelled, *info.image_shape), jnp.uint8)
        arrays["labels"] = jax.ShapeDtypeStruct((labelled,), jnp.int32)
    if recipe.teacher and config.teacher.views:
        views, classes = (config.teacher.views, labelled), len(info.class_names)
        width = config.teacher.width
        arrays["teacher_logits"] = jax.ShapeDtypeStruct((*views, classes), jnp.float16)
        arrays["teacher_features"] = jax.ShapeDtypeStruct((*views, width), jnp.float16)
    elif recipe.teacher:
        arrays["teacher"] = teacher.abstract_variables(config, info)
    sizes = Sizes(config, info, context.image_limit, latent_shape)
    for pool in recipe.pools(config):
        if pool.shape:
            arrays[pool.name] = pool.shape(sizes)
    for name in arrays.keys() - {"teacher", "labels", "teacher_logits", "teacher_features"}:
        in_lines = lambda leaf: jax.eval_shape(stored_arrays.in_lines, leaf)
        arrays[name] = jax.tree.map(in_lines, arrays[name])
    return arrays | {"key": jax.eval_shape(lambda: key_data(context))}


def key_data(context: Context) -> UInt32[Array, " 2"]:
    """The key of all draws. An argument of the step: else every seed were another program."""
    return jax.random.key_data(named(context.key, "train"))


def make_batches(context: Context, net: Any) -> loop.MakeBatch:
    """`make_batch(arrays, indices, epoch, step)` for the loop: pure, runs inside jit.

    Images are augmented by view (see `augment`), with the teacher's cached outputs of that very
    view. `teacher.views=0` draws a new view an epoch and runs the teacher `net` in the step. Every
    pool draws fresh outliers in every step.
    """
    config, image_key = context.config, features.view_key(context)
    views_cached, data = config.teacher.views, config.data
    outlier_pools = registry.recipe_of(config).pools(config)
    parts = context.mesh.shape["data"] * config.train.accumulate

    def make_batch(arrays, indices, epoch, step):
        if views_cached:
            views = (epoch + indices) % views_cached
        else:
            views = jnp.broadcast_to(epoch, indices.shape)
        stored, labels = stored_arrays.drawn(arrays, indices)
        images = augment(image_key, stored, indices, views, shift=data.shift, flip=data.flip)
        batch = {"image": images, "label": labels}
        if "teacher" in arrays:
            outputs = net.apply(arrays["teacher"], images)
            batch["teacher_logits"], batch["teacher_features"] = outputs
        elif "teacher_logits" in arrays:
            batch["teacher_logits"] = arrays["teacher_logits"][views, indices]
            batch["teacher_features"] = arrays["teacher_features"][views, indices]
        draw = Draw(
            key=jax.random.wrap_key_data(arrays["key"]),
            step=step,
            indices=indices,
            count=config.method.outlier_batch or indices.shape[0],
            mesh=context.mesh,
            parts=parts,
        )
        return batch | {pool.name: pool.draw(arrays, draw) for pool in outlier_pools}

    return make_batch


def some_outliers(context: Context, count: int) -> dict[str, np.ndarray]:
    """`count` outliers of each pool of the finished stages, for the report's pictures."""
    config = context.config
    outlier_pools = registry.recipe_of(config).pools(config)
    arrays = {pool.name: pool.load(context) for pool in outlier_pools if pool.load}
    draw = Draw(
        key=named(context.key, "report"),
        step=jnp.zeros((), jnp.int32),
        indices=jnp.zeros(count, jnp.int32),
        count=count,
        mesh=context.mesh,
        parts=1,
    )
    return {pool.name: np.asarray(pool.draw(arrays, draw)) for pool in outlier_pools}


def check_streamed(config: Config) -> None:
    """Raise `UserError` for what a stream can't do: no array of the whole ID set is in memory."""
    if not config.data.stream:
        return
    recipe = registry.recipe_of(config)
    if recipe.teacher and config.teacher.views:
        raise UserError(
            f"config teacher.views={config.teacher.views} keeps the teacher's outputs of every"
            " training image; with data.stream=True it must be 0"
        )
    reads = registry.files_read(config)
    trained = config.generator.train and not config.generator.directory
    if reads and trained:
        raise UserError(
            "config generator.train=True holds the training images in memory; with data.stream=True"
            " give a generator.directory"
        )
    if ("latents", ID_LATENTS) in reads and config.data.on_corrupt == "skip":
        raise UserError(
            "config data.on_corrupt='skip' leaves images without latents, which"
            f" method.name='{config.method.name}' pairs with them by number; with data.stream=True"
            " set it to 'error'"
        )
