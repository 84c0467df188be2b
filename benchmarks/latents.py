"""Suite `latents`: denoising steps and sampled latents of Stable Diffusion.

    python -m benchmarks.run --suite latents --output results.json [--frameworks jax,torch]
        [--forms reference,tuned,shortcuts] [--runs 5] [--latents 200] [--steps 0] [--sd-v1]
        [--batch 2] [--device auto]

Cases:

    step        one step of denoising, both halves of guidance, the shipped generator's network
    step-sd-v1  the same at the sizes of Stable Diffusion v1 (860 M parameters, random; latents of
                64 x 64, 77 tokens of 768), --batch latents at once; with --sd-v1 alone
    default     outliers to latents by our default: DPM-Solver++, 20 steps; guidance 2
    reference   by the published recipe: PLMS, 50 steps, guidance 7.5
    reference-official  so, three latents a call, all decoded to pixels as the official code does

--latents are sampled a run (in the fast forms, that many at once); --steps is for both samplers.
Rows of the last three have `per_s`: latents a second.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import oal_jax
from benchmarks import timing
from benchmarks.job import configs
from benchmarks.plots import draw as draw
from benchmarks.timing import Job
from oal_jax.config import Latents

SHIPPED = Path(oal_jax.__file__).parent / "pretrained" / "weights" / "fashion_sd"
_TOKENS = 77
# Of the twin's forms: its case of sampling.
_CASE = {"reference": "reference-official", "tuned": "reference", "shortcuts": "default"}
_RECIPE = {"reference": "reference", "tuned": "reference", "shortcuts": "default"}


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the jobs in turns; print ratios; return the rows."""
    parser = timing.parser("latents")
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--steps", type=int, default=0, help="of the samplers; 0: 20 and 50")
    parser.add_argument("--sd-v1", action="store_true", help="also at the sizes of SD v1: 15 GiB")
    parser.add_argument("--batch", type=int, default=2, help="of --sd-v1")
    args = parser.parse_args(argv)
    timing.settle(args, ("torch", "timm", "diffusers"))
    jobs = []
    if "jax" in args.frameworks:
        jobs += _ours(args)
    if "torch" in args.frameworks:
        jobs += _theirs(args)
    rows = timing.measure("latents", jobs, args)
    if args.sd_v1:
        jobs = []
        if "jax" in args.frameworks:
            jobs.append(Job("step-sd-v1", "jax", _our_large_step(args), items=args.batch))
        if "torch" in args.frameworks:
            job = _their_large_step(args)
            jobs.append(Job("step-sd-v1", "torch", job, more={"form": "tuned"}, items=args.batch))
        rows += timing.measure("latents", jobs, args)
    return rows


def _recipes(args: argparse.Namespace) -> dict[str, Latents]:
    made = configs(smoke=False)
    found = {recipe: made[recipe].latents for recipe in ("default", "reference")}
    for latents in found.values():
        latents.chunk, latents.steps = args.latents, args.steps or latents.steps
    return found


def _inputs(batch: int, shape: Sequence[int], tokens: int, width: int) -> list[np.ndarray]:
    """Noise and text states, (B, C, h, w) and twice (B, L, d)."""
    rng = np.random.default_rng(0)
    shapes = [(batch, *shape), *[(batch, tokens, width)] * 2]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _outliers(classes: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(classes, 50, width))
    return (0.4 * pool / np.linalg.norm(pool, axis=-1, keepdims=True)).astype(np.float32)


def _ours(args: argparse.Namespace) -> list[Job]:
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
    x, cond, uncond = jax.device_put(_inputs(count, sd.latent_shape, *sizes))
    step = jax.jit(partial(_our_step, apply_unet))
    jobs = [
        Job(
            "step",
            "jax",
            lambda: jax.block_until_ready(step(params, x, cond, uncond)),
            items=count,
        )
    ]
    for name, recipe in _recipes(args).items():
        ids, mask, empty = conditioning.class_tokens(sd, words, create.PROMPT, recipe.injection)
        draw = samplers.make_sampler(
            apply_unet, sd.schedule, recipe.sampler, recipe.steps, recipe.guidance
        )

        @jax.jit
        def sample(params, key, ids=ids, mask=mask, empty=empty, draw=draw):
            rows = jax.random.randint(key, (count,), 0, pool.shape[1])
            noise = samplers.initial_noise(key, jnp.arange(count), sd.latent_shape)
            given = ids[labels], mask[labels], pool[labels, rows]
            cond = conditioning.encode_with_injection(sd, params, *given)
            return draw(params, noise, cond, stable_diffusion.encode_prompts(sd, params, empty))

        key = jax.random.key(0)
        job = lambda sample=sample, key=key: jax.block_until_ready(sample(params, key))
        jobs.append(Job(name, "jax", job, items=count))
    return jobs


def _our_step(apply_unet, params, x, cond, uncond):
    """One guided prediction as the sampler makes it: both halves side by side, one call."""
    import jax.numpy as jnp

    count = x.shape[0]
    pairs = jnp.stack([x, x], axis=1).reshape(2 * count, *x.shape[1:])
    states = jnp.stack([uncond, cond], axis=1).reshape(2 * count, *cond.shape[1:])
    out = apply_unet(params, pairs, jnp.full((2 * count,), 501), states)
    out = out.reshape(count, 2, *x.shape[1:])
    return out[:, 0] + 2 * (out[:, 1] - out[:, 0])


def _theirs(args: argparse.Namespace) -> list[Job]:
    import torch

    from benchmarks.torch_twin import diffusion, forms
    from oal_jax.generator.create import FASHION_CLASSES

    device, jobs = torch.device(args.device), []
    recipes = _recipes(args)
    pool = torch.from_numpy(_outliers(len(FASHION_CLASSES), 128)).to(device)
    labels = torch.arange(args.latents) % len(FASHION_CLASSES)
    for name in args.forms:
        form = forms.make(name, eager=args.twin_eager, dtype=args.twin_dtype)
        # Compiled forms change the memory layout of their network: each has its own.
        generator = diffusion.load(SHIPPED, device)
        unet = forms.compiled(form, generator.unet)
        length = generator.text_encoder.config.max_position_embeddings
        inputs = _inputs(args.latents, generator.latent_shape, length, 128)
        if name != "shortcuts":  # it has the step of "tuned"
            case = "step" if name == "tuned" else "step-official"
            more = {"form": name}
            step = partial(_their_step, form, unet, device, inputs)
            jobs.append(Job(case, "torch", step, ("step",), more, args.latents))
        random = torch.Generator().manual_seed(0)

        def sample(form=form, generator=generator, unet=unet, name=name, random=random):
            forms.prepare(form, device)
            recipe = recipes[_RECIPE[name]]
            diffusion.sample(generator, unet, form, recipe, FASHION_CLASSES, pool, labels, random)
            forms.synchronise(device)

        against, more = (_RECIPE[name], "default"), {"form": name}
        jobs.append(Job(_CASE[name], "torch", sample, against, more, args.latents))
    return jobs


def _their_step(form, unet, device, inputs) -> None:
    import torch

    from benchmarks.torch_twin import diffusion, forms

    x, cond, uncond = (torch.from_numpy(array).to(device) for array in inputs)
    forms.prepare(form, device)
    with forms.inference(form, device):
        predict = diffusion.make_predict(unet, torch.cat([uncond, cond]), 2.0)
        predict(forms.images_as(form, x), torch.tensor(501, device=device))
    forms.synchronise(device)


def _our_large_step(args: argparse.Namespace) -> Callable[[], Any]:
    import jax

    from oal_jax.generator import flax_models, stable_diffusion_v1

    unet = stable_diffusion_v1.build().unet
    shapes = jax.eval_shape(partial(flax_models.init_unet, unet), jax.random.key(0))
    rng = np.random.default_rng(0)  # its own initialisation takes minutes to compile
    params = jax.tree.map(
        lambda s: jax.device_put(0.02 * rng.standard_normal(s.shape, np.float32)), shapes
    )
    inputs = _inputs(args.batch, (4, 64, 64), _TOKENS, unet.cross_attention_dim)
    x, cond, uncond = jax.device_put(inputs)
    step = jax.jit(partial(_our_step, partial(flax_models.apply_unet, unet)))
    return lambda: jax.block_until_ready(step(params, x, cond, uncond))


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
