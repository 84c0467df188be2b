"""Text states with an outlier in place of the class word's token embedding.

As in DREAM-OOD (arXiv 2309.13415) and OAL (arXiv 2406.16525), the vector enters at the *input* of
the text encoder, before the position embedding and the transformer. The reference implementation
overwrites a row of the embedding table, encodes, and restores the row, so all prompts of a batch
share one vector. Here the table is not changed: the output of the embedding layer is replaced where
a mask is True. So every row of a batch has its own vector, and the function jits.
"""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from oal_jax.errors import UserError
from oal_jax.generator import stable_diffusion as stable
from oal_jax.generator.stable_diffusion import Params, StableDiffusion

PROMPT = "A high-quality image of the {}"
INJECTION_MODES = ("first_piece", "all_pieces")
_MARKED = re.compile(r"\[([^\[\]]+)\]")
# Class names that are no words: WordNet's numbers, and those of data sets without names.
_NO_WORDS = re.compile(r"n\d{8}|class \d+")


def prompt_word(name: str) -> tuple[str, str]:
    """The word of a class in its prompt, and the part of it that the outlier replaces.

    Underscores are spaces: "pickup_truck" becomes "pickup truck", all of it replaced. Brackets mark
    a part: "[kite] bird" prompts for a kite bird and replaces the kite. So the reference's suffixes
    against ambiguous words ("kite bird", "chest box", "tick bite") and its shorter labels ("pickup
    [truck]") can be given as class words. Its second sentence for "nail" is left out.

    Raises:
      UserError: the name is empty, or a number such as WordNet's.
    """
    words = " ".join(name.replace("_", " ").split())
    marked = _MARKED.search(words)
    prompt = _MARKED.sub(r"\1", words)
    if not prompt or _NO_WORDS.fullmatch(prompt):
        raise UserError(
            f"class name {name!r} is no word for a prompt; give generator.class_words, one word per"
            " class in the order of the labels"
        )
    return prompt, marked[1].strip() if marked else prompt


def _piece_ids(sd: StableDiffusion, word: str) -> list[int]:
    """Token ids of a word, without the begin and end marks."""
    ids = sd.tokenizer.pieces(word)
    if not ids:
        raise UserError(f"class name {word!r} has no tokens")
    return ids


def injection_mask(
    sd: StableDiffusion,
    ids: Int[np.ndarray, "B L"],
    words: Sequence[str],
    mode: str = "first_piece",
) -> Bool[np.ndarray, "B L"]:
    """The positions of tokenized prompts that belong to the class word.

    Args:
      sd: the model, for its tokenizer.
      ids: token ids from `stable_diffusion.tokenize`.
      words: class name of each prompt, for `prompt_word`.
      mode: "first_piece", as in the reference: every position in the prompt with the token id of
        the word's first piece. "all_pieces": all pieces of the word, where they stand in a row.

    Returns:
      True where the embedding is to be replaced; never at begin marks, end marks and padding.

    Raises:
      UserError: an unknown mode, or a prompt without its class word. (Then nothing would be
        injected: the reference's CIFAR-10 latents came about that way.)
    """
    if mode not in INJECTION_MODES:
        raise UserError(f"injection mode {mode!r} is none of {', '.join(INJECTION_MODES)}")
    mask = np.zeros(ids.shape, bool)
    for row, (prompt, word) in enumerate(zip(ids, words, strict=True)):
        pieces = _piece_ids(sd, prompt_word(word)[1])
        if mode == "first_piece":
            mask[row] = prompt == pieces[0]
        else:
            windows = np.lib.stride_tricks.sliding_window_view(prompt, len(pieces))
            for start in np.flatnonzero((windows == pieces).all(axis=1)):
                mask[row, start : start + len(pieces)] = True
        if not mask[row].any():
            raise UserError(f"class word {word!r} does not occur in its prompt")
    return mask


def encode_with_injection(
    sd: StableDiffusion,
    params: Params,
    ids: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    vectors: Float[Array, "B D"],
) -> Float[Array, "B L D"]:
    """Text states of prompts whose masked token embeddings are replaced; jits and vmaps.

    Args:
      sd: the model.
      params: its parameters; only "text_encoder" is used.
      ids: token ids.
      mask: from `injection_mask`.
      vectors: one outlier per prompt, of the text encoder's width, with the norm of a token
        embedding.

    Returns:
      Last hidden states after the final layer norm. A row whose mask is all False is encoded as it
      is.
    """
    if vectors.shape[-1] != sd.text_width:
        raise UserError(
            f"outliers have {vectors.shape[-1]} dimensions,"
            f" the generator's token embeddings {sd.text_width}"
        )

    variables = {"params": params["text_encoder"]}
    return sd.text_encoder.apply(variables, ids, mask, vectors)


def token_embeddings(
    sd: StableDiffusion, params: Params, words: Sequence[str]
) -> Float[Array, "K D"]:
    """The embedding of each class word's first piece.

    OAL multiplies a class's unit outliers by the norm of this embedding.
    """
    rows = np.asarray([_piece_ids(sd, prompt_word(word)[1])[0] for word in words])
    table = params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return jnp.asarray(table)[rows].astype(jnp.float32)


def class_prompts(class_names: Sequence[str]) -> list[str]:
    """`PROMPT` for each class."""
    return [PROMPT.format(prompt_word(name)[0]) for name in class_names]


def class_tokens(
    sd: StableDiffusion,
    class_names: Sequence[str],
    mode: str = "first_piece",
) -> tuple[Int[np.ndarray, "K L"], Bool[np.ndarray, "K L"], Int[np.ndarray, "1 L"]]:
    """Token ids and injection masks of the class prompts, and the ids of the empty prompt.

    A batch with labels `y` is conditioned by `ids[y]`, `mask[y]` and one outlier per row.
    """
    ids = stable.tokenize(sd, class_prompts(class_names))
    return ids, injection_mask(sd, ids, class_names, mode), stable.tokenize(sd, [""])
