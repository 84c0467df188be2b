"""The one place that imports diffusers' and transformers' Flax models.

Both libraries announce the end of their Flax code with a log line at import and at every trace. The
versions are pinned, so a user cannot act on these lines, and a sampler would print hundreds. They
are filtered here, and no others.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from oal_jax.errors import UserError
from oal_jax.generator import attention

_USE_TORCH = "USE_TORCH"  # environment variable that both libraries read


def _is_no_notice(record: logging.LogRecord) -> bool:
    return "classes are deprecated and will be removed" not in record.getMessage()


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Silences both libraries during their import, and their Flax modules' notices after it."""
    roots = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [root.level for root in roots]
    for root in roots:
        root.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for root, level in zip(roots, levels, strict=True):
        root.setLevel(level)
    # On each logger: a filter on a parent does not apply to what its children log.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("diffusers.", "transformers.")) and "flax" in name:
            logging.getLogger(name).addFilter(_is_no_notice)


def leave_torch_out() -> None:
    """Keeps both libraries from importing PyTorch, unless the user's environment sets USE_TORCH.

    Importing it takes seconds. This changes the whole process, in which the libraries' PyTorch
    classes are then missing: it is for commands, not for library code.
    """
    os.environ.setdefault(_USE_TORCH, "0")


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Makes `import torch` fail after `leave_torch_out`: diffusers ignores USE_TORCH."""
    hidden = os.environ.get(_USE_TORCH) == "0" and "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


@functools.cache
@_without_torch()
def libraries() -> SimpleNamespace:
    """The classes used, imported on first use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.get_logger()  # sets the library's own level, once
    with _without_notices():
        from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel
        from diffusers.models.vae_flax import FlaxAutoencoderKL
        from transformers import CLIPTextConfig, CLIPTokenizer
        from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModule
    return SimpleNamespace(
        UNet=FlaxUNet2DConditionModel,
        AutoencoderKL=FlaxAutoencoderKL,
        CLIPText=FlaxCLIPTextModule,
        CLIPTextConfig=CLIPTextConfig,
        CLIPTokenizer=CLIPTokenizer,
    )


# Entries whose value the Flax classes fix in code. Another value describes another network.
_UNET_FIXED = {
    "_class_name": ("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "act_fn": ("silu",),
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3, None),
    "dual_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "downsample_padding": (1,),
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    **dict.fromkeys(("addition_embed_type", "encoder_hid_dim_type", "num_class_embeds"), (None,)),
    **dict.fromkeys(("time_cond_proj_dim", "timestep_post_act", "cross_attention_norm"), (None,)),
}
_VAE_FIXED = {
    "_class_name": ("AutoencoderKL", "FlaxAutoencoderKL"),
    "act_fn": ("silu",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    **dict.fromkeys(("shift_factor", "latents_mean"), (None,)),
}
_TEXT_FIXED = {"model_type": ("clip_text_model", "clip")}
# The Flax classes build the last of these for a block of an unknown name.
_BLOCKS = {
    "UNet": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "AutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
}


def _check(what: str, config: Mapping[str, Any], fixed: Mapping[str, tuple]) -> None:
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise UserError(f"{what}: {key}={config[key]!r} is not supported")
    for key, allowed in _BLOCKS.get(what, {}).items():
        for block in config.get(key, ()):
            if block not in allowed:
                raise UserError(f"{what}: {key} names {block!r}, which is not supported")


def _build(name: str, config: Mapping[str, Any], fixed: Mapping[str, tuple], dtype: Any) -> Any:
    _check(name, config, fixed)
    cls = getattr(libraries(), name)
    known = {field.name for field in dataclasses.fields(cls)} - {"parent", "name", "dtype"}
    values = {key: config[key] for key in known if key in config}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**values, dtype=dtype)


def make_unet(config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The UNet of a `unet/config.json`; `UserError` if the Flax class cannot express it."""
    return _build("UNet", config, _UNET_FIXED, dtype)


def make_vae(config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The autoencoder of a `vae/config.json`; `UserError` if the Flax class cannot express it."""
    return _build("AutoencoderKL", config, _VAE_FIXED, dtype)


def make_text_encoder(config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """CLIP's text transformer of a `text_encoder/config.json`, as a linen module."""
    _check("text encoder", config, _TEXT_FIXED)
    classes = libraries()
    return classes.CLIPText(classes.CLIPTextConfig.from_dict(dict(config)), dtype=dtype)


def init_unet(unet: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of a UNet; under `jax.eval_shape` their shapes."""
    with _own_arithmetic():
        return unet.init_weights(key)


def init_vae(vae: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of an autoencoder; under `jax.eval_shape` their shapes."""
    with _own_arithmetic():
        return vae.init_weights(key)


def init_text_encoder(text_encoder: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of a text encoder; under `jax.eval_shape` their shapes."""
    ids = jnp.zeros((1, text_encoder.config.max_position_embeddings), jnp.int32)
    with _own_arithmetic():
        return text_encoder.init(key, ids, jnp.ones_like(ids), _positions(ids))["params"]


def _positions(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[-1])[None], ids.shape)


def _own_arithmetic():
    # The libraries rely on implicit rank promotion, which a strict caller may have forbidden.
    return jax.numpy_rank_promotion("allow")


def _exact_gelu(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Gates with the exact GELU, as PyTorch does; the Flax class has the tanh approximation."""
    if type(context.module).__name__ != "FlaxGEGLU" or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    linear, gate = jnp.split(context.module.proj(args[0]), 2, axis=-1)
    return linear * nn.gelu(gate, approximate=False)


def _bounded_attention(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Attends over large maps by `attention.attend`; the Flax class holds all scores at once."""
    module = context.module
    if type(module).__name__ != "FlaxAttention" or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    hidden = args[0]
    states = next((x for x in (*args[1:2], kwargs.get("context")) if x is not None), hidden)
    if not attention.is_large(hidden.shape[1], states.shape[1]):
        return next_fun(*args, **kwargs)
    projected = module.query(hidden), module.key(states), module.value(states)
    query, key, value = (x.reshape(*x.shape[:2], module.heads, module.dim_head) for x in projected)
    mixed = attention.attend(query, key, value)
    return module.proj_attn(mixed.reshape(*hidden.shape[:2], -1))


def apply_unet(
    unet: nn.Module, params: Any, latents: jax.Array, timesteps: jax.Array, states: jax.Array
) -> jax.Array:
    """The network's prediction (noise or velocity).

    Args:
      unet: module from `make_unet`.
      params: its parameters.
      latents: (B, h, w, C).
      timesteps: (B,) int32 or float32, in training steps (0 to 999).
      states: (B, L, width) text states.

    Returns:
      (B, h, w, C) in the module's dtype.
    """
    with (
        _own_arithmetic(),
        nn.intercept_methods(_exact_gelu),
        nn.intercept_methods(_bounded_attention),
    ):
        # The Flax class takes channels first, as PyTorch does.
        first = jnp.moveaxis(latents, -1, 1)
        out = unet.apply({"params": params}, first, jnp.asarray(timesteps), states)
    return jnp.moveaxis(out.sample, 1, -1)


def apply_text_encoder(text_encoder: nn.Module, params: Any, ids: jax.Array) -> jax.Array:
    """Last hidden states after the final layer norm, (B, L, width), of token ids (B, L).

    There is no padding mask, as in Stable Diffusion: padding tokens attend and are attended to.
    """
    with _own_arithmetic():
        out = text_encoder.apply({"params": params}, ids, jnp.ones_like(ids), _positions(ids))
    return out.last_hidden_state


def apply_vae_encoder(
    vae: nn.Module, params: Any, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of the latents of images.

    Args:
      vae: module from `make_vae`.
      params: its parameters.
      images: (B, channels, H, W) in [-1, 1].

    Returns:
      Two arrays (B, h, w, C), not scaled.
    """
    with _own_arithmetic():
        posterior = vae.apply({"params": params}, images, method=vae.encode).latent_dist
    return posterior.mean, posterior.logvar


def apply_vae_decoder(vae: nn.Module, params: Any, latents: jax.Array) -> jax.Array:
    """Images (B, channels, H, W), about in [-1, 1], of unscaled latents (B, h, w, C)."""
    # The Flax class guesses the layout from the last axis and expects channels there.
    with _own_arithmetic():
        out = vae.apply({"params": params}, latents, method=vae.decode)
    return out.sample
