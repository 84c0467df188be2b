"""Stage `latents`: latents sampled with an outlier in place of the class word's embedding.

The stage writes only the files that the method's pools read: sampled latents, their decoded images,
latents of the ID training images.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, UInt32

from oal_jax.config import Config
from oal_jax.generator import conditioning, samplers, stable_diffusion
from oal_jax.methods import registry
from oal_jax.outliers.pools import DECODED_LATENTS, ID_LATENTS, LATENTS, OUTLIERS
from oal_jax.runtime import artifacts, batched, distributed
from oal_jax.runtime.keys import named
from oal_jax.runtime.progress import Bar
from oal_jax.stages import generator
from oal_jax.stages.context import Context

PICTURES = 8  # latents of each class that are decoded for the report


def files(config: Config) -> set[str]:
    """Files of this stage that the method's pools read."""
    return {name for stage, name in registry.files_read(config) if stage == "latents"}


def samples(config: Config) -> bool:
    """Whether the method reads sampled latents, or what they decode to."""
    return bool(files(config) & {LATENTS, DECODED_LATENTS})


def run(context: Context) -> list[Path]:
    """Writes the files that the method's pools read.

    - `latents.safetensors`: `latents` (N, h, w, C) float32; `labels` (N,) int32; `outlier_rows`
      (N,) int32, the outlier of the class that conditioned each; `indices` (N,) uint32, folded into
      the key of the noise. With it `pictures.safetensors`: `outliers` (K, n, H, W, c) uint8, the
      first latents of each class decoded; and `prompts.json`.
    - `decoded.safetensors`: `images` (N, H, W, c) uint8, all latents decoded.
    - `id_latents.safetensors`: `latents` of the ID training images, float16.
    """
    config, stage = context.config, context.directory("latents")
    dtype = jnp.dtype(config.generator.dtype)
    components = ("text_encoder", "unet", "vae") if samples(config) else ("vae",)
    sd, params = generator.load(context, dtype, components)
    written = _write_sampled(context, sd, params) if samples(config) else []
    if ID_LATENTS in files(config):
        path = stage / ID_LATENTS
        latents = generator.encode(context, sd, params, context.train_images(), jnp.float16)
        artifacts.write_tensors(path, {"latents": latents})
        written.append(path)
    return written


def _write_sampled(context: Context, sd, params) -> list[Path]:
    config, stage = context.config, context.directory("latents")
    shape, classes = context.info.image_shape, len(context.info.class_names)
    inputs = draw_inputs(context, config.latents.per_class)
    words = generator.class_words(context)
    latents = _sample(context, sd, params, words, inputs)
    path = stage / LATENTS
    columns = {"labels": inputs.labels, "outlier_rows": inputs.outlier_rows}
    artifacts.write_tensors(path, {"latents": latents, **columns, "indices": inputs.indices})
    written = [path]
    if DECODED_LATENTS in files(config):
        images = generator.decode(context, sd, params, latents, shape)
        written.append(stage / DECODED_LATENTS)
        artifacts.write_tensors(written[-1], {"images": images})
    shown = min(PICTURES, config.latents.per_class)
    images = generator.decode(context, sd, params, latents[: classes * shown], shape)
    written.append(stage / "pictures.safetensors")
    images = images.reshape(shown, classes, *shape).swapaxes(0, 1)
    artifacts.write_tensors(written[-1], {"outliers": images})
    prompts = conditioning.class_prompts(words)
    written.append(stage / "prompts.json")
    artifacts.write_json(
        written[-1], {"prompts": prompts, "key": "root seed, folded with 'latents'"}
    )
    return written


class Inputs(NamedTuple):
    """Inputs of the sampler: one row per latent, the classes in turn.

    Attributes:
      labels: classes.
      outlier_rows: rows of the conditioning outliers within their classes.
      indices: folded into the key of the noise.
      outliers: the conditioning outliers.
    """

    labels: Int32[np.ndarray, " n"]
    outlier_rows: Int32[np.ndarray, " n"]
    indices: UInt32[np.ndarray, " n"]
    outliers: Float[np.ndarray, "n d"]


def draw_inputs(context: Context, per_class: int) -> Inputs:
    """Inputs of `per_class` latents per class, conditioned by random outliers of the class."""
    tensors = artifacts.read_tensors(context.directory("outliers") / OUTLIERS)
    outliers = tensors["outliers"]
    classes, count, _ = outliers.shape
    labels = np.tile(np.arange(classes, dtype=np.int32), per_class)
    key = named(named(context.key, "latents"), "rows")
    rows = np.asarray(jax.random.randint(key, labels.shape, 0, count), np.int32)
    return Inputs(labels, rows, np.arange(len(labels), dtype=np.uint32), outliers[labels, rows])


def sampling(context: Context, sd):
    """The jitted sampler: `(params, ids, mask, empty, vectors, labels, indices) -> latents`.

    `ids` and `mask` (K, L) are of the class prompts, `empty` (1, L) of the empty prompt. There is
    one row per latent in `vectors` (n, D) float32, `labels` (n,) int32 and `indices` (n,) uint32.
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


def chunk_size(context: Context, latent_shape: tuple[int, int, int], classes: int) -> int:
    """Latents per call of the sampler, a multiple of the devices; see `latents.chunk`."""
    devices, (height, width, _) = context.mesh.shape["data"], latent_shape
    all_latents = -(-classes * context.config.latents.per_class // devices)
    count = context.config.latents.chunk * 8 * 8 // (height * width)
    return max(1, min(all_latents, count // devices)) * devices


def _sample(
    context: Context, sd, params: Any, class_words, inputs: Inputs
) -> Float[np.ndarray, "n h w C"]:
    """The latents of the inputs, sampled in chunks by one compiled program."""
    ids, mask, empty = conditioning.class_tokens(sd, class_words, injection(context.config))
    sample = sampling(context, sd)
    chunk = chunk_size(context, sd.latent_shape, len(class_words))
    ids, mask, empty = distributed.replicate((ids, mask, empty), context.mesh)
    placed = distributed.place_parameters(params, context.mesh)
    columns = inputs.outliers, inputs.labels, inputs.indices
    call = lambda batch: sample(placed, ids, mask, empty, *batch)
    parts = []
    with Bar(len(inputs.labels), "outlier latents", "latent") as bar:
        for latents in batched.results(call, [columns], chunk, context.mesh):
            parts.append(latents)
            bar.update(len(latents))
    return np.concatenate(parts)


def injection(config: Config) -> str:
    """The injection mode: all pieces of the class word, or as the official code."""
    return "first_piece" if config.outliers.official_code else "all_pieces"


def pictures(context: Context) -> dict[str, np.ndarray]:
    """Decoded `outliers`, (K, n, H, W, c) uint8; empty if the stage samples none."""
    if not samples(context.config):
        return {}
    return artifacts.read_tensors(context.directory("latents") / "pictures.safetensors")
