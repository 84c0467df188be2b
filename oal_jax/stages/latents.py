"""Stage `latents`: outliers as latents, sampled with an outlier in place of the class's token."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from oal_jax import artifacts, distributed
from oal_jax.config import Config
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.generator import conditioning, samplers, stable_diffusion
from oal_jax.keys import named
from oal_jax.methods import build
from oal_jax.stages import generator, outliers
from oal_jax.stages.context import Context

_FILE = "latents.safetensors"
_ID_FILE = "id_latents.safetensors"
_STREAMED = 256  # images of a stream that are read at once
_OF_ID = "latents of ID images"  # what a method's recipe calls them


def run(context: Context) -> list[Path]:
    """Write the outlier latents, the latents of the ID training images, and some pictures.

    `latents.safetensors`: `latents` (N, C, h, w) float32, `labels` (N,) int32, `outlier_rows`
    (N,) int32 (which outlier of its class conditioned each), `indices` (N,) uint32 (folded into
    the key for the noise). `id_latents.safetensors`: `latents` of the training images, float16,
    where the method learns from them.
    `pictures.safetensors`: `outliers` and plain `samples` of each class, decoded, uint8
    (C, n, H, W, c). `prompts.json`.
    """
    config, stage = context.config, context.directory("latents")
    sd, params = generator.load(context, jnp.dtype(config.generator.dtype))
    data = context.train_images()
    classes, per_class = len(data.class_names), config.latents.per_class
    labels = np.tile(np.arange(classes, dtype=np.int32), per_class)  # evenly, classes in turn
    key = named(context.key, "latents")
    pool = outliers.per_class(config)
    rows = np.asarray(jax.random.randint(named(key, "rows"), labels.shape, 0, pool), np.int32)
    indices = np.arange(len(labels), dtype=np.uint32)
    outlier = outliers.of_classes(context, labels, rows)
    words = generator.class_words(context)
    sample = _sampler(context, sd, params, words)
    sampled = sample(outlier, labels, indices, "outlier latents")
    path = stage / _FILE
    artifacts.write_tensors(
        path, {"latents": sampled, "labels": labels, "outlier_rows": rows, "indices": indices}
    )
    encoded = [_write_id_latents(context, sd, params)] if learns_from_id_latents(config) else []

    shown, shape = min(config.latents.pictures, per_class), data.image_shape
    plain_labels = np.tile(np.arange(classes, dtype=np.int32), shown)
    plain = sample(None, plain_labels, 2**31 + np.arange(len(plain_labels)), "class samples")
    pictures = {
        "outliers": generator.decode(context, sd, params, sampled[: classes * shown], shape),
        "samples": generator.decode(context, sd, params, plain, shape),
    }
    drawn = stage / "pictures.safetensors"
    artifacts.write_tensors(
        drawn,
        {k: v.reshape(shown, classes, *shape).swapaxes(0, 1) for k, v in pictures.items()},
    )
    text = stage / "prompts.json"
    prompts = conditioning.class_prompts(words, generator.PROMPT)
    artifacts.write_json(text, {"prompts": prompts, "key": "root seed, folded with 'latents'"})
    return [path, *encoded, drawn, text]


def learns_from_id_latents(config: Config) -> bool:
    """Whether the method reads `of_training_images`."""
    return _OF_ID in build.METHODS[config.method.name].arrays(config).values()


def _id_latents(context: Context, sd, params) -> np.ndarray:
    data = context.train_images()
    images = data.images if isinstance(data, ImageSet) else _streamed(data)
    return generator.encode(context, sd, params, images, jnp.float16)


def _streamed(data: Streamed) -> Iterator[np.ndarray]:
    return (chunk.images for chunk in data.chunks(_STREAMED))


def _write_id_latents(context: Context, sd, params) -> Path:
    path = context.directory("latents") / _ID_FILE
    artifacts.write_tensors(path, {"latents": _id_latents(context, sd, params)})
    return path


def sampling(context: Context, sd):
    """`(params, ids, mask, empty, vectors, labels, indices) -> latents`, jitted: one chunk.

    ids, mask: (C, L) of the class prompts; empty: (1, L) of the empty one. A row a latent: vectors
    (n, D) float32, labels (n,) int32, indices (n,) uint32.
    """
    config, mesh = context.config.latents, context.mesh
    draw = samplers.make_sampler(
        lambda p, x, t, states: stable_diffusion.apply_unet(sd, p, x, t, states),
        sd.schedule,
        config.sampler,
        config.steps,
        config.guidance,
    )
    key = named(context.key, "noise")

    @jax.jit
    def sample(params, ids, mask, empty, vectors, labels, indices):
        vectors, labels, indices = distributed.shard_batch((vectors, labels, indices), mesh)
        noise = samplers.initial_noise(key, indices, sd.latent_shape)
        cond = conditioning.encode_with_injection(sd, params, ids[labels], mask[labels], vectors)
        uncond = stable_diffusion.encode_prompts(sd, params, empty)
        return draw(params, noise, cond, uncond)

    return sample


def chunk_size(context: Context, latent_shape: tuple[int, int, int] = (4, 8, 8)) -> int:
    """Latents of a shape sampled at once, a multiple of the devices; see `latents.chunk`."""
    devices, (_, height, width) = context.mesh.shape["data"], latent_shape
    count = context.config.latents.chunk * 8 * 8 // (height * width)
    return max(1, count // devices) * devices


def _sampler(context: Context, sd, params, class_names):
    """`(outliers or None, labels, indices, name) -> latents`, in chunks; compiled once."""
    ids, mask, empty = conditioning.class_tokens(
        sd, class_names, generator.PROMPT, context.config.latents.injection
    )
    sample, chunk = sampling(context, sd), chunk_size(context, sd.latent_shape)
    ids, mask, empty = distributed.replicate((ids, mask, empty), context.mesh)
    placed = distributed.place_parameters(params, context.mesh)

    def run_chunks(outliers, labels, indices, name):
        where = mask if outliers is not None else jnp.zeros_like(mask)
        if outliers is None:
            outliers = np.zeros((len(labels), sd.text_width), np.float32)
        latents = np.empty((len(labels), *sd.latent_shape), np.float32)
        with tqdm(total=len(labels), desc=name, unit="latent") as bar:
            for start in range(0, len(labels), chunk):
                columns = [v[start : start + chunk] for v in (outliers, labels, indices)]
                count = len(columns[1])
                padded = [
                    np.pad(v, [(0, chunk - count)] + [(0, 0)] * (v.ndim - 1)) for v in columns
                ]
                padded[2] = padded[2].astype(np.uint32)
                out = sample(placed, ids, where, empty, *padded)
                latents[start : start + count] = distributed.to_host(out)[:count]
                bar.update(count)
        return latents

    return run_chunks


def _latents(context: Context) -> np.ndarray:
    return artifacts.read_tensors(context.directory("latents") / _FILE)["latents"]


def channels_last(context: Context) -> np.ndarray:
    """Outlier latents as (N, h, w, C): what convolutions of this project take."""
    return np.moveaxis(_latents(context), 1, -1)


def of_training_images(context: Context) -> np.ndarray:
    """Latents (N, h, w, C) float16 of the ID training images, in their order.

    Encoded now where the stage ran for a method that does not learn from them (`--reuse`).
    """
    path = context.directory("latents") / _ID_FILE
    if path.exists():
        latents = artifacts.read_tensors(path)["latents"]
    else:
        latents = _id_latents(context, *generator.load(context, components=("vae",)))
    return np.moveaxis(latents, 1, -1)


def reduced(context: Context) -> np.ndarray:
    """Outlier latents as vectors for the CLUB term.

    `channel_height_mean`: mean over channels, then over the height, as the reference: (N, w).
    `flatten`: all of the mean over channels, (N, h * w).
    """
    mean = _latents(context).mean(axis=1)
    if context.config.latents.reduction == "channel_height_mean":
        return mean.mean(axis=1)
    return mean.reshape(len(mean), -1)


def decoded(context: Context) -> np.ndarray:
    """All outlier latents decoded to uint8 images (N, H, W, c): for methods that train on them."""
    sd, params = generator.load(context, components=("vae",))
    shape = context.images("validation", limit=1).images.shape[1:]
    return generator.decode(context, sd, params, _latents(context), shape)


def pictures(context: Context) -> dict[str, np.ndarray]:
    """Decoded `samples` and `outliers`, (C, n, H, W, c) uint8."""
    return artifacts.read_tensors(context.directory("latents") / "pictures.safetensors")
