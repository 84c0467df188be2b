"""Stage `latents`: outliers as latents, sampled with an outlier in place of the class's token.

By the config also from ID latents, steered by a guide, and chosen among more than are kept.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from oal_jax.config import Config, guided, selected
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.generator import conditioning, guidance, samplers, stable_diffusion
from oal_jax.methods import registry
from oal_jax.models.latent_features import apply_in_loop
from oal_jax.outliers import selection
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import named
from oal_jax.stages import adapter, generator, latent_inputs
from oal_jax.stages.context import Context

_FILE = "latents.safetensors"
_ID_FILE = "id_latents.safetensors"
_STREAMED = 256  # images of a stream that are read at once
_OF_ID = "latents of ID images"  # what a method's recipe calls them
_LOGGER = logging.getLogger("absl")


def run(context: Context) -> list[Path]:
    """Write the outlier latents, the latents of the ID training images, and some pictures.

    `latents.safetensors`: `latents` (N, C, h, w) float32, `labels` (N,) int32, `outlier_rows`
    (N,) int32 (which outlier of its class conditioned each), `indices` (N,) uint32 (folded into
    the key for the noise). `id_latents.safetensors`: `latents` of the training images, float16,
    where the method learns from them. `selection.json`, where some are left out: how many of each
    class met the bounds, and how many were filled up.
    `pictures.safetensors`: `outliers` and plain `samples` of each class, decoded, uint8
    (C, n, H, W, c); samples are neither injected nor steered. `prompts.json`.
    """
    config, stage = context.config, context.directory("latents")
    sd, params = generator.load(context, jnp.dtype(config.generator.dtype))
    data = context.train_images()
    classes = len(data.class_names)
    inputs = latent_inputs.draw(context, sd, params, classes, candidates_per_class(config))
    words = generator.class_words(context)
    sample = _sampler(context, sd, params, words)
    if config.latents.kind == "noised":
        sampled = latent_inputs.noised(context, inputs)
    else:
        begin = {"clean": inputs.clean, "steered": guided(config.latents)}
        sampled = sample(inputs.outliers, inputs.labels, inputs.indices, "outlier latents", **begin)
    written = []
    if selected(config.latents) and len(sampled):
        rows, report = _select(context, sampled, inputs.labels)
        sampled, inputs = sampled[rows], inputs.at(rows)
        written.append(stage / "selection.json")
        artifacts.write_json(written[-1], report)
    path = stage / _FILE
    columns = {"labels": inputs.labels, "outlier_rows": inputs.outlier_rows}
    artifacts.write_tensors(path, {"latents": sampled, **columns, "indices": inputs.indices})
    encoded = [_write_id_latents(context, sd, params)] if learns_from_id_latents(config) else []

    shown, shape = min(config.latents.pictures, per_class(config)), data.image_shape
    first = inputs.at(slice(classes * shown))
    if config.latents.kind == "noised":
        plain = first.clean
    else:
        numbers = 2**31 + np.arange(len(first.labels))
        plain = sample(None, first.labels, numbers, "class samples", clean=first.clean)
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
    return [path, *encoded, *written, drawn, text]


def _select(context: Context, latents: np.ndarray, labels: np.ndarray):
    """(rows that are kept, classes in turn; what `selection.json` says), by `latents.select`."""
    config = context.config.latents
    a_t = adapter.load(context)
    features, logits = adapter.outputs(context, a_t, latents)
    share = config.select.max_energy_percentile
    bound = float(np.percentile(a_t.validation_energy, share)) if share < 100 else np.inf
    chosen = selection.choose(
        features,
        logits,
        labels,
        per_class(context.config),
        max_msp=config.select.max_msp,
        max_energy=bound,
        diverse=config.select.diverse,
    )
    filled = int(chosen.filled.sum())
    if filled:
        _LOGGER.warning(
            "%d of %d latents are of those that latents.select refuses: too few were sampled;"
            " raise latents.select.oversample=%g, or its bounds",
            filled,
            chosen.rows.size,
            config.select.oversample,
        )
    report = {
        "sampled": len(latents),
        "kept": chosen.rows.size,
        "max_logsumexp": bound if share < 100 else None,
        "accepted_per_class": chosen.accepted.tolist(),
        "filled_per_class": chosen.filled.tolist(),
    }
    return chosen.rows.T.reshape(-1), report


def per_class(config: Config) -> int:
    """Latents a class that the stage leaves: those for pictures where nothing else reads any."""
    given = config.latents
    if registry.reads_sampled(config):
        return given.per_class
    return min(given.per_class, given.pictures)


def candidates_per_class(config: Config) -> int:
    """Latents a class that are sampled, of which `latents.select` may leave some out."""
    return math.ceil(per_class(config) * config.latents.select.oversample)


def learns_from_id_latents(config: Config) -> bool:
    """Whether the method reads `of_training_images`."""
    return _OF_ID in registry.METHODS[config.method.name].arrays(config).values()


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
    """`(params, ids, mask, empty, vectors, labels, indices, *more) -> latents`, jitted: one chunk.

    ids, mask: (C, L) of the class prompts; empty: (1, L) of the empty one. A row a latent: vectors
    (n, D) float32, labels (n,) int32, indices (n,) uint32. Two more, which may be None: `clean`
    (n, C, h, w) to begin at, and the `guidance.Steering`.
    """
    config, mesh = context.config.latents, context.mesh

    def sampler(guide=None):
        return samplers.make_sampler(
            lambda p, x, t, states: stable_diffusion.apply_unet(sd, p, x, t, states),
            sd.schedule,
            config.sampler,
            config.steps,
            config.guidance,
            guide,
            config.partial if config.kind in latent_inputs.STARTED else 1.0,
        )

    key = named(context.key, "noise")

    @jax.jit
    def sample(params, ids, mask, empty, vectors, labels, indices, clean=None, steering=None):
        vectors, labels, indices = distributed.shard_batch((vectors, labels, indices), mesh)
        noise = samplers.initial_noise(key, indices, sd.latent_shape)
        cond = conditioning.encode_with_injection(sd, params, ids[labels], mask[labels], vectors)
        uncond = stable_diffusion.encode_prompts(sd, params, empty)
        draw = sampler() if steering is None else sampler(_guide(context, sd))
        clean = None if clean is None else distributed.shard_batch(clean, mesh)
        return draw(params, noise, cond, uncond, steering, clean)

    return sample


def _guide(context: Context, sd) -> samplers.Guide:
    net, guide = adapter.module(context), context.config.latents.guide
    return guidance.make_guide(
        lambda params, latents: apply_in_loop(net, params, latents),
        sd.schedule,
        guide.by,
        guide.start,
        guide.end,
        guide.neighbour,
    )


def chunk_size(context: Context, latent_shape: tuple[int, int, int], classes: int) -> int:
    """Latents of a shape sampled at once, a multiple of the devices; see `latents.chunk`."""
    devices, (_, height, width) = context.mesh.shape["data"], latent_shape
    wanted = -(-classes * candidates_per_class(context.config) // devices)
    count = context.config.latents.chunk * 8 * 8 // (height * width)
    return max(1, min(wanted, count // devices)) * devices


def _sampler(context: Context, sd, params, class_names):
    """`(outliers or None, labels, indices, name) -> latents`, in chunks; compiled once.

    By keyword `clean`, what the latents begin at, and `steered`: whether the guide acts, for which
    the same program serves.
    """
    config = context.config.latents
    ids, mask, empty = conditioning.class_tokens(
        sd, class_names, generator.PROMPT, config.injection
    )
    sample = sampling(context, sd)
    chunk = chunk_size(context, sd.latent_shape, len(class_names))
    ids, mask, empty = distributed.replicate((ids, mask, empty), context.mesh)
    placed = distributed.place_parameters(params, context.mesh)
    steering = None
    if guided(config):
        steering = adapter.load(context).steering(config.guide.strength)
        steering = distributed.replicate(steering, context.mesh)

    def run_chunks(outliers, labels, indices, name, clean=None, steered=False):
        where = mask if outliers is not None else jnp.zeros_like(mask)
        if outliers is None:
            outliers = np.zeros((len(labels), sd.text_width), np.float32)
        rows = [outliers, labels, indices] + ([] if clean is None else [clean])
        steer = steering
        if steering is not None and not steered:
            steer = steering._replace(strength=jnp.zeros_like(steering.strength))
        latents = np.empty((len(labels), *sd.latent_shape), np.float32)
        none = not len(labels)
        with tqdm(total=len(labels), desc=name, unit="latent", disable=none) as bar:
            for start in range(0, len(labels), chunk):
                columns = [v[start : start + chunk] for v in rows]
                count = len(columns[1])
                padded = [
                    np.pad(v, [(0, chunk - count)] + [(0, 0)] * (v.ndim - 1)) for v in columns
                ]
                padded[2] = padded[2].astype(np.uint32)
                begin = padded.pop() if clean is not None else None
                out = sample(placed, ids, where, empty, *padded, begin, steer)
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
    return _decoded(context, _latents(context))


def decoded_random(context: Context) -> np.ndarray:
    """N(0, 1) latents decoded, `latents.per_class` a class: what the decoder makes of noise."""
    found = artifacts.read_tensors(context.directory("latents") / _FILE)
    classes = context.info.num_classes
    shape = (context.config.latents.per_class * classes, *found["latents"].shape[1:])
    return _decoded(context, _random(context, shape))


def decoded_half(context: Context) -> np.ndarray:
    """The first half of the outlier latents and as many N(0, 1) ones, decoded."""
    sampled = _latents(context)
    half = len(sampled) // 2
    random = _random(context, (len(sampled) - half, *sampled.shape[1:]))
    return _decoded(context, np.concatenate([sampled[:half], random]))


def _random(context: Context, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.random.normal(named(context.key, "random latents"), shape))


def _decoded(context: Context, latents: np.ndarray) -> np.ndarray:
    sd, params = generator.load(context, components=("vae",))
    shape = context.info.image_shape
    return generator.decode(context, sd, params, latents, shape)


def pictures(context: Context) -> dict[str, np.ndarray]:
    """Decoded `samples` and `outliers`, (C, n, H, W, c) uint8."""
    return artifacts.read_tensors(context.directory("latents") / "pictures.safetensors")
