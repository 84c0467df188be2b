"""Outlier pools: where a method's outliers come from, and how a step draws from them.

A method lists the pools it trains on. The stages that must run, the arrays on the devices, the
draws in a step and the abstract shapes of the compiled program all follow from that list.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from oal_jax.config import DECODED, PROCEDURAL, Config
from oal_jax.config.benchmarks import resolve
from oal_jax.data import procedural
from oal_jax.data.augment import augment
from oal_jax.data.info import DatasetInfo
from oal_jax.errors import UserError
from oal_jax.outliers.knn import sample_random
from oal_jax.outliers.rows import draw_rows
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import at_step, named
from oal_jax.runtime.ops import to_unit

# Files of the stages `outliers` and `latents`.
OUTLIERS, LATENTS = "outliers.safetensors", "latents.safetensors"
ID_LATENTS, DECODED_LATENTS = "id_latents.safetensors", "decoded.safetensors"
# Feature outliers of more numbers than this (1 GiB in float32) are held in float16.
_HALF_PRECISION_FROM = 2**28
_CHUNK = 256  # images compared at once


class Draw(NamedTuple):
    """Inputs of a pool's draw in one step.

    Attributes:
      key: the root key of the training's draws.
      step: number of the step.
      indices: the ID images of the batch.
      count: number of outliers.
      mesh: the devices.
      parts: devices times microbatches, which share the batch evenly.
    """

    key: Key[Array, ""]
    step: Int[Array, ""]
    indices: Int[Array, " b"]
    count: int
    mesh: Mesh
    parts: int

    def at(self, name: str) -> Key[Array, ""]:
        """A key for this step and a purpose."""
        return at_step(self.key, name, self.step)

    def rows(self, name: str, size: int, count: int = 0) -> Int[Array, " n"]:
        """Rows of an array of `size`, without replacement where it has enough."""
        rows = draw_rows(self.at(name), size, count or self.count)
        # Every device draws all rows. Otherwise the compiler splits the draw over the devices, and
        # they exchange their rows.
        return jax.lax.with_sharding_constraint(rows, distributed.replicated(self.mesh))


class Sizes(NamedTuple):
    """Inputs of a pool's `shape`; `latent_shape` (h, w, c) is None without a generator."""

    config: Config
    info: DatasetInfo
    image_limit: int
    latent_shape: tuple[int, int, int] | None


class OutlierPool(NamedTuple):
    """One kind of outliers of a method.

    Attributes:
      name: key of the draws in the batch, and of the pool's arrays.
      draw: `draw(arrays, draw) -> outliers`; pure, runs inside jit. `arrays` has the arrays of all
        pools by name.
      reads: (stage, file) of every file that `load` reads.
      load: `load(context) -> array on the host`; None where nothing is stored.
      shape: `shape(sizes)` gives the shape and type of the array of `load`.
    """

    name: str
    draw: Callable[[Mapping[str, Any], Draw], Array]
    reads: tuple[tuple[str, str], ...] = ()
    load: Callable[[Any], Any] | None = None
    shape: Callable[[Sizes], Any] | None = None


def knn_features() -> OutlierPool:
    """Feature outliers around the boundary of each class: rows (q, T) of `outlier`."""

    def load(context) -> np.ndarray:
        outliers = artifacts.read_tensors(context.directory("outliers") / OUTLIERS)["outliers"]
        rows = outliers.reshape(-1, outliers.shape[-1])
        return rows.astype(_precision(rows.size))

    def shape(sizes: Sizes) -> jax.ShapeDtypeStruct:
        knn = sizes.config.outliers.knn
        count = len(sizes.info.class_names) * knn.repeats * knn.anchors * knn.per_anchor
        width = sizes.config.teacher.width
        return jax.ShapeDtypeStruct((count, width), _precision(count * width))

    return OutlierPool("outlier", _rows_of("outlier"), (("outliers", OUTLIERS),), load, shape)


def _precision(numbers: int) -> Any:
    return jnp.float16 if numbers > _HALF_PRECISION_FROM else jnp.float32


def random_features(width: int) -> OutlierPool:
    """Isotropic unit directions in the teacher's feature space: the control."""
    return OutlierPool(
        "outlier", lambda arrays, d: sample_random(d.at("random outlier"), d.count, width)
    )


def sampled_latents() -> OutlierPool:
    """Latents sampled from feature outliers: rows (q, h, w, c) of `outlier_latent`."""

    def shape(sizes: Sizes) -> jax.ShapeDtypeStruct:
        count = len(sizes.info.class_names) * sizes.config.latents.per_class
        return jax.ShapeDtypeStruct((count, *sizes.latent_shape), jnp.float32)

    reads = (("latents", LATENTS),)
    return OutlierPool("outlier_latent", _rows_of("outlier_latent"), reads, _latents, shape)


def _latents(context) -> np.ndarray:
    return artifacts.read_tensors(context.directory("latents") / LATENTS)["latents"]


def random_latents() -> OutlierPool:
    """N(0, 1) latents of the shape of `id_latents`: the control."""

    def draw(arrays, d: Draw) -> Array:
        shape = (d.count, *arrays["latent"].shape[1:])
        return jax.random.normal(d.at("random outlier_latent"), shape)

    return OutlierPool("outlier_latent", draw)


def reduced_latents() -> OutlierPool:
    """Sampled latents as vectors (q, w), means over channels and height, for the CLUB term."""

    def load(context) -> np.ndarray:
        return _latents(context).mean(axis=3).mean(axis=1)

    def shape(sizes: Sizes) -> jax.ShapeDtypeStruct:
        count = len(sizes.info.class_names) * sizes.config.latents.per_class
        return jax.ShapeDtypeStruct((count, sizes.latent_shape[1]), jnp.float32)

    reads = (("latents", LATENTS),)
    return OutlierPool("outlier_latent", _rows_of("outlier_latent"), reads, load, shape)


def id_latents() -> OutlierPool:
    """Latents of the batch's own ID images, as `latent` (b, h, w, c)."""

    def load(context) -> np.ndarray:
        return artifacts.read_tensors(context.directory("latents") / ID_LATENTS)["latents"]

    def shape(sizes: Sizes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.info.num_train, *sizes.latent_shape), jnp.float16)

    def draw(arrays, d: Draw) -> Array:
        return arrays["latent"][d.indices].astype(jnp.float32)

    return OutlierPool("latent", draw, (("latents", ID_LATENTS),), load, shape)


def decoded_latents(config: Config, share: float = 0.0) -> OutlierPool:
    """Sampled latents decoded to images, as `outlier_image`; augmented where `share` is given."""

    def load(context) -> np.ndarray:
        return artifacts.read_tensors(context.directory("latents") / DECODED_LATENTS)["images"]

    def shape(sizes: Sizes) -> jax.ShapeDtypeStruct:
        count = len(sizes.info.class_names) * sizes.config.latents.per_class
        return jax.ShapeDtypeStruct((count, *sizes.info.image_shape), jnp.uint8)

    def draw(arrays, d: Draw) -> Array:
        if share:
            return _augmented(config, arrays["outlier_image"], "outlier_image", d, share)
        return to_unit(_rows_of("outlier_image")(arrays, d))

    return OutlierPool("outlier_image", draw, (("latents", DECODED_LATENTS),), load, shape)


def images(config: Config, share: float = 0.0) -> OutlierPool:
    """Images of `outliers.images`, as `outlier_image`.

    They are augmented as ID images are. Otherwise augmentation alone would separate the two.

    Args:
      share: outlier images per step as a fraction of the ID batch; 0: `method.outlier_batch`.

    Raises:
      UserError: they are a set that the detector is evaluated on, or the ID set.
    """
    if config.outliers.images == DECODED:
        return decoded_latents(config, share)
    _check_not_evaluated(config)

    def draw(arrays, d: Draw) -> Array:
        return _augmented(config, arrays["outlier_image"], "outlier_image", d, share)

    return OutlierPool("outlier_image", draw, (), outlier_images, _images_shape)


def _check_not_evaluated(config: Config) -> None:
    name, data = config.outliers.images, config.data
    benchmark = resolve(
        *(data.id_set, data.near, data.far, data.validation, data.csid, data.leave_out),
        source=data.source,
    )
    for group, names in benchmark._asdict().items():
        if name == names or (group != "id_set" and name in names):
            raise UserError(
                f"config outliers.images='{name}' is the {group} set of the benchmark; train on"
                " other images, such as 'procedural'"
            )


def wild_mixture(config: Config) -> OutlierPool:
    """Unlabelled ID images, a share of them replaced by outlier images, as `wild_image`."""
    outliers = images(config)

    def load(context) -> dict[str, np.ndarray]:
        unlabelled = context.train_images().images[1::2]
        return {"unlabelled": unlabelled, "outliers": outliers.load(context)}

    def shape(sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
        half = (sizes.info.num_train // 2, *sizes.info.image_shape)
        unlabelled = jax.ShapeDtypeStruct(half, jnp.uint8)
        return {"unlabelled": unlabelled, "outliers": outliers.shape(sizes)}

    def draw(arrays, d: Draw) -> Array:
        stored = arrays["wild_image"]
        outlier = outliers.draw({"outlier_image": stored["outliers"]}, d)
        unlabelled = _augmented(config, stored["unlabelled"], "wild_image", d)
        share = config.method.woods.outlier_share
        is_outlier = jax.random.bernoulli(d.at("wild"), share, (d.count, 1, 1, 1))
        return jnp.where(is_outlier, outlier, unlabelled)

    return OutlierPool("wild_image", draw, outliers.reads, load, shape)


def _rows_of(name: str) -> Callable[[Mapping[str, Any], Draw], Array]:
    def draw(arrays, d: Draw) -> Array:
        array = arrays[name]
        rows = array[d.rows(name, array.shape[0])]
        return rows.astype(jnp.float32) if rows.dtype == jnp.float16 else rows

    return draw


def _augmented(config: Config, array: Any, name: str, d: Draw, share: float = 0.0) -> Array:
    count = d.count
    if share:  # rounded so that devices and microbatches share them evenly
        count = max(1, round(share * d.indices.shape[0] / d.parts)) * d.parts
    rows = d.rows(name, array.shape[0], count)
    views = jnp.broadcast_to(d.step, rows.shape)
    data = config.data
    return augment(named(d.key, name), array[rows], rows, views, shift=data.shift, flip=data.flip)


def _images_shape(sizes: Sizes) -> jax.ShapeDtypeStruct:
    count = min(sizes.info.num_train, sizes.image_limit or sizes.info.num_train)
    if sizes.config.outliers.images == PROCEDURAL:
        count = procedural.size_of(sizes.info.image_shape, sizes.image_limit)
    return jax.ShapeDtypeStruct((count, *sizes.info.image_shape), jnp.uint8)


def outlier_images(context) -> np.ndarray:
    """Images of the set `outliers.images`, or procedural ones, (N, H, W, c) uint8.

    Raises:
      UserError: there is no such set, its images have another shape than the ID images, or some of
        them are ID images.
    """
    name, shape = context.config.outliers.images, context.info.image_shape
    if name == PROCEDURAL:
        return procedural.draw(procedural.size_of(shape, context.image_limit), shape)
    try:
        outliers = context.images("train", name)
    except UserError as error:
        raise UserError(f"config outliers.images='{name}': {error}") from None
    id_set = context.info.name
    if outliers.image_shape != shape:
        raise UserError(
            f"config outliers.images='{name}': its images have shape {outliers.image_shape},"
            f" those of {id_set} {shape}; give images of the same shape"
        )
    outlier_bytes, shared = {image.tobytes() for image in outliers.images}, set()
    for chunk in context.train_images().chunks(_CHUNK):
        shared |= outlier_bytes.intersection(image.tobytes() for image in chunk.images)
    count = sum(image.tobytes() in shared for image in outliers.images)
    if count > len(outliers.images) / 100:
        raise UserError(
            f"config outliers.images='{name}': {count} of its {len(outliers.images)} images are ID"
            f" training images of {id_set}; give another set"
        )
    return outliers.images
