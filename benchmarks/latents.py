"""Sampling latents with Stable Diffusion, against PyTorch and diffusers.

    python -m benchmarks.run --suite latents --output results.json [--frameworks jax,torch]
        [--forms reference,tuned,shortcuts] [--runs 5] [--latents 200] [--steps 0] [--sd-v1]
        [--batch 2] [--device auto]

Cases:

    step                one denoising step with guidance, by the packaged generator
    default             outliers to latents by our default: DPM-Solver++, 20 steps, guidance 2
    reference           outliers to latents by the published recipe: PLMS, 50 steps, guidance 7.5
    reference-official  the same, three latents a call, all decoded to pixels, as the official code
    step-sd-v1          one denoising step at the sizes of Stable Diffusion v1 (860 M random
                        parameters, latents of 64 x 64, 77 tokens of 768) on --batch latents;
                        needs --sd-v1 and 15 GiB

A run samples --latents latents; all forms but the official one sample them in one batch. --steps
changes the steps of both samplers.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import oal_jax
from benchmarks import timing
from benchmarks.job import CASE, RECIPE, configs
from benchmarks.plots import draw as draw
from benchmarks.timing import Job
from oal_jax.config import Config

SHIPPED = Path(oal_jax.__file__).parent / "pretrained" / "weights" / "fashion_sd"
_TOKENS = 77
_TIME = 501  # of the single steps


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the jobs, print ratios, and return the rows."""
    parser = timing.make_parser("latents", __doc__)
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--steps", type=int, default=0, help="of the samplers; 0: 20 and 50")
    parser.add_argument("--sd-v1", action="store_true", help="also at the sizes of SD v1: 15 GiB")
    parser.add_argument("--batch", type=int, default=2, help="of --sd-v1")
    args = parser.parse_args(argv)
    timing.settle(args, ("torch", "timm", "diffusers"))
    sides = {"jax": (_our_jobs, _our_large_step), "torch": (_their_jobs, _their_large_step)}
    sides = {name: side for name, side in sides.items() if name in args.frameworks}
    rows = timing.measure("latents", [j for jobs, _ in sides.values() for j in jobs(args)], args)
    if args.sd_v1:
        jobs = []
        for framework, (_, make_step) in sides.items():
            fields = {} if framework == "jax" else {"form": "tuned"}
            step = make_step(args)
            jobs.append(Job("step-sd-v1", framework, step, fields=fields, items=args.batch))
        rows += timing.measure("latents", jobs, args)
    return rows


def _recipes(args: argparse.Namespace) -> dict[str, Config]:
    """Config by recipe, with the flags' number of latents and steps."""
    recipes = {n: c for n, c in configs(smoke=False).items() if n in RECIPE.values()}
    for config in recipes.values():
        config.latents.chunk = args.latents
        config.latents.steps = args.steps or config.latents.steps
    return recipes


def _inputs(batch: int, shape: Sequence[int], tokens: int, width: int) -> list[np.ndarray]:
    """Noise (B, *shape), and text states (B, L, d) with and without the prompt."""
    rng = np.random.default_rng(0)
    shapes = [(batch, *shape), *[(batch, tokens, width)] * 2]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _outliers(classes: int, width: int) -> np.ndarray:
    """50 outliers a class, (classes, 50, width), at the norm of a token embedding."""
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(classes, 50, width))
    return (0.4 * pool / np.linalg.norm(pool, axis=-1, keepdims=True)).astype(np.float32)


def _our_jobs(args: argparse.Namespace) -> list[Job]:
    import jax
    import jax.numpy as jnp

    from oal_jax.generator import conditioning, create, samplers, stable_diffusion

    sd, params = stable_diffusion.load(SHIPPED)
    params = jax.device_put(params)
    apply_unet = partial(stable_diffusion.apply_unet, sd)
    count, words = args.latents, create.FASHION_CLASSES
    labels = np.arange(count) % len(words)
    pool = jax.device_put(_outliers(len(words), sd.text_width))
    sizes = sd.text_encoder.config.max_position_embeddings, sd.text_width
    inputs = jax.device_put(_inputs(count, sd.latent_shape, *sizes))
    step = _jitted_step(apply_unet, params, inputs)
    jobs = [Job("step", "jax", step, items=count)]
    for name, config in _recipes(args).items():
        mode = "first_piece" if config.outliers.official_code else "all_pieces"
        ids, mask, empty = conditioning.class_tokens(sd, words, mode)
        c = config.latents
        denoise = samplers.make_sampler(apply_unet, sd.schedule, c.sampler, c.steps, c.guidance)

        @jax.jit
        def sample(params, key, ids=ids, mask=mask, empty=empty, denoise=denoise):
            rows = jax.random.randint(key, (count,), 0, pool.shape[1])
            noise = samplers.initial_noise(key, jnp.arange(count), sd.latent_shape)
            cond = conditioning.encode_with_injection(
                sd, params, ids[labels], mask[labels], pool[labels, rows]
            )
            return denoise(params, noise, cond, stable_diffusion.encode_prompts(sd, params, empty))

        key = jax.random.key(0)
        job = lambda sample=sample, key=key: jax.block_until_ready(sample(params, key))
        jobs.append(Job(name, "jax", job, items=count))
    return jobs


def _jitted_step(apply_unet: Callable, params: Any, inputs: Any) -> Callable[[], Any]:
    """One guided prediction as the sampler makes it: both halves in one call, side by side."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def step(params, x, cond, uncond):
        count = x.shape[0]
        pairs = jnp.stack([x, x], axis=1).reshape(2 * count, *x.shape[1:])
        states = jnp.stack([uncond, cond], axis=1).reshape(2 * count, *cond.shape[1:])
        out = apply_unet(params, pairs, jnp.full((2 * count,), _TIME), states)
        out = out.reshape(count, 2, *x.shape[1:])
        return out[:, 0] + 2 * (out[:, 1] - out[:, 0])

    return lambda: jax.block_until_ready(step(params, *inputs))


def _our_large_step(args: argparse.Namespace) -> Callable[[], Any]:
    import jax

    from oal_jax.generator import stable_diffusion, stable_diffusion_v1

    sd = stable_diffusion_v1.build()
    shapes = jax.eval_shape(partial(stable_diffusion.init, sd, "unet"), jax.random.key(0))
    rng = np.random.default_rng(0)  # compiling the network's own initialisation takes minutes
    params = jax.tree.map(
        lambda s: jax.device_put(0.02 * rng.standard_normal(s.shape, np.float32)), shapes
    )
    inputs = jax.device_put(_inputs(args.batch, (64, 64, 4), _TOKENS, sd.text_width))
    apply = partial(stable_diffusion.apply_unet, sd)
    return _jitted_step(apply, {"unet": params}, inputs)


def _their_jobs(args: argparse.Namespace) -> list[Job]:
    import torch

    from benchmarks.torch_twin import diffusion, forms
    from oal_jax.generator.create import FASHION_CLASSES

    device, jobs = torch.device(args.device), []
    recipes, width = _recipes(args), 128
    pool = torch.from_numpy(_outliers(len(FASHION_CLASSES), width)).to(device)
    labels = torch.arange(args.latents) % len(FASHION_CLASSES)
    for name in args.forms:
        form = forms.make(name, eager=args.twin_eager, dtype=args.twin_dtype)
        # A compiled form changes its network's memory layout, so each form loads its own.
        generator = diffusion.load(SHIPPED, device)
        unet = forms.compiled(form, generator.unet)
        fields = {"form": name}
        if name != "shortcuts":  # its step is that of "tuned"
            length = generator.text_encoder.config.max_position_embeddings
            inputs = _inputs(args.latents, generator.latent_shape, length, width)
            case = "step" if name == "tuned" else "step-official"
            step = partial(_their_step, form, unet, device, inputs)
            jobs.append(Job(case, "torch", step, ("step",), fields, args.latents))
        random, recipe = torch.Generator().manual_seed(0), recipes[RECIPE[name]]

        def sample(form=form, generator=generator, unet=unet, recipe=recipe, random=random):
            forms.prepare(form, device)
            diffusion.sample(generator, unet, form, recipe, FASHION_CLASSES, pool, labels, random)
            forms.synchronise(device)

        against = tuple(dict.fromkeys((RECIPE[name], "default")))
        jobs.append(Job(CASE[name], "torch", sample, against, fields, args.latents))
    return jobs


def _their_step(form, unet, device, inputs) -> None:
    import torch

    from benchmarks.torch_twin import diffusion, forms

    x, cond, uncond = (torch.from_numpy(array).to(device) for array in inputs)
    forms.prepare(form, device)
    with forms.inference(form, device):
        predict = diffusion.make_predict(unet, torch.cat([uncond, cond]), 2.0)
        predict(forms.images_as(form, x), torch.tensor(_TIME, device=device))
    forms.synchronise(device)


def _their_large_step(args: argparse.Namespace) -> Callable[[], Any]:
    import torch
    from diffusers import UNet2DConditionModel

    from benchmarks.torch_twin import forms
    from oal_jax.generator.stable_diffusion_v1 import UNET

    device = torch.device(args.device)
    form = forms.make("tuned", eager=args.twin_eager, dtype=args.twin_dtype)
    unet = UNet2DConditionModel(**UNET).to(device).eval().requires_grad_(False)
    inputs = _inputs(args.batch, (4, 64, 64), _TOKENS, UNET["cross_attention_dim"])
    return partial(_their_step, form, forms.compiled(form, unet), device, inputs)
