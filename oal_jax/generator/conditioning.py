"""Text states with an outlier in place of the class word's token embedding.

As in DREAM-OOD (arXiv 2309.13415) and OAL (arXiv 2406.16525), the vector enters at the *input* of
the text encoder, before the position embedding and the transformer. The reference implementation
overwrites a row of the embedding table, encodes, and restores the row, so all prompts of a batch
share one vector. Here the table stays as it is and the output of the embedding layer is replaced
where a mask says so: every row of a batch has its own vector, and the function jits.
"""

import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from oal_jax.errors import UserError
from oal_jax.generator import flax_models
from oal_jax.generator import stable_diffusion as stable
from oal_jax.generator.stable_diffusion import Params, StableDiffusion

INJECTION_MODES = ("first_piece", "all_pieces")
_MARKED = re.compile(r"\[([^\[\]]+)\]")
# What data sets call their classes where they have no words for them: WordNet's numbers, or ours.
_NO_WORDS = re.compile(r"n\d{8}|class \d+")


def prompt_word(name: str) -> tuple[str, str]:
    """What a class is called in a prompt, and the part of it that the outlier takes the place of.

    Data sets join words with underscores: "pickup_truck" is "pickup truck", all of it replaced. A
    pair of brackets marks a part: "[kite] bird" prompts for a kite bird and replaces the kite.
    (So the reference's suffixes against ambiguous words, "kite bird", "chest box", "tick bite", can
    be given as class words, and its shorter labels too: it prompts for a "pickup truck" and
    replaces "truck". It has neither for CIFAR-10, where its labels are those of CIFAR-100, nor is
    its second sentence, glued to "nail" without a space, of any use; both are left out.)

    Raises:
        UserError: it is no word at all: empty, or a number such as WordNet's.
    """
    words = " ".join(name.replace("_", " ").split())
    marked = _MARKED.search(words)
    prompt = _MARKED.sub(r"\1", words)
    if not prompt or _NO_WORDS.fullmatch(prompt):
        raise UserError(
            f"class name {name!r} is no word that a prompt could name; give generator.class_words,"
            " one a class in the order of the labels"
        )
    return prompt, marked[1].strip() if marked else prompt


def _piece_ids(sd: StableDiffusion, word: str) -> list[int]:
    """Token ids of a word, without the begin and end marks."""
    ids = sd.tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"class name {word!r} has no tokens")
    return list(ids)


def injection_mask(
    sd: StableDiffusion,
    ids: Int[np.ndarray, "B L"],
    words: Sequence[str],
    mode: str = "first_piece",
) -> Bool[np.ndarray, "B L"]:
    """Where the outlier goes: which positions of tokenized prompts belong to the class word.

    Args:
        sd: the model, for its tokenizer.
        ids: token ids from `stable_diffusion.tokenize`.
        words: the class word of each prompt, as `prompt_word` takes it.
        mode: "first_piece", as the reference: every position with the token id of the word's first
            piece, wherever it stands in the prompt. "all_pieces": the whole of the word, and only
            where all its pieces stand in a row.

    Returns:
        True where the embedding is to be replaced. Begin and end marks and padding are never part
        of a word.

    Raises:
        UserError: an unknown mode, or a prompt without its class word (nothing would be injected:
            the reference's CIFAR-10 latents came about that way).
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
        vectors: one outlier a prompt, of the text encoder's width and at the norm of a token
            embedding.

    Returns:
        Last hidden states after the final layer norm. A row with an all-false mask is encoded
        unchanged.
    """
    if vectors.shape[-1] != sd.text_width:
        raise UserError(
            f"outliers have {vectors.shape[-1]} dimensions,"
            f" the generator's token embeddings {sd.text_width}"
        )

    def replace(next_fun: Callable, args: tuple, kwargs: dict, context):
        embeddings = next_fun(*args, **kwargs)
        if context.module.name != "token_embedding" or context.method_name != "__call__":
            return embeddings
        return jnp.where(mask[:, :, None], vectors[:, None, :].astype(embeddings.dtype), embeddings)

    with nn.intercept_methods(replace):
        return flax_models.apply_text_encoder(sd.text_encoder, params["text_encoder"], ids)


def token_embeddings(
    sd: StableDiffusion, params: Params, words: Sequence[str]
) -> Float[Array, "K D"]:
    """The rows of the embedding table that `first_piece` replaces: one for each class word.

    Their norms are the scale at which outliers are injected (OAL multiplies each unit outlier by
    them).
    """
    rows = np.asarray([_piece_ids(sd, prompt_word(word)[1])[0] for word in words])
    table = params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return jnp.asarray(table)[rows].astype(jnp.float32)


def class_prompts(class_names: Sequence[str], template: str) -> list[str]:
    """One prompt a class; `template` has one `{}`, for example "A high-quality image of the {}"."""
    return [template.format(prompt_word(name)[0]) for name in class_names]


def class_tokens(
    sd: StableDiffusion,
    class_names: Sequence[str],
    template: str,
    mode: str = "first_piece",
) -> tuple[Int[np.ndarray, "K L"], Bool[np.ndarray, "K L"], Int[np.ndarray, "1 L"]]:
    """Token ids and injection masks of the class prompts, and the ids of the empty prompt.

    A batch with labels `y` is then conditioned by `ids[y]`, `mask[y]` and one outlier a row.
    """
    ids = stable.tokenize(sd, class_prompts(class_names, template))
    return ids, injection_mask(sd, ids, class_names, mode), stable.tokenize(sd, [""])
