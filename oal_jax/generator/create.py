"""Tokenizer and configs of a new small Stable Diffusion.

The architecture is that of Stable Diffusion v1 (CLIP text transformer, UNet with cross-attention,
KL autoencoder) at a size that a CPU trains in minutes. Three sizes are unusual:

- `layers_per_block = 0` in the UNet leaves one residual block per level on the way up and none on
  the way down. That halves the cost of sampling, which dominates a run on CPU.
- Width 64 is the smallest that works: the UNet normalises in 32 groups, and with one channel
  per group the norm would cancel the time embedding.
- The text width is the teacher's feature width, so that an outlier of the teacher's features can
  replace a token embedding.
"""

import collections
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oal_jax.config.class_names import FASHION as FASHION_CLASSES
from oal_jax.generator.conditioning import PROMPT
from oal_jax.generator.tokenizer import BEGIN, END, WORD_END
from oal_jax.pretrained import diffusers_directory
from oal_jax.runtime import writing


def _byte_alphabet() -> list[str]:
    """One printable character per byte, as in byte-level BPE: printable bytes, then the others."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token (Sennrich et al., arXiv 1508.07909).

    Args:
      words: lower-case words of letters and digits; repeated words count.

    Returns:
      Pairs in the order of their application: the most frequent first, ties alphabetically.
    """
    counts = collections.Counter(words)
    pieces = {word: (*word[:-1], word[-1] + WORD_END) for word in counts}
    merges = []
    while True:
        pairs = collections.Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged, i = [], 0
    while i < len(parts):
        if parts[i : i + 2] == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return tuple(merged)


def write_tokenizer(folder: Path, class_names: Sequence[str], length: int) -> int:
    """Writes a CLIP tokenizer with a vocabulary for the prompt and the class names.

    It is byte-level, so any other text is encoded letter by letter. Returns the number of tokens.
    """
    texts = [PROMPT.format(""), *class_names]
    letters = "".join(c if c.isalnum() else " " for c in " ".join(texts).lower())
    merges = learn_merges(letters.split())
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(c + WORD_END for c in alphabet), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys([*tokens, BEGIN, END]))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    for name, text in {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
    }.items():
        with writing.whole_file(folder / name, "w", encoding="utf-8") as file:
            file.write(text)
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    diffusers_directory.write_json(folder / "special_tokens_map.json", special)
    diffusers_directory.write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special},
    )
    return len(tokens)


def configs(*, vocabulary: int, width: int = 128, length: int = 16) -> dict[str, dict[str, Any]]:
    """The config files of the small model, by component.

    Args:
      vocabulary: number of tokens; the last two are the begin and end marks.
      width: width of the text states, which is also that of token embeddings and outliers.
      length: tokens of a padded prompt.
    """
    text_encoder = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": length,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    unet = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [64, 64],
        "layers_per_block": 0,
        # The number of heads, which old configs call by this name.
        "attention_head_dim": 4,
        "cross_attention_dim": width,
        "norm_num_groups": 32,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "sample_size": 32,
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [16, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "act_fn": "silu",
        "scaling_factor": 1.0,
        "force_upcast": False,
    }
    return {"text_encoder": text_encoder, "unet": unet, "vae": vae}


SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def create(
    directory: Path,
    class_names: Sequence[str] = FASHION_CLASSES,
    *,
    width: int = 128,
    length: int = 16,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes the tokenizer and the configs of a small Stable Diffusion.

    `stable_diffusion.build` reads them. `diffusers_directory.save` adds weights.

    Args:
      directory: created if missing.
      class_names: each of their runs of letters and digits becomes a single token.
      width: text width, the teacher's feature width.
      length: tokens of a padded prompt.
      overrides: component name to config entries that replace the defaults.
    """
    directory = Path(directory)
    vocabulary = write_tokenizer(directory / "tokenizer", class_names, length)
    contents = configs(vocabulary=vocabulary, width=width, length=length)
    for name, values in (overrides or {}).items():
        contents[name].update(values)
    diffusers_directory.save(directory, {}, contents)
    diffusers_directory.write_json(directory / "scheduler" / "scheduler_config.json", SCHEDULER)
    diffusers_directory.write_json(directory / "model_index.json", _MODEL_INDEX)
