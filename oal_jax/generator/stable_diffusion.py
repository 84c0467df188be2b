"""A Stable Diffusion of a diffusers directory: static modules, and a tree of parameters.

Images are (B, H, W, channels) float32 in [0, 1]. Latents are (B, h, w, C) float32, scaled to about
unit variance.
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

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_PIPELINE = "StableDiffusion"  # prefix of its pipelines' names in model_index.json
_OTHER_PIPELINES = ("StableDiffusionXL", "StableDiffusion3")


class StableDiffusion(NamedTuple):
    """The parts of a Stable Diffusion that training does not change."""

    tokenizer: Any
    text_encoder: nn.Module
    unet: nn.Module
    vae: nn.Module
    schedule: NoiseSchedule
    scaling_factor: float

    @property
    def text_width(self) -> int:
        """Width of a token embedding, and so of an injected outlier."""
        return self.text_encoder.config.hidden_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the latent of one image."""
        return self.unet.sample_size, self.unet.sample_size, self.unet.in_channels

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the autoencoder's images."""
        return self.unet.sample_size * 2 ** (len(self.vae.block_out_channels) - 1)


def build(directory: Path, dtype: Any = jnp.float32) -> StableDiffusion:
    """Modules and constants of a directory, without its weights.

    Raises:
      UserError: a config is missing or damaged, or the Flax classes cannot express it.
    """
    directory = Path(directory)
    read = diffusers_directory.read_json
    _check_pipeline(directory)
    unet = flax_models.make_unet(read(directory / "unet" / "config.json"), dtype)
    vae_config = read(directory / "vae" / "config.json")
    # The autoencoder is always float32: it is small, and its means are training targets.
    vae = flax_models.make_vae(vae_config)
    text_encoder = flax_models.make_text_encoder(
        read(directory / "text_encoder" / "config.json"), dtype
    )
    schedule = NoiseSchedule.from_config(read(directory / "scheduler" / "scheduler_config.json"))
    width = text_encoder.config.hidden_size
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise UserError(
            f"{directory}: the UNet takes {unet.in_channels} channels and gives"
            f" {unet.out_channels}, the autoencoder's latents have {vae.latent_channels}; is this a"
            " model for inpainting or depth?"
        )
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


def _check_pipeline(directory: Path) -> None:
    index = directory / "model_index.json"
    name = str(diffusers_directory.read_json(index).get("_class_name")) if index.exists() else ""
    plain = name.removeprefix("Flax")
    if index.exists() and (not plain.startswith(_PIPELINE) or plain.startswith(_OTHER_PIPELINES)):
        raise UserError(
            f"{directory} holds a {name}; give a Stable Diffusion v1 or v2, which are of class"
            " StableDiffusionPipeline"
        )


def init_params(sd: StableDiffusion, key: jax.Array) -> Params:
    """Fresh parameters {"text_encoder", "unet", "vae"}; under `jax.eval_shape` their shapes."""
    return {
        "text_encoder": flax_models.init_text_encoder(sd.text_encoder, jax.random.fold_in(key, 0)),
        "unet": flax_models.init_unet(sd.unet, jax.random.fold_in(key, 1)),
        "vae": flax_models.init_vae(sd.vae, jax.random.fold_in(key, 2)),
    }


def param_shapes(sd: StableDiffusion, directory: Path) -> Params:
    """`jax.ShapeDtypeStruct`s of all parameters; `UserError` if the configs fit no network."""
    try:
        return jax.eval_shape(lambda key: init_params(sd, key), jax.random.key(0))
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{directory}: its configs describe no network ({reason})") from None


def load(
    directory: Path,
    dtype: Any = jnp.float32,
    components: Sequence[str] = diffusers_directory.COMPONENTS,
) -> tuple[StableDiffusion, Params]:
    """Modules and parameters of a diffusers directory.

    Weights are read one tensor at a time, so the host holds one more tensor than the parameters.

    Args:
      directory: a Stable Diffusion v1 or v2 in diffusers' layout, or the directory of `create`.
      dtype: of the UNet and the text encoder, float32 or bfloat16; the autoencoder is float32.
      components: parts whose parameters are read.

    Returns:
      The static part and {"text_encoder", "unet", "vae"} parameter trees.

    Raises:
      UserError: see `build` and `oal_jax.pretrained.diffusers_directory.read_params`.
    """
    directory = Path(directory)
    diffusers_directory.files(directory)  # raises for a missing file before anything is read
    sd = build(directory, dtype)
    shapes = param_shapes(sd, directory)
    params = {
        name: diffusers_directory.read_params(
            directory / name, shapes[name], jnp.float32 if name == "vae" else dtype
        )
        for name in components
    }
    return sd, params


def check(directory: Path) -> StableDiffusion:
    """`build`, with all checks of `load`, but reads only the headers of the weights."""
    directory = Path(directory)
    diffusers_directory.files(directory)
    sd = build(directory)
    for name, tree in param_shapes(sd, directory).items():
        diffusers_directory.check_params(directory / name, tree)
    return sd


def tokenize(sd: StableDiffusion, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
    """Token ids, padded to the tokenizer's length.

    Raises:
      UserError: a text is longer. Cutting a prompt would remove its class word, which is last.
    """
    length = sd.text_encoder.config.max_position_embeddings
    # Not verbose: a text that is too long is an error here, no warning.
    lengths = [len(ids) for ids in sd.tokenizer(list(texts), verbose=False)["input_ids"]]
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
) -> Float[Array, "B h w C"]:
    """The UNet's prediction in float32; see `flax_models.apply_unet`."""
    dtype = sd.unet.dtype
    out = flax_models.apply_unet(
        sd.unet, params["unet"], latents.astype(dtype), timesteps, states.astype(dtype)
    )
    return out.astype(jnp.float32)


def pad_images(sd: StableDiffusion, images: Float[Array, "B H W c"]) -> Float[Array, "B S S c"]:
    """Images centred on a black square of the autoencoder's size (28 x 28 becomes 32 x 32).

    Raises:
      UserError: the images are larger, or have another number of channels.
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


def _is_padded(sd: StableDiffusion, shape: Sequence[int]) -> bool:
    """Whether images of this height and width are padded: by less than a latent pixel a side."""
    size = sd.image_size
    return all(size - 2 * size // sd.latent_shape[0] < side <= size for side in shape)


def fit_images(sd: StableDiffusion, images: Float[Array, "B H W c"]) -> Float[Array, "B S S c"]:
    """Images at the autoencoder's size.

    Images that are smaller by less than one latent pixel a side are padded by `pad_images` (28 px
    to 32). Others are resized, bilinear (32 or 224 px to 512).

    Raises:
      UserError: the images are not square, or have another number of channels.
    """
    height, width, channels = images.shape[1:]
    size = sd.image_size
    if not _is_padded(sd, (height, width)):
        if height != width:
            raise UserError(
                f"images of {height} x {width} do not fit a generator of {size} x {size}: they are"
                " not square; set data.image_size"
            )
        shape = (images.shape[0], size, size, channels)
        images = jax.image.resize(images, shape, "bilinear")
    return pad_images(sd, images)


def encode_images(
    sd: StableDiffusion, params: Params, images: Float[Array, "B H W c"]
) -> Float[Array, "B h w C"]:
    """Scaled means of the latents of images in [0, 1], which `fit_images` brings to size."""
    pixels = jnp.moveaxis(fit_images(sd, images), -1, 1) * 2.0 - 1.0
    mean, _ = flax_models.apply_vae_encoder(sd.vae, params["vae"], pixels)
    return mean * sd.scaling_factor


def decode_latents(
    sd: StableDiffusion,
    params: Params,
    latents: Float[Array, "B h w C"],
    size: tuple[int, int] | None = None,
) -> Float[Array, "B H W c"]:
    """Images in [0, 1] of scaled latents.

    Args:
      sd: the model.
      params: its parameters; only "vae" is used.
      latents: scaled latents.
      size: (height, width) of the images, obtained by the inverse of `fit_images`; None: the
        autoencoder's size.
    """
    pixels = flax_models.apply_vae_decoder(sd.vae, params["vae"], latents / sd.scaling_factor)
    images = jnp.clip(jnp.moveaxis(pixels, 1, -1) * 0.5 + 0.5, 0.0, 1.0)
    if size is not None and _is_padded(sd, size):
        top, left = (images.shape[1] - size[0]) // 2, (images.shape[2] - size[1]) // 2
        images = images[:, top : top + size[0], left : left + size[1]]
    elif size is not None:
        shape = (images.shape[0], *size, images.shape[3])
        images = jax.image.resize(images, shape, "bilinear")
    return images
