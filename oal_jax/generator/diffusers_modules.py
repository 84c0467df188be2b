"""The Flax modules of diffusers 0.39 and transformers 4 in the place of ours (extra `diffusers`).

They have the parameter trees and calls of `unet.UNet`, `autoencoder.Autoencoder` and
`clip_text.TextEncoder`. Theirs are what ours are compared with. They gate with the exact GELU here,
as PyTorch does, instead of their tanh approximation.

Both libraries announce the end of their Flax code with a log line at import and at every trace. A
user cannot act on these lines, and a sampler would print hundreds. They are filtered here, and no
others.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from oal_jax.errors import UserError
from oal_jax.generator import autoencoder, clip_text, unet
from oal_jax.generator.layers import Maps

# The first releases without Flax modules.
_WITHOUT_FLAX = {"diffusers": (0, 40), "transformers": (5, 0)}


def check() -> None:
    """Raises a `UserError` unless the extra `diffusers` is installed."""
    for name, first in _WITHOUT_FLAX.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            reason = f"{name} is not installed"
        else:
            if tuple(map(int, version.split(".")[:2])) < first:
                continue
            reason = f"{name} {version} has no Flax modules"
        raise UserError(
            f"generator.backend=diffusers: {reason}; install the extra: pip install"
            " 'oal-jax[diffusers]'"
        )


def _is_no_notice(record: logging.LogRecord) -> bool:
    return "classes are deprecated and will be removed" not in record.getMessage()


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Silences both libraries during their import, and their Flax modules' notices after it."""
    roots = [logging.getLogger(name) for name in _WITHOUT_FLAX]
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


@functools.cache
def libraries() -> SimpleNamespace:
    """Their classes, imported on first use."""
    check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.get_logger()  # sets the library's own level, once
    with _without_notices():
        from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel
        from diffusers.models.vae_flax import FlaxAutoencoderKL
        from transformers import CLIPTextConfig
        from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModule
    return SimpleNamespace(
        UNet=FlaxUNet2DConditionModel,
        Autoencoder=FlaxAutoencoderKL,
        TextEncoder=FlaxCLIPTextModule,
        TextConfig=CLIPTextConfig,
    )


def _own_arithmetic():
    # The libraries rely on implicit rank promotion, which a strict caller may have forbidden.
    return jax.numpy_rank_promotion("allow")


def _same_fields(module: nn.Module, base: type[nn.Module]) -> dict[str, Any]:
    """The fields that a class of ours declares, for the constructor of theirs."""
    return {name: getattr(module, name) for name in base.__annotations__}


class UNet(unet.UNet):
    """`FlaxUNet2DConditionModel`, which takes channels first."""

    @nn.compact
    def __call__(self, latents: Maps, times: jax.Array, states: jax.Array) -> Maps:
        """See `unet.UNet.__call__`."""
        theirs = libraries().UNet(**_same_fields(self, unet.UNet))
        nn.share_scope(self, theirs)
        first = jnp.moveaxis(latents.astype(self.dtype), -1, 1)
        with _own_arithmetic(), nn.intercept_methods(_exact_gelu):
            out = theirs(first, jnp.asarray(times), states.astype(self.dtype))
        return jnp.moveaxis(out.sample, 1, -1)


def _exact_gelu(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    if type(context.module).__name__ != "FlaxGEGLU" or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    linear, gate = jnp.split(context.module.proj(args[0]), 2, axis=-1)
    return linear * nn.gelu(gate, approximate=False)


class Autoencoder(autoencoder.Autoencoder):
    """`FlaxAutoencoderKL`, which takes images channels first, but latents channels last."""

    def setup(self) -> None:
        """Makes their module in this one's scope."""
        self.theirs = libraries().Autoencoder(**_same_fields(self, autoencoder.Autoencoder))
        nn.share_scope(self, self.theirs)

    def encode(self, images: Maps) -> tuple[Maps, Maps]:
        """See `autoencoder.Autoencoder.encode`."""
        with _own_arithmetic():
            posterior = self.theirs.encode(jnp.moveaxis(images, -1, 1)).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents: Maps) -> Maps:
        """See `autoencoder.Autoencoder.decode`."""
        with _own_arithmetic():
            return jnp.moveaxis(self.theirs.decode(latents).sample, 1, -1)


class TextEncoder(clip_text.TextEncoder):
    """The module of `FlaxCLIPTextModel`."""

    @nn.compact
    def __call__(
        self, ids: jax.Array, mask: jax.Array | None = None, vectors: jax.Array | None = None
    ) -> jax.Array:
        """See `clip_text.TextEncoder.__call__`."""
        classes = libraries()
        config = classes.TextConfig(**self.config._asdict())
        theirs = classes.TextEncoder(config, dtype=self.dtype)
        nn.share_scope(self, theirs)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[-1])[None], ids.shape)

        def replace(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            embeddings = next_fun(*args, **kwargs)
            if context.module.name != "token_embedding" or context.method_name != "__call__":
                return embeddings
            return clip_text.replace_embeddings(embeddings, mask, vectors)

        with _own_arithmetic(), nn.intercept_methods(replace):
            return theirs(ids, jnp.ones_like(ids), positions).last_hidden_state
