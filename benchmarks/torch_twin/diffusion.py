"""Stable Diffusion by diffusers and transformers, with outliers injected as token embeddings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch_twin import forms
from benchmarks.torch_twin.forms import Form
from oal_jax.config import Config, Latents
from oal_jax.errors import UserError

PROMPT = "A high-quality image of the {}"


class Generator(NamedTuple):
    """A Stable Diffusion model in float32 and evaluation mode."""

    tokenizer: Any
    text_encoder: nn.Module
    unet: nn.Module
    vae: nn.Module
    schedule: dict[str, Any]  # content of scheduler_config.json

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size


def load(directory: Path, device: torch.device) -> Generator:
    """Read a diffusers directory."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    def read(cls: Any, part: str) -> nn.Module:
        options = {"torch_dtype": torch.float32, "use_safetensors": True}
        if cls is not CLIPTextModel:
            options["low_cpu_mem_usage"] = False  # True needs the package accelerate
        return (
            cls.from_pretrained(directory / part, **options).to(device).eval().requires_grad_(False)
        )

    return Generator(
        CLIPTokenizer.from_pretrained(directory / "tokenizer"),
        read(CLIPTextModel, "text_encoder"),
        read(UNet2DConditionModel, "unet"),
        read(AutoencoderKL, "vae"),
        PNDMScheduler.load_config(directory / "scheduler"),
    )


def make_scheduler(schedule: dict[str, Any], sampler: str) -> Any:
    """The diffusers scheduler of one of our samplers."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

    if sampler == "pndm":
        return PNDMScheduler.from_config(schedule)
    if sampler == "ddim":
        return DDIMScheduler.from_config(schedule, clip_sample=False)
    return DPMSolverMultistepScheduler.from_config(
        schedule, timestep_spacing="linspace", final_sigmas_type="sigma_min"
    )


def token_ids(generator: Generator, word: str) -> list[int]:
    """Token ids of a word alone."""
    return generator.tokenizer(word, add_special_tokens=False).input_ids


def _prompt_ids(generator: Generator, texts: Sequence[str]) -> Tensor:
    length = generator.text_encoder.config.max_position_embeddings
    tokens = generator.tokenizer(list(texts), padding="max_length", max_length=length)
    return torch.tensor(tokens.input_ids, device=generator.text_encoder.device)


def token_norms(generator: Generator, words: Sequence[str]) -> Tensor:
    """Norm of the embedding of each word's first token."""
    table = generator.text_encoder.get_input_embeddings().weight
    rows = torch.tensor([token_ids(generator, w)[0] for w in words], device=table.device)
    return table[rows].norm(dim=1)


def injection_mask(generator: Generator, words: Sequence[str], injection: str) -> Tensor:
    """Mask (K, L) of the prompt positions that the outlier replaces, for each class."""
    ids = _prompt_ids(generator, [PROMPT.format(w) for w in words])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, word in enumerate(words):
        pieces = torch.tensor(token_ids(generator, word), device=ids.device)
        if injection == "first_piece":
            mask[row] = ids[row] == pieces[0]
            continue
        for start in (ids[row].unfold(0, len(pieces), 1) == pieces).all(1).nonzero():
            mask[row, start : start + len(pieces)] = True
    if not mask.any(1).all():
        raise UserError("a class word does not occur in its prompt")
    return mask


def encode(
    generator: Generator, ids: Tensor, mask: Tensor | None = None, vectors: Tensor | None = None
) -> Tensor:
    """Text states (B, L, d). `vectors` (B, d) replace the token embeddings under the mask."""
    table = generator.text_encoder.get_input_embeddings()

    def replace(module, args, output):
        return torch.where(mask[:, :, None], vectors[:, None].to(output.dtype), output)

    handle = None if mask is None else table.register_forward_hook(replace)
    try:
        return generator.text_encoder(ids).last_hidden_state
    finally:
        if handle:
            handle.remove()


def encode_by_table(generator: Generator, ids: Tensor, token: int, vector: Tensor) -> Tensor:
    """Text states with a row of the embedding table overwritten, as the official code does."""
    table = generator.text_encoder.get_input_embeddings().weight
    original = table[token].clone()
    table[token] = vector
    try:
        return generator.text_encoder(ids).last_hidden_state
    finally:
        table[token] = original


def make_predict(
    unet: Callable[..., Any], states: Tensor, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """`(latents, time) -> noise` with classifier-free guidance.

    `states` (2 B, L, d) are those of the empty prompt, then those of the prompts.
    """

    def predict(x: Tensor, time: Tensor) -> Tensor:
        if guidance == 1:
            return unet(x, time, states[len(x) :], return_dict=False)[0].float()
        out = unet(torch.cat([x, x]), time, states, return_dict=False)[0].float()
        without, with_text = out.chunk(2)
        return without + guidance * (with_text - without)

    return predict


def denoise(
    unet: Callable[..., Any], schedule: dict[str, Any], latents: Latents, x: Tensor, states: Tensor
) -> Tensor:
    """Latents from noise, by all steps of the sampler."""
    predict = make_predict(unet, states, latents.guidance)
    scheduler = make_scheduler(schedule, latents.sampler)
    scheduler.set_timesteps(latents.steps, device=x.device)
    for time in scheduler.timesteps:
        x = scheduler.step(predict(x, time), time, x, return_dict=False)[0]
    return x


def sample(
    generator: Generator,
    unet: Callable[..., Any],
    form: Form,
    config: Config,
    words: Sequence[str],
    pool: Tensor,
    labels: Tensor,
    random: torch.Generator,
) -> Tensor:
    """A latent for each label, conditioned on an outlier of its class from `pool` (K, n, d).

    `unet` is the generator's, compiled as the form says. The form also says how many latents a call
    samples, and whether they are decoded.
    """
    device = pool.device
    sampled = [torch.empty((0, *generator.latent_shape), device=device)]
    prompts = _prompt_ids(generator, [PROMPT.format(w) for w in words])
    empty = _prompt_ids(generator, [""])
    injection = "first_piece" if config.outliers.official_code else "all_pieces"
    mask, latents = injection_mask(generator, words, injection), config.latents
    per_call = form.samples_per_call or latents.chunk
    if form.samples_per_call:  # a call samples one class
        labels = labels.sort().values
    with forms.inference(form, device):
        for start in range(0, len(labels), per_call):
            chunk = labels[start : start + per_call]
            count = len(chunk)
            if not form.samples_per_call:  # fill up the last chunk: one shape, one program
                chunk = functional.pad(chunk, (0, per_call - count))
            if form.samples_per_call and injection == "first_piece":
                row = torch.randint(pool.shape[1], (1,), generator=random)
                token = token_ids(generator, words[chunk[0]])[0]
                vector = pool[chunk[0], row[0]]
                cond = encode_by_table(generator, prompts[chunk], token, vector)
            else:
                rows = torch.randint(pool.shape[1], (len(chunk),), generator=random).to(device)
                cond = encode(generator, prompts[chunk], mask[chunk], pool[chunk, rows])
            uncond = encode(generator, empty).expand(cond.shape)
            x = torch.randn((len(chunk), *generator.latent_shape), generator=random).to(device)
            x = forms.images_as(form, x)
            x = denoise(unet, generator.schedule, latents, x, torch.cat([uncond, cond]))
            if form.decode:
                decode(generator, x)
            sampled.append(x[:count].float())
    return torch.cat(sampled).clone()


def decode(generator: Generator, latents: Tensor) -> Tensor:
    """Images (B, c, H, W) in [0, 1]."""
    pixels = generator.vae.decode(latents / generator.vae.config.scaling_factor).sample
    return (pixels / 2 + 0.5).clamp(0, 1)


def encode_images(generator: Generator, images: Tensor) -> Tensor:
    """Latents of images (B, c, h, w) in [0, 1], centred on a black square."""
    config = generator.vae.config
    side = generator.unet.config.sample_size * 2 ** (len(config.block_out_channels) - 1)
    columns, rows = side - images.shape[3], side - images.shape[2]
    edges = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    padded = functional.pad(images, edges) * 2 - 1
    return generator.vae.encode(padded).latent_dist.mean * config.scaling_factor
