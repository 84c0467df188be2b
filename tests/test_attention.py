"""Attention over large maps: the same numbers in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oal_jax.generator import attention, create
from oal_jax.generator import unet as networks

# The shipped UNet, narrow, with attention in its largest maps.
TINY = {"block_out_channels": [32, 32], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}

BLOCKWISE, WHOLE = jax.jit(attention.blockwise), jax.jit(attention.whole)


def inputs(batch, queries, keys, heads, width, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("sizes", [(2, 128, 128, 3, 8), (1, 100, 77, 2, 16), (3, 5, 200, 1, 4)])
def test_blocks_equal_the_whole(sizes):
    """Also if the last block is not full."""
    arguments = inputs(*sizes)
    expected = WHOLE(*arguments)
    np.testing.assert_allclose(BLOCKWISE(*arguments), expected, atol=2e-6)


def test_large_scores_do_not_overflow():
    query, key, value = inputs(1, 64, 64, 1, 8)
    mixed = BLOCKWISE(200 * query, 200 * key, value)
    np.testing.assert_allclose(mixed, WHOLE(200 * query, 200 * key, value), atol=1e-5)


def test_blocks_in_bfloat16_are_as_close_as_the_whole():
    arguments = inputs(2, 128, 128, 2, 8, jnp.bfloat16)
    exact = WHOLE(*(x.astype(jnp.float32) for x in arguments))
    errors = [
        np.abs(np.asarray(form(*arguments), np.float32) - exact).max()
        for form in (BLOCKWISE, WHOLE)
    ]
    assert BLOCKWISE(*arguments).dtype == jnp.bfloat16
    assert errors[0] <= errors[1]


def test_memory_does_not_grow_with_the_scores():
    """Four times the queries and keys are sixteen times the scores."""
    needed = {}
    for form in (BLOCKWISE, WHOLE):
        for count in (256, 1024):
            compiled = form.lower(*inputs(1, count, count, 2, 8)).compile()
            needed[form, count] = compiled.memory_analysis().temp_size_in_bytes
    scores = 2 * 1024 * 1024 * 4
    assert needed[WHOLE, 1024] >= scores
    assert needed[BLOCKWISE, 1024] < scores / 4
    assert needed[BLOCKWISE, 1024] < 6 * needed[BLOCKWISE, 256]


def test_the_unet_predicts_the_same(monkeypatch):
    """Maps of 32 x 32 attend to themselves block by block, and to the prompt as a whole."""
    unet = networks.make(create.configs(vocabulary=9, width=32)["unet"] | TINY)
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, 32, 32, 4)).astype(np.float32)
    states = rng.normal(size=(2, 9, 32)).astype(np.float32)
    times = np.array([500, 3])
    shapes = jax.eval_shape(unet.init, jax.random.key(0), latents, times, states)
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)
    keys, blockwise = [], attention.blockwise

    def attend(query, key, value):
        keys.append(key.shape[1])
        return blockwise(query, key, value)

    def predict(states):
        return unet.apply(params, latents, times, states)

    monkeypatch.setattr(attention, "blockwise", attend)
    prediction = jax.jit(lambda states: predict(states))(states)
    assert set(keys) == {1024}
    monkeypatch.setattr(attention, "is_large", lambda queries, keys: False)
    expected = jax.jit(lambda states: predict(states))(states)
    np.testing.assert_allclose(prediction, expected, rtol=1e-4, atol=1e-4)
