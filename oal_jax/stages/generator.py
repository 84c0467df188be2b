"""Stage `generator`: the Stable Diffusion of the latents; shipped, given or trained."""

from functools import partial
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from oal_jax import artifacts, distributed
from oal_jax.data.augment import to_unit
from oal_jax.generator import conditioning, create, stable_diffusion
from oal_jax.generator.training import latent_scale, make_diffusion_trainer, make_vae_trainer
from oal_jax.keys import named
from oal_jax.pretrained import diffusers_directory
from oal_jax.stages.context import Context, apply_in_batches
from oal_jax.training import loop, session

SHIPPED = files("oal_jax") / "pretrained" / "weights" / "fashion_sd"
PROMPT = "A high-quality image of the {}"
_TRAINED = "stable_diffusion"


def directory(context: Context) -> Path:
    """The diffusers directory that this run uses."""
    config = context.config.generator
    if config.directory:
        return Path(config.directory).expanduser()
    if config.train:
        return context.directory("generator") / _TRAINED
    return Path(str(SHIPPED))


def load(context: Context):
    """(static part, parameters) of the generator."""
    return stable_diffusion.load(directory(context))


def token_norms(context: Context) -> np.ndarray:
    """Norm of the token embedding of each class word, (C,)."""
    sd, params = load(context)
    names = context.images("validation", limit=1).class_names
    return np.linalg.norm(conditioning.token_embeddings(sd, params, names), axis=-1)


def run(context: Context) -> list[Path]:
    """Write `source.json`: which generator, and the sha256 of its files; and a trained one."""
    trained = context.config.generator.train and not context.config.generator.directory
    if trained:
        _train(context)
    where = directory(context)
    load(context)  # what is missing or damaged is said here
    found = sorted(p for p in where.rglob("*") if p.is_file())
    hashes = {str(p.relative_to(where)): artifacts.sha256(p) for p in found}
    kind = "shipped" if where == Path(str(SHIPPED)) else _TRAINED if trained else str(where)
    path = context.directory("generator") / "source.json"
    artifacts.write_json(path, {"directory": kind, "files": hashes})
    return [path, *found] if trained else [path]


def encode(context: Context, sd, params, images: np.ndarray) -> np.ndarray:
    """Scaled VAE latents (N, C, h, w) float32 of uint8 images."""

    @jax.jit
    def forward(params, images):
        images = distributed.shard_batch(to_unit(images), context.mesh)
        return (stable_diffusion.encode_images(sd, params, images),)

    placed = distributed.replicate({"vae": params["vae"]}, context.mesh)
    return apply_in_batches(partial(forward, placed), images, 250, context.mesh)[0]


def decode(context: Context, sd, params, latents: np.ndarray, shape) -> np.ndarray:
    """uint8 images (N, H, W, c) of scaled latents; `shape` is (H, W, c) of the data."""

    @jax.jit
    def forward(params, latents):
        latents = distributed.shard_batch(latents, context.mesh)
        images = stable_diffusion.decode_latents(sd, params, latents, crop=shape[:2])
        if images.shape[-1] != shape[-1]:
            images = jnp.mean(images, axis=-1, keepdims=True)
        return (jnp.round(images * 255).astype(jnp.uint8),)

    placed = distributed.replicate({"vae": params["vae"]}, context.mesh)
    return apply_in_batches(partial(forward, placed), latents, 250, context.mesh)[0]


def _train(context: Context) -> None:
    """The autoencoder, then the text encoder and UNet on its latents; a diffusers directory."""
    config, stage = context.config.generator, context.directory("generator")
    target = stage / _TRAINED
    data = context.all_train_images()
    create.create(target, data.class_names, width=context.config.teacher.width)
    sd = stable_diffusion.build(target)
    key = named(context.key, "generator")

    vae_plan = loop.Plan(len(data.images), config.vae_batch_size, config.vae_epochs, log_every=50)
    init, step = make_vae_trainer(sd, key, steps=vae_plan.steps)
    vae_state = _fit(context, "vae", init, step, data.images, "image", data.labels, vae_plan)
    params = {"vae": jax.device_get(vae_state.params["vae"])}

    latents = encode(context, sd._replace(scaling_factor=1.0), params, data.images)
    scale = latent_scale(latents)
    plan = loop.Plan(len(data.images), config.batch_size, config.diffusion_epochs, log_every=50)
    prompts = conditioning.class_prompts(data.class_names, PROMPT)
    init, step = make_diffusion_trainer(
        sd,
        key,
        stable_diffusion.tokenize(sd, prompts),
        stable_diffusion.tokenize(sd, [""])[0],
        steps=plan.steps,
    )
    state = _fit(context, "diffusion", init, step, latents * scale, "latent", data.labels, plan)
    params |= jax.device_get(state.ema_params)
    diffusers_directory.save(target, params, scaling_factor=scale)


def _fit(context: Context, name: str, init, train_step, inputs, input_name, labels, plan):
    field = "generator.vae_batch_size" if name == "vae" else "generator.batch_size"
    distributed.check_batch(field, plan.batch_size, context.mesh)
    key = named(context.key, name)

    def make_batch(arrays, indices, epoch, step):
        del epoch, step
        batch = arrays["inputs"][indices]
        if batch.dtype == jnp.uint8:
            batch = to_unit(batch)
        return {input_name: batch, "label": arrays["labels"][indices]}

    return session.train(
        train_step,
        jax.jit(init)(key),
        {"inputs": inputs, "labels": labels},
        make_batch,
        plan,
        workdir=context.workdir,
        directory=context.directory("generator") / f"checkpoints_{name}",
        name=name,
        key=key,
        mesh=context.mesh,
    )
