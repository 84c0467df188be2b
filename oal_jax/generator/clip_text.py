"""CLIP's text transformer (arXiv 2103.00020): transformers' `CLIPTextModel`.

Stable Diffusion v1 has that of ViT-L/14, with the quick GELU; v2 has OpenCLIP's ViT-H/14 without
its last layer, with the exact GELU.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oal_jax.errors import UserError
from oal_jax.generator.layers import read_fields

States = Float[Array, "B L D"]

_normal = nn.initializers.normal(0.01)
_MODEL_TYPES = ("clip_text_model", "clip")
_ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": partial(nn.gelu, approximate=False),
}


class Config(NamedTuple):
    """Entries of `text_encoder/config.json`, with the defaults of transformers."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class TextEncoder(nn.Module):
    """Token ids to text states."""

    config: Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "B L"],
        mask: Bool[Array, "B L"] | None = None,
        vectors: Float[Array, "B D"] | None = None,
    ) -> States:
        """Last hidden states after the final layer norm.

        Padding tokens attend and are attended to, as in Stable Diffusion.

        Args:
          ids: token ids.
          mask: where the token embedding is replaced; None: nowhere.
          vectors: what replaces it, one vector a row.
        """
        return _TextModel(self.config, self.dtype, name="text_model")(ids, mask, vectors)


def make(
    config: Mapping[str, Any], dtype: Any = jnp.float32, cls: type[TextEncoder] = TextEncoder
) -> TextEncoder:
    """The encoder of a `text_encoder/config.json`; `UserError` if it is of another architecture."""
    for key, values in {"model_type": _MODEL_TYPES, "hidden_act": tuple(_ACTIVATIONS)}.items():
        if key in config and config[key] not in values:
            raise UserError(f"text encoder: {key}={config[key]!r} is not supported")
    return cls(Config(**read_fields("text encoder", config, Config._field_defaults)), dtype)


def replace_embeddings(embeddings: States, mask: Array | None, vectors: Array | None) -> States:
    """Token embeddings with the row's vector where the mask is True."""
    if mask is None:
        return embeddings
    return jnp.where(mask[:, :, None], vectors[:, None, :].astype(embeddings.dtype), embeddings)


class _TextModel(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None, vectors: Array | None) -> States:
        x = _Embeddings(self.config, self.dtype, name="embeddings")(ids, mask, vectors)
        x = _Transformer(self.config, self.dtype, name="encoder")(x)
        return _layer_norm(self, "final_layer_norm")(x)


class _Embeddings(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None, vectors: Array | None) -> States:
        width = self.config.hidden_size

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, width, dtype=self.dtype, embedding_init=_normal, name=name)

        tokens = table(self.config.vocab_size, "token_embedding")(ids)
        positions = table(self.config.max_position_embeddings, "position_embedding")
        tokens = replace_embeddings(tokens, mask, vectors)
        return tokens + positions(jnp.arange(ids.shape[1]))[None]


class _Transformer(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x: States) -> States:
        return _Layers(self.config, self.dtype, name="layers")(x)


class _Layers(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x: States) -> States:
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, self.dtype, name=str(i))(x)
        return x


class _Layer(nn.Module):
    """Attention to the tokens before, then an MLP, each after a norm and beside a shortcut."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x: States) -> States:
        normalised = _layer_norm(self, "layer_norm1")(x)
        x = x + _Attention(self.config, self.dtype, name="self_attn")(normalised)
        normalised = _layer_norm(self, "layer_norm2")(x)
        return x + _MLP(self.config, self.dtype, name="mlp")(normalised)


class _Attention(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x: States) -> States:
        def heads(name: str) -> Array:
            projected = _dense(self, x.shape[-1], name)(x)
            return projected.reshape(*x.shape[:2], self.config.num_attention_heads, -1)

        parts = heads("q_proj"), heads("k_proj"), heads("v_proj")
        mixed = jax.nn.dot_product_attention(*parts, is_causal=True)
        return _dense(self, x.shape[-1], "out_proj")(mixed.reshape(x.shape))


class _MLP(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x: States) -> States:
        activation = _ACTIVATIONS[self.config.hidden_act]
        hidden = activation(_dense(self, self.config.intermediate_size, "fc1")(x))
        return _dense(self, x.shape[-1], "fc2")(hidden)


def _dense(parent: nn.Module, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=parent.dtype, kernel_init=_normal, name=name)


def _layer_norm(parent: nn.Module, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(parent.config.layer_norm_eps, parent.dtype, name=name)
