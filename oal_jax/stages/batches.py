"""What the student's batches are drawn from, and how one is drawn: pure, inside jit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from oal_jax.config import PROCEDURAL
from oal_jax.data import procedural
from oal_jax.data.augment import augment
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.errors import UserError
from oal_jax.methods import registry
from oal_jax.methods.registry import SOURCES
from oal_jax.outliers.knn import sample_random
from oal_jax.outliers.pools import draw_rows
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import at_step, named
from oal_jax.runtime.ops import to_unit, unit
from oal_jax.stages import features, latents, outliers, teacher
from oal_jax.stages.context import Context
from oal_jax.training import arrays as streams
from oal_jax.training import loop


def labelled_images(context: Context) -> ImageSet | Streamed:
    """The ID images whose labels the student sees: all, or, for `woods`, every second one."""
    data = context.train_images()
    if context.config.method.name != "woods":
        return data
    return data._replace(images=data.images[::2], labels=data.labels[::2])


def unlabelled_images(context: Context) -> np.ndarray:
    """The ID images of the wild mixture."""
    return context.train_images().images[1::2]


def outlier_images(context: Context) -> np.ndarray:
    """The images of the set `outliers.images`, or drawn ones of the ID images' shape.

    Raises:
      UserError: there is no such set, or its images have another shape than the ID images, or are
        some of them.
    """
    name = context.config.outliers.images
    data = context.train_images()
    if name == PROCEDURAL:
        shape = data.image_shape
        return procedural.draw(procedural.size_of(shape, context.image_limit), shape)
    try:
        found = context.images("train", name)
    except UserError as error:
        raise UserError(f"config outliers.images='{name}': {error}") from None
    if found.image_shape != data.image_shape:
        raise UserError(
            f"config outliers.images='{name}': its images have shape {found.image_shape},"
            f" those of {data.name} {data.image_shape}; give images of the same shape"
        )
    wanted, known = {image.tobytes() for image in found.images}, set()
    for chunk in data.chunks(_CHUNK):
        known |= wanted.intersection(image.tobytes() for image in chunk.images)
    shared = sum(image.tobytes() in known for image in found.images)
    if shared > len(found.images) / 100:
        raise UserError(
            f"config outliers.images='{name}': {shared} of its {len(found.images)} images are ID"
            f" training images of {data.name}; give another set"
        )
    return found.images


# What the arrays of a method's recipe may hold beside images and labels.
READERS: dict[str, Callable[[Context], np.ndarray | outliers.LazyOutliers]] = {
    "outlier images": outlier_images,
    "unlabelled images": unlabelled_images,
    "knn": outliers.flat,
    "latents": latents.channels_last,
    "reduced latents": latents.reduced,
    "decoded latents": latents.decoded,
    "decoded random latents": latents.decoded_random,
    "half decoded latents": latents.decoded_half,
    "latents of ID images": latents.of_training_images,
}
_CHUNK = 256  # images compared at once
_AUGMENTED = ("outlier images", "unlabelled images")


def make_arrays(context: Context, data: ImageSet | Streamed) -> dict[str, Any]:
    """All that the batches are drawn from, on the host; the loop puts it on the devices."""
    config = context.config
    arrays = streams.arrays(data)
    recipe = registry.METHODS[config.method.name]
    if recipe.teacher and config.teacher.views:
        views = artifacts.read_tensors(context.directory("features") / "views.safetensors")
        arrays |= {f"teacher_{name}": value for name, value in views.items()}
    elif recipe.teacher:
        arrays["teacher"] = teacher.variables(context)
    for name, content in recipe.arrays(config).items():
        arrays[name] = streams.in_lines(READERS[content](context))
    return arrays | {"key": np.asarray(key_data(context))}


def key_data(context: Context) -> UInt32[Array, " 2"]:
    """The key of all draws, an argument of the step: within it every seed were another program."""
    return jax.random.key_data(named(context.key, "train"))


def make_batches(context: Context, arrays: dict[str, Any], net: Any) -> loop.MakeBatch:
    """`make_batch(arrays, indices, epoch, step)` for the loop: pure, runs inside jit.

    Images are augmented by view (see `augment`), with the teacher's cached outputs of that very
    view; `teacher.views=0` draws a new view an epoch and runs the teacher `net` in the step.
    Outliers are drawn anew every step, without replacement where the pool is large enough.
    Outlier images of a set are augmented as ID images are, or augmentation would tell them apart.
    """
    config, image_key = context.config, features.view_key(context)
    views_cached, data = config.teacher.views, config.data
    feature, latent = SOURCES[config.outliers.source]
    energy = config.method.name == "oal" and config.method.micl == "energy"
    width = config.teacher.width
    latent_shape = arrays["latents"].shape[1:] if "latents" in arrays else ()
    recipe = registry.METHODS[config.method.name]
    contents, per_image = recipe.arrays(config), recipe.outliers_per_image(config)

    def pool(key, step, arrays, name, count):
        # The same rows for `outlier` and `outlier_latent` would be a pairing; draw them apart.
        rows = draw_rows(at_step(key, name, step), arrays[name].shape[0], count)
        # Every device draws them all: else the compiler shares out the draw too, and has the
        # devices send each other what they drew.
        rows = jax.lax.with_sharding_constraint(rows, distributed.replicated(context.mesh))
        drawn = outliers.take(arrays[name], rows)
        if contents[name] in _AUGMENTED or (energy and name == "outlier_image"):
            views = jnp.broadcast_to(step, rows.shape)
            return augment(named(key, name), drawn, rows, views, shift=data.shift, flip=data.flip)
        # Features and latents stay as they are; decoded latents are images.
        return to_unit(drawn) if drawn.dtype == jnp.uint8 else drawn

    def outliers_of(kind, key, step, arrays, name, count, draw):
        half = count // 2
        if kind in ("random", "half random"):
            drawn = count if kind == "random" else count - half
            return draw(at_step(key, f"random {name}", step), drawn)
        if kind == "pool":
            return pool(key, step, arrays, name, count)
        mixed = (
            pool(key, step, arrays, name, half),
            draw(at_step(key, f"random {name}", step), count - half),
        )
        return jnp.concatenate([unit(m) if name == "outlier" else m for m in mixed])

    def shown(count):
        """Outlier images beside so many ID images; devices and microbatches share them evenly."""
        parts = context.mesh.shape["data"] * config.train.accumulate
        return max(1, round(config.outliers.image_share * count / parts)) * parts

    def make_batch(arrays, indices, epoch, step):
        key = jax.random.wrap_key_data(arrays["key"])
        count = config.method.outlier_batch or indices.shape[0]
        if views_cached:
            views = (epoch + indices) % views_cached
        else:
            views = jnp.broadcast_to(epoch, indices.shape)
        stored, labels = streams.drawn(arrays, indices)
        images = augment(image_key, stored, indices, views, shift=data.shift, flip=data.flip)
        batch = {"image": images, "label": labels}
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
                feature,
                key,
                step,
                arrays,
                "outlier",
                count,
                lambda k, n: sample_random(k, n, width),
            )
        if energy and latent:
            batch["outlier_latent"] = outliers_of(
                latent,
                key,
                step,
                arrays,
                "outlier_latent",
                count,
                lambda k, n: jax.random.normal(k, (n, *latent_shape)),
            )
        if energy and "outlier_image" in contents:
            count_shown = shown(indices.shape[0])
            batch["outlier_image"] = pool(key, step, arrays, "outlier_image", count_shown)
        if not energy:
            for name in contents:
                batch[name] = pool(key, step, arrays, name, count * per_image)
        if "wild_image" in batch:
            is_outlier = jax.random.bernoulli(
                at_step(key, "wild", step), config.method.wild.share, (count, 1, 1, 1)
            )
            wild = batch.pop("outlier_image")
            batch["wild_image"] = jnp.where(is_outlier, wild, batch["wild_image"])
        return batch

    return make_batch
