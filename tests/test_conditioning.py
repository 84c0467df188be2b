"""Text states with outliers in place of class words: what is replaced, and by what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_stable_diffusion import shipped, tiny

from oal_jax.errors import UserError
from oal_jax.generator import conditioning
from oal_jax.generator import stable_diffusion as stable
from oal_jax.generator.create import FASHION_CLASSES


def encode(sd, params, ids):
    return jax.jit(functools.partial(stable.encode_prompts, sd))(params, ids)


def inject(sd, params, ids, mask, vectors):
    return jax.jit(functools.partial(conditioning.encode_with_injection, sd))(
        params, ids, mask, vectors
    )


def words_of(sd, ids) -> list[str]:
    """The words of token ids, as far as they are of letters that need no bytes."""
    pieces = "".join(sd.tokenizer.model.id_to_token(int(i)) for i in ids)
    return pieces.removesuffix("</w>").split("</w>")


def test_class_words_of_the_shipped_model_are_few_pieces():
    sd, _ = shipped()
    pieces = {w: sd.tokenizer.pieces(w) for w in FASHION_CLASSES}
    assert words_of(sd, pieces.pop("t-shirt")) == ["t", "-", "shirt"]
    assert all(len(p) == 1 for p in pieces.values())


def test_injection_equals_editing_the_table():
    sd, params = shipped()
    names = FASHION_CLASSES
    ids, mask, _ = conditioning.class_tokens(sd, names)
    vectors = jax.random.normal(jax.random.key(0), (len(names), sd.text_width)) * 0.3
    injected = inject(sd, params, ids, mask, vectors)
    plain = encode(sd, params, ids)
    for row, name in enumerate(names):
        token = sd.tokenizer.pieces(name)[0]
        edited = jax.tree_util.tree_map_with_path(
            lambda p, leaf, row=row, token=token: (
                leaf.at[token].set(vectors[row]) if p[-2].key == "token_embedding" else leaf
            ),
            params,
        )
        expected = encode(sd, edited, ids[row : row + 1])[0]
        np.testing.assert_allclose(injected[row], expected, atol=1e-5)
        first = int(np.argmax(mask[row]))
        # Causal: what stands before the class word cannot change, what follows does.
        np.testing.assert_allclose(injected[row, :first], plain[row, :first], atol=1e-5)
        assert np.abs(injected[row, first:] - plain[row, first:]).max(axis=1).min() > 1e-3


def test_injection_changes_only_masked_rows():
    sd, params = tiny()
    ids, mask, _ = conditioning.class_tokens(sd, ("cat", "dog"))
    mask[1] = False
    out = inject(sd, params, ids, mask, np.ones((2, 32)))
    plain = encode(sd, params, ids)
    np.testing.assert_array_equal(out[1], plain[1])
    assert np.abs(out[0] - plain[0]).max() > 1e-3


def test_injection_maps_over_outliers():
    """Many outliers for one prompt, by vmap: each as if alone."""
    sd, params = tiny()
    ids, mask, _ = conditioning.class_tokens(sd, ("cat",))
    vectors = jax.random.normal(jax.random.key(0), (5, 32))

    def state(vector):
        return conditioning.encode_with_injection(sd, params, ids, mask, vector[None])[0]

    mapped, state = jax.jit(jax.vmap(state))(vectors), jax.jit(state)
    for vector, states in zip(vectors, mapped, strict=True):
        np.testing.assert_allclose(states, state(vector), atol=1e-5)


@pytest.mark.parametrize("mode", conditioning.INJECTION_MODES)
def test_class_names_of_several_words(mode):
    sd, _ = tiny()
    names = ("aquarium_fish", "pickup truck", "cat", "[kite] bird", "pickup [truck]")
    prompts = conditioning.class_prompts(names)
    assert prompts[0] == "A high-quality image of the aquarium fish"
    assert [p.rpartition("the ")[2] for p in prompts[1:]] == [
        *("pickup truck", "cat", "kite bird", "pickup truck")
    ]
    # Longer than the text encoder takes: this tokenizer spells most words.
    ids = sd.tokenizer.encode(prompts, 64)
    mask = conditioning.injection_mask(sd, ids, names, mode)
    words = [" ".join(words_of(sd, row[where])) for row, where in zip(ids, mask, strict=True)]
    if mode == "all_pieces":
        assert words == ["aquarium fish", "pickup truck", "cat", "kite", "truck"]
    else:
        assert all(mask.any(axis=1)) and words[2] == "cat"
        firsts = [sd.tokenizer.pieces(w)[0] for w in ("aquarium", "pickup", "kite", "truck")]
        assert [ids[row][mask[row]][0] for row in (0, 1, 3, 4)] == firsts


@pytest.mark.parametrize("name", ["", "_", "n01440764", "class 3"])
def test_class_names_without_words(name):
    with pytest.raises(UserError, match=r"generator\.class_words"):
        conditioning.prompt_word(name)


def test_injection_modes_and_faults():
    sd, params = shipped()
    ids, first, empty = conditioning.class_tokens(sd, ("t-shirt", "shirt"))
    _, all_pieces, _ = conditioning.class_tokens(sd, ("t-shirt", "shirt"), "all_pieces")
    assert first.sum(axis=1).tolist() == [1, 1] and all_pieces.sum(axis=1).tolist() == [3, 1]
    assert empty.shape == (1, ids.shape[1])
    with pytest.raises(UserError, match="'boot'"):
        conditioning.injection_mask(sd, ids, ("boot", "shirt"))
    with pytest.raises(UserError, match="'last'"):
        conditioning.injection_mask(sd, ids, ("t-shirt", "shirt"), "last")
    with pytest.raises(UserError, match="5 dimensions"):
        conditioning.encode_with_injection(sd, params, ids, first, jnp.ones((2, 5)))
    with pytest.raises(UserError, match="chimpanzee"):
        stable.tokenize(sd, ["a chimpanzee on a bicycle"])
    norms = np.linalg.norm(conditioning.token_embeddings(sd, params, ("dress", "boot")), axis=1)
    assert norms.shape == (2,) and (norms > 0).all()
