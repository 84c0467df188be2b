"""A Stable Diffusion of a diffusers directory: static modules, and a tree of parameters.

Images are (B, H, W, channels) float32 in [0, 1]. Latents are (B, h, w, C) float32, scaled to about
unit variance.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oal_jax.errors import UserError
from oal_jax.generator import autoencoder, clip_text, diffusers_modules, tokenizer, unet
from oal_jax.generator.schedule import NoiseSchedule
from oal_jax.generator.tokenizer import Tokenizer
from oal_jax.pretrained import diffusers_directory

Params = dict[str, Any]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_PIPELINE = "StableDiffusion"  # prefix of its pipelines' names in model_index.json
_SCALING_FACTOR = 0.18215  # of v1 and v2, whose older configs have no entry
_OTHER_PIPELINES = ("StableDiffusionXL", "StableDiffusion3")


class StableDiffusion(NamedTuple):
    """The parts of a Stable Diffusion that training does not change."""

    tokenizer: Tokenizer | None
    text_encoder: clip_text.TextEncoder
    unet: unet.UNet
    vae: autoencoder.Autoencoder
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


def modules(
    configs: Mapping[str, Mapping[str, Any]], dtype: Any = jnp.float32, backend: str = "native"
) -> tuple[clip_text.TextEncoder, unet.UNet, autoencoder.Autoencoder]:
    """Text encoder, UNet and autoencoder of the components' configs.

    Args:
      configs: content of each component's `config.json`.
      dtype: of the UNet and the text encoder. The autoencoder is always float32: it is small, and
        its means are training targets.
      backend: "native", or "diffusers" for the Flax modules of the extra `diffusers`.

    Raises:
      UserError: a config is of another architecture, or the extra is missing.
    """
    if backend == "diffusers":
        diffusers_modules.check()
        classes = diffusers_modules
        kinds = classes.TextEncoder, classes.UNet, classes.Autoencoder
    else:
        kinds = clip_text.TextEncoder, unet.UNet, autoencoder.Autoencoder
    return (
        clip_text.make(configs["text_encoder"], dtype, kinds[0]),
        unet.make(configs["unet"], dtype, kinds[1]),
        autoencoder.make(configs["vae"], jnp.float32, kinds[2]),
    )


def build(directory: Path, dtype: Any = jnp.float32, backend: str = "native") -> StableDiffusion:
    """Modules and constants of a directory, without its weights; arguments as of `modules`.

    Raises:
      UserError: a config or the tokenizer is missing or damaged, or of another architecture.
    """
    directory = Path(directory)
    read = diffusers_directory.read_json
    check_pipeline(directory)
    configs = {c: read(directory / c / "config.json") for c in diffusers_directory.COMPONENTS}
    text_encoder, network, vae = modules(configs, dtype, backend)
    schedule = NoiseSchedule.from_config(read(directory / "scheduler" / "scheduler_config.json"))
    width = text_encoder.config.hidden_size
    if not network.in_channels == network.out_channels == vae.latent_channels:
        raise UserError(
            f"{directory}: the UNet takes {network.in_channels} channels and gives"
            f" {network.out_channels}, the autoencoder's latents have {vae.latent_channels}; is"
            " this a model for inpainting or depth?"
        )
    if network.cross_attention_dim != width:
        raise UserError(
            f"{directory}: the UNet expects text states of width {network.cross_attention_dim},"
            f" the text encoder gives {width}"
        )
    factor = configs["vae"].get("scaling_factor", _SCALING_FACTOR)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not factor > 0:
        raise UserError(
            f"{directory / 'vae' / 'config.json'}: scaling_factor must be a number above 0, not"
            f" {factor!r}"
        )
    words = tokenizer.read(directory / "tokenizer")
    return StableDiffusion(words, text_encoder, network, vae, schedule, factor)


def check_pipeline(directory: Path) -> None:
    """Raises a `UserError` where `model_index.json` names another pipeline, such as SDXL's."""
    index = directory / "model_index.json"
    name = str(diffusers_directory.read_json(index).get("_class_name")) if index.exists() else ""
    plain = name.removeprefix("Flax")
    if index.exists() and (not plain.startswith(_PIPELINE) or plain.startswith(_OTHER_PIPELINES)):
        raise UserError(
            f"{directory} holds a {name}; give a Stable Diffusion v1 or v2, which are of class"
            " StableDiffusionPipeline"
        )


def init(sd: StableDiffusion, component: str, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of "text_encoder", "unet" or "vae"; under `jax.eval_shape` their shapes."""
    side, channels = sd.latent_shape[0], sd.latent_shape[2]
    module = getattr(sd, component)
    ids = jnp.zeros((1, sd.text_encoder.config.max_position_embeddings), jnp.int32)
    inputs = {
        "text_encoder": (ids,),
        "unet": (
            jnp.zeros((1, side, side, channels)),
            jnp.zeros((1,), jnp.int32),
            jnp.zeros((1, 1, sd.unet.cross_attention_dim)),
        ),
        "vae": (jnp.zeros((1, sd.image_size, sd.image_size, sd.vae.in_channels)),),
    }
    return module.init(key, *inputs[component])["params"]


def init_params(sd: StableDiffusion, key: jax.Array) -> Params:
    """Fresh parameters {"text_encoder", "unet", "vae"}; under `jax.eval_shape` their shapes."""
    return {
        name: init(sd, name, jax.random.fold_in(key, i))
        for i, name in enumerate(diffusers_directory.COMPONENTS)
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
    backend: str = "native",
) -> tuple[StableDiffusion, Params]:
    """Modules and parameters of a diffusers directory.

    Weights are read one tensor at a time, so the host holds one more tensor than the parameters.

    Args:
      directory: a Stable Diffusion v1 or v2 in diffusers' layout, or the directory of `create`.
      dtype: of the UNet and the text encoder, float32 or bfloat16; the autoencoder is float32.
      components: parts whose parameters are read.
      backend: see `modules`.

    Returns:
      The static part and {"text_encoder", "unet", "vae"} parameter trees.

    Raises:
      UserError: see `build` and `oal_jax.pretrained.diffusers_directory.read_params`.
    """
    directory = Path(directory)
    diffusers_directory.files(directory)  # raises for a missing file before anything is read
    sd = build(directory, dtype, backend)
    shapes = param_shapes(sd, directory)
    params = {
        name: diffusers_directory.read_params(
            directory / name, shapes[name], jnp.float32 if name == "vae" else dtype
        )
        for name in components
    }
    return sd, params


def check(directory: Path, backend: str = "native") -> StableDiffusion:
    """`build`, with all checks of `load`, but reads only the headers of the weights."""
    directory = Path(directory)
    diffusers_directory.files(directory)
    sd = build(directory, backend=backend)
    for name, tree in param_shapes(sd, directory).items():
        diffusers_directory.check_params(directory / name, tree)
    return sd


def tokenize(sd: StableDiffusion, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
    """Token ids, padded to the text encoder's length.

    Raises:
      UserError: a text is longer. Cutting a prompt would remove its class word, which is last.
    """
    return sd.tokenizer.encode(texts, sd.text_encoder.config.max_position_embeddings)


def encode_prompts(
    sd: StableDiffusion, params: Params, ids: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Text states (last hidden state after the final layer norm) of token ids from `tokenize`."""
    return sd.text_encoder.apply({"params": params["text_encoder"]}, ids)


def apply_unet(
    sd: StableDiffusion, params: Params, latents: Array, timesteps: Array, states: Array
) -> Float[Array, "B h w C"]:
    """The UNet's prediction in float32; see `unet.UNet`."""
    out = sd.unet.apply({"params": params["unet"]}, latents, timesteps, states)
    return out.astype(jnp.float32)


def encode_pixels(sd: StableDiffusion, params: Params, pixels: Array) -> tuple[Array, Array]:
    """Mean and log variance of the unscaled latents of images in [-1, 1] at full size."""
    return sd.vae.apply({"params": params["vae"]}, pixels, method="encode")


def decode_pixels(sd: StableDiffusion, params: Params, latents: Array) -> Array:
    """Images, about in [-1, 1], of unscaled latents."""
    return sd.vae.apply({"params": params["vae"]}, latents, method="decode")


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
    mean, _ = encode_pixels(sd, params, fit_images(sd, images) * 2.0 - 1.0)
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
    pixels = decode_pixels(sd, params, latents / sd.scaling_factor)
    images = jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0)
    if size is not None and _is_padded(sd, size):
        top, left = (images.shape[1] - size[0]) // 2, (images.shape[2] - size[1]) // 2
        images = images[:, top : top + size[0], left : left + size[1]]
    elif size is not None:
        shape = (images.shape[0], *size, images.shape[3])
        images = jax.image.resize(images, shape, "bilinear")
    return images
