"""A Stable Diffusion read from a diffusers directory, as static modules and a tree of parameters
apart.

Images are (B, H, W, channels) float32 in [0, 1], as everywhere in this project; latents are (B, C,
h, w) float32, scaled to about unit variance, as Stable Diffusion keeps them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oal_jax.errors import UserError
from oal_jax.generator import flax_models
from oal_jax.generator.schedule import NoiseSchedule
from oal_jax.pretrained import diffusers_directory

Params = dict[str, Any]


class StableDiffusion(NamedTuple):
    """What of a Stable Diffusion does not change in training: modules, tokenizer, constants."""

    tokenizer: Any
    text_encoder: nn.Module
    unet: nn.Module
    vae: nn.Module
    schedule: NoiseSchedule
    scaling_factor: float

    @property
    def text_width(self) -> int:
        """Width of a token embedding: what an injected outlier must have."""
        return self.text_encoder.config.hidden_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of one image."""
        return self.unet.in_channels, self.unet.sample_size, self.unet.sample_size

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the autoencoder's images."""
        return self.unet.sample_size * 2 ** (len(self.vae.block_out_channels) - 1)


def build(directory: Path, dtype: Any = jnp.float32) -> StableDiffusion:
    """Modules and constants of a directory, without its weights.

    Raises:
        UserError: a config is absent, damaged, or asks for something that the Flax models cannot
            do.
    """
    directory = Path(directory)
    read = diffusers_directory.read_json
    unet = flax_models.make_unet(read(directory / "unet" / "config.json"), dtype)
    vae_config = read(directory / "vae" / "config.json")
    # The autoencoder stays in float32 whatever the rest: it is small and its means are the training
    # targets.
    vae = flax_models.make_vae(vae_config)
    text_encoder = flax_models.make_text_encoder(
        read(directory / "text_encoder" / "config.json"), dtype
    )
    schedule = NoiseSchedule.from_config(read(directory / "scheduler" / "scheduler_config.json"))
    width = text_encoder.config.hidden_size
    if unet.cross_attention_dim != width:
        raise UserError(
            f"{directory}: the UNet expects text states of width {unet.cross_attention_dim},"
            f" the text encoder gives {width}"
        )
    try:
        tokenizer = flax_models.libraries().CLIPTokenizer.from_pretrained(
            str(directory / "tokenizer"), local_files_only=True
        )
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory / 'tokenizer'}: not a CLIP tokenizer ({reason})") from None
    return StableDiffusion(
        tokenizer, text_encoder, unet, vae, schedule, vae_config.get("scaling_factor", 0.18215)
    )


def init_params(sd: StableDiffusion, key: jax.Array) -> Params:
    """Fresh parameters {"text_encoder", "unet", "vae"}; under `jax.eval_shape` their shapes."""
    return {
        "text_encoder": flax_models.init_text_encoder(sd.text_encoder, jax.random.fold_in(key, 0)),
        "unet": flax_models.init_unet(sd.unet, jax.random.fold_in(key, 1)),
        "vae": flax_models.init_vae(sd.vae, jax.random.fold_in(key, 2)),
    }


def load(directory: Path, dtype: Any = jnp.float32) -> tuple[StableDiffusion, Params]:
    """Modules and parameters of a diffusers directory.

    Args:
        directory: a Stable Diffusion v1 or v2 in diffusers' layout, or one made by `create`.
        dtype: of the UNet and the text encoder (float32 or bfloat16); the autoencoder is float32.

    Returns:
        The static part and {"text_encoder", "unet", "vae"} parameter trees.

    Raises:
        UserError: see `build` and `oal_jax.pretrained.diffusers_directory.read_params`.
    """
    directory = Path(directory)
    sd = build(directory, dtype)
    shapes = jax.eval_shape(lambda key: init_params(sd, key), jax.random.key(0))
    params = {
        name: diffusers_directory.read_params(
            directory / name, tree, jnp.float32 if name == "vae" else dtype
        )
        for name, tree in shapes.items()
    }
    return sd, params


def tokenize(sd: StableDiffusion, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
    """Token ids, padded to the tokenizer's length.

    Raises:
        UserError: a text is longer than that; a cut prompt would lose its class word, which stands
            last.
    """
    length = sd.text_encoder.config.max_position_embeddings
    lengths = [len(ids) for ids in sd.tokenizer(list(texts))["input_ids"]]
    for text, n in zip(texts, lengths, strict=True):
        if n > length:
            raise UserError(f"prompt {text!r} has {n} tokens, the text encoder takes {length}")
    ids = sd.tokenizer(list(texts), padding="max_length", max_length=length)["input_ids"]
    return np.asarray(ids, np.int32)


def encode_prompts(
    sd: StableDiffusion, params: Params, ids: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Text states (last hidden state after the final layer norm) of token ids from `tokenize`."""
    return flax_models.apply_text_encoder(sd.text_encoder, params["text_encoder"], ids)


def apply_unet(
    sd: StableDiffusion, params: Params, latents: Array, timesteps: Array, states: Array
) -> Float[Array, "B C h w"]:
    """The UNet's prediction in float32; see `flax_models.apply_unet`."""
    dtype = sd.unet.dtype
    out = flax_models.apply_unet(
        sd.unet, params["unet"], latents.astype(dtype), timesteps, states.astype(dtype)
    )
    return out.astype(jnp.float32)


def pad_images(sd: StableDiffusion, images: Float[Array, "B H W c"]) -> Float[Array, "B S S c"]:
    """Images centred on a black square of the autoencoder's size (28 x 28 becomes 32 x 32).

    Raises:
        UserError: the images are larger than that, or have another number of channels.
    """
    size, channels = sd.image_size, sd.vae.in_channels
    height, width = images.shape[1:3]
    if height > size or width > size:
        raise UserError(f"images of {height} x {width} do not fit a generator of {size} x {size}")
    if images.shape[-1] == 1 and channels > 1:
        images = jnp.repeat(images, channels, axis=-1)
    if images.shape[-1] != channels:
        raise UserError(f"the generator takes {channels} channels, not {images.shape[-1]}")
    top, left = (size - height) // 2, (size - width) // 2
    rows, columns = (top, size - height - top), (left, size - width - left)
    return jnp.pad(images, ((0, 0), rows, columns, (0, 0)))


def encode_images(
    sd: StableDiffusion, params: Params, images: Float[Array, "B H W c"]
) -> Float[Array, "B C h w"]:
    """Scaled means of the latents of images in [0, 1]."""
    pixels = jnp.moveaxis(pad_images(sd, images), -1, 1) * 2.0 - 1.0
    mean, _ = flax_models.apply_vae_encoder(sd.vae, params["vae"], pixels)
    return mean * sd.scaling_factor


def decode_latents(
    sd: StableDiffusion,
    params: Params,
    latents: Float[Array, "B C h w"],
    crop: tuple[int, int] | None = None,
) -> Float[Array, "B H W c"]:
    """Images in [0, 1] of scaled latents.

    Args:
        sd: the model.
        params: its parameters; only "vae" is used.
        latents: scaled latents.
        crop: (height, width) of the middle to keep: cuts away what `pad_images` added.
    """
    pixels = flax_models.apply_vae_decoder(sd.vae, params["vae"], latents / sd.scaling_factor)
    images = jnp.clip(jnp.moveaxis(pixels, 1, -1) * 0.5 + 0.5, 0.0, 1.0)
    if crop is not None:
        top, left = (images.shape[1] - crop[0]) // 2, (images.shape[2] - crop[1]) // 2
        images = images[:, top : top + crop[0], left : left + crop[1]]
    return images
