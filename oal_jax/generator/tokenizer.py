"""CLIP's tokenizer: byte pairs of lower-case words, by the library `tokenizers`."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, normalizers, pre_tokenizers

from oal_jax.errors import UserError
from oal_jax.pretrained import diffusers_directory

WORD_END = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# English suffixes, runs of letters, single digits, runs of other characters.
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer(NamedTuple):
    """The byte pairs, and the ids of the tokens around a text."""

    model: tokenizers.Tokenizer
    begin: int
    end: int
    padding: int

    def pieces(self, text: str) -> list[int]:
        """Token ids of a text, without marks."""
        # Python's lower case, which knows the final sigma, as transformers has it.
        text = unicodedata.normalize("NFC", text).lower()
        return self.model.encode(text, add_special_tokens=False).ids

    def encode(self, texts: Sequence[str], length: int) -> Int[np.ndarray, "B L"]:
        """Token ids of texts between their marks, padded to a length.

        Raises:
          UserError: a text is longer.
        """
        rows = [[self.begin, *self.pieces(text), self.end] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > length:
                raise UserError(
                    f"prompt {text!r} has {len(row)} tokens, the text encoder takes {length}"
                )
        padded = [row + [self.padding] * (length - len(row)) for row in rows]
        return np.asarray(padded, np.int32).reshape(len(rows), length)


def read(folder: Path) -> Tokenizer:
    """The tokenizer of a folder with `vocab.json` and `merges.txt`, or with `tokenizer.json`.

    Raises:
      UserError: files are missing, damaged, or not those of CLIP.
    """
    folder = Path(folder)
    vocabulary, merges, whole = (
        folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json")
    )
    try:
        if vocabulary.exists() and merges.exists():
            model = _byte_pairs(vocabulary, merges)
        elif whole.exists():
            model = tokenizers.Tokenizer.from_file(str(whole))
            model.no_padding()
            model.no_truncation()
        else:
            absent = next(path for path in (vocabulary, merges) if not path.exists())
            raise UserError(f"{absent}: no such file, and no tokenizer.json beside it")
    except UserError:
        raise
    except Exception as error:  # the library raises plain exceptions
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not a CLIP tokenizer ({reason})") from None
    marks = {"bos_token": BEGIN, "eos_token": END, "pad_token": END} | _marks(folder)
    ids = {name: model.token_to_id(token) for name, token in marks.items()}
    for name, token in marks.items():
        if ids[name] is None:
            raise UserError(f"{folder}: its {name} {token!r} is not in its vocabulary")
    model.add_special_tokens(list(dict.fromkeys(marks.values())))  # one token each within a text
    return Tokenizer(model, *(ids[name] for name in ("bos_token", "eos_token", "pad_token")))


def _byte_pairs(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    model = models.BPE.from_file(
        str(vocabulary), str(merges), unk_token=END, end_of_word_suffix=WORD_END
    )
    tokenizer = tokenizers.Tokenizer(model)
    # Spaces around Chinese characters; no control characters.
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False, lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _marks(folder: Path) -> dict[str, str]:
    """The tokens that mark begin, end and padding, as far as the folder's files name them.

    v2 pads with "!": its `special_tokens_map.json` says so and goes before `tokenizer_config.json`,
    unless that file is of the newer kind, which lists all added tokens.
    """
    contents = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        contents.append(diffusers_directory.read_json(path) if path.exists() else {})
    config, special = contents
    merged = config if "added_tokens_decoder" in config else config | special
    tokens = {name: merged.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}
