"""Stage `generator`: the Stable Diffusion of the latents: shipped, of the user, or trained here."""

from collections.abc import Iterable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from oal_jax.config import GENERATED, hub_names
from oal_jax.data import class_names
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.errors import UserError
from oal_jax.generator import conditioning, create, diffusers_modules, stable_diffusion
from oal_jax.generator.training import latent_scale, make_diffusion_trainer, make_vae_trainer
from oal_jax.pretrained import diffusers_directory, hub
from oal_jax.runtime import artifacts, batched, distributed, processes
from oal_jax.runtime.keys import named
from oal_jax.runtime.ops import to_unit
from oal_jax.stages.context import Context
from oal_jax.training import loop, session

SHIPPED = files("oal_jax") / "pretrained" / "weights" / "fashion_sd"
_TRAINED = "stable_diffusion"
_RANDOM = "random_stable_diffusion"
# Pixels per call of the autoencoder, whose activations are the largest arrays of a run: 250 images
# of the shipped generator, or one of 512 x 512.
_PIXELS = 250 * 32 * 32


def directory(context: Context) -> Path:
    """The diffusers directory of this run; a model of the hub is fetched if it is not cached."""
    config = context.config.generator
    if config.directory == GENERATED:
        return context.directory("generator") / _RANDOM
    if config.directory:
        return hub.locate(config.directory)
    if config.train:
        return context.directory("generator") / _TRAINED
    return Path(str(SHIPPED))


def load(
    context: Context, dtype=jnp.float32, components: Sequence[str] = diffusers_directory.COMPONENTS
):
    """(static part, parameters) of the generator; see `stable_diffusion.load`."""
    backend = context.config.generator.backend
    return stable_diffusion.load(directory(context), dtype, components, backend)


def class_words(context: Context) -> tuple[str, ...]:
    """The words of the classes in prompts: `generator.class_words`, or the data set's names.

    Raises:
      UserError: the number of words is not that of the classes.
    """
    names = context.info.class_names
    words = tuple(
        part.strip() for word in context.config.generator.class_words for part in word.split(",")
    )
    if words and len(words) != len(names):
        raise UserError(
            f"config generator.class_words has {len(words)} words, {context.benchmark.id_set} has"
            f" {len(names)} classes; give one word per class, in the order of the labels"
        )
    return words or class_names.words(names)


def token_norms(context: Context) -> np.ndarray:
    """Norm of the token embedding of each class word's first piece, (K,)."""
    sd, params = load(context, components=("text_encoder",))
    words = class_words(context)
    return np.linalg.norm(conditioning.token_embeddings(sd, params, words), axis=-1)


def run(context: Context) -> list[Path]:
    """Writes `source.json` (the generator's name, the sha256 of its files), and a new generator."""
    config = context.config.generator
    is_random = config.directory == GENERATED
    is_trained = config.train and not config.directory
    if is_trained:
        _train(context)
    elif is_random:
        processes.on_main(lambda: _write_random(context))
    where = Path(processes.on_main(lambda: str(directory(context))))
    sd = stable_diffusion.check(where, config.backend)
    conditioning.class_tokens(sd, class_words(context), "all_pieces")
    files = diffusers_directory.files(where)
    hashes = {str(p.relative_to(where)): artifacts.sha256(p) for p in files}
    name = "shipped" if where == Path(str(SHIPPED)) else _TRAINED if is_trained else str(where)
    name = config.directory if hub_names.parse(config.directory) or is_random else name
    # Outliers and latents also depend on the class words.
    words = {"class_words": config.class_words} if config.class_words else {}
    path = context.directory("generator") / "source.json"
    artifacts.write_json(path, {"directory": name, "files": hashes, **words})
    return [path, *files] if is_trained or is_random else [path]


def check(context: Context) -> None:
    """Raise `UserError` if a given generator does not fit the ID set. Reads headers alone.

    A model of the hub is not fetched for it.
    """
    config, info = context.config.generator, context.info
    if config.backend == "diffusers":
        diffusers_modules.check()
    words = class_words(context)
    trained = config.train and not config.directory
    if trained or config.directory == GENERATED or hub_names.parse(config.directory):
        return
    where = directory(context)
    sd = stable_diffusion.check(where, config.backend)
    conditioning.class_tokens(sd, words, "all_pieces")
    channels, own = sd.vae.in_channels, info.image_shape[-1]
    if own not in (1, channels):
        raise UserError(
            f"the generator {where} takes images of {channels} channels, {info.name} has {own};"
            " give generator.directory, set generator.train=True, or choose"
            " outliers.source=knn, which needs no generator"
        )


def encode(
    context: Context, sd, params, data: ImageSet | Streamed, dtype=jnp.float32
) -> Float[np.ndarray, "n h w C"]:
    """Scaled latents of the images of a set."""

    @jax.jit
    def forward(params, images):
        return stable_diffusion.encode_images(sd, params, to_unit(images)).astype(dtype)

    size = batched.rows_per_batch(_images_per_call(sd), context.mesh)
    images = (chunk.images for chunk in data.chunks(size))
    return _apply(context, sd, forward, params, images)


def decode(
    context: Context, sd, params, latents: Float[np.ndarray, "n h w C"], shape: Sequence[int]
) -> UInt8[np.ndarray, "n H W c"]:
    """Images of scaled latents; `shape` is (H, W, c) of the data."""

    @jax.jit
    def forward(params, latents):
        images = stable_diffusion.decode_latents(sd, params, latents, size=shape[:2])
        if images.shape[-1] != shape[-1]:
            images = jnp.mean(images, axis=-1, keepdims=True)
        return jnp.round(images * 255).astype(jnp.uint8)

    return _apply(context, sd, forward, params, [latents])


def _apply(context: Context, sd, forward, params, chunks: Iterable[np.ndarray]) -> np.ndarray:
    """`forward(params, rows)` of the autoencoder over all rows."""
    vae = distributed.place_parameters({"vae": params["vae"]}, context.mesh)
    return batched.apply(partial(forward, vae), chunks, _images_per_call(sd), context.mesh)


def _images_per_call(sd) -> int:
    return max(1, _PIXELS // sd.image_size**2)


def _train(context: Context) -> None:
    """Trains the autoencoder, then the text encoder and UNet; writes a diffusers directory."""
    config, stage = context.config.generator, context.directory("generator")
    target = stage / _TRAINED
    data = context.all_train_images()
    processes.on_main(lambda: _write_fresh(context, target))
    sd = stable_diffusion.build(target, backend=config.backend)
    key = named(context.key, "generator")

    vae_plan = loop.Plan(len(data.images), config.vae_batch_size, config.vae_epochs, log_every=50)
    init, step = make_vae_trainer(sd, key, steps=vae_plan.steps)
    examples = {"image": data.images, "label": data.labels}
    vae_state = _fit(context, "vae", init, step, examples, vae_plan)
    params = {"vae": jax.tree.map(distributed.to_host, vae_state.params["vae"])}

    latents = encode(context, sd._replace(scaling_factor=1.0), params, data)
    scale = latent_scale(latents)
    plan = loop.Plan(len(data.images), config.batch_size, config.diffusion_epochs, log_every=50)
    words = class_words(context)
    init, step = make_diffusion_trainer(
        sd,
        key,
        stable_diffusion.tokenize(sd, conditioning.class_prompts(words)),
        stable_diffusion.tokenize(sd, [""])[0],
        steps=plan.steps,
    )
    examples = {"latent": latents * scale, "label": data.labels}
    state = _fit(context, "diffusion", init, step, examples, plan)
    params |= jax.tree.map(distributed.to_host, state.ema_params)
    processes.on_main(lambda: diffusers_directory.save(target, params, scaling_factor=scale))


def _write_fresh(context: Context, target: Path) -> None:
    """Writes configs and tokenizer of a small Stable Diffusion for the ID images."""
    channels = context.info.image_shape[-1]
    create.create(
        target,
        class_words(context),
        width=context.config.teacher.width,
        overrides={"vae": {"in_channels": channels, "out_channels": channels}},
    )


def _write_random(context: Context) -> None:
    """Writes a small Stable Diffusion with random weights, for smoke runs."""
    target = directory(context)
    _write_fresh(context, target)
    init = partial(stable_diffusion.init_params, stable_diffusion.build(target))
    rng = np.random.default_rng(context.config.seed)

    def draw(path, leaf) -> np.ndarray:
        if leaf.ndim == 1:
            return np.full(leaf.shape, path[-1].key == "scale", np.float32)
        fan_in = np.prod(leaf.shape[:-1])
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, context.key))
    diffusers_directory.save(target, params, scaling_factor=1.0)


def _fit(context: Context, name: str, init, train_step, examples, plan):
    field = "generator.vae_batch_size" if name == "vae" else "generator.batch_size"
    distributed.check_batch(field, plan.batch_size, context.mesh)
    key = named(context.key, name)

    def make_batch(arrays, indices, epoch, step):
        del epoch, step
        batch = {column: array[indices] for column, array in arrays.items()}
        return {k: to_unit(v) if v.dtype == jnp.uint8 else v for k, v in batch.items()}

    return session.train(
        train_step,
        distributed.init_parameters(init, key, context.mesh),
        examples,
        make_batch,
        plan,
        workdir=context.workdir,
        directory=context.directory("generator") / f"checkpoints_{name}",
        name=name,
        key=key,
        mesh=context.mesh,
    )
