"""Attention over large maps: the same numbers, in little memory, on any devices."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oal_jax.generator import attention, create, flax_models

# The shipped UNet, narrow, with attention in its largest maps.
TINY = {"block_out_channels": [32, 32], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}

# Compiled in less time, for programs that run once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def inputs(batch, queries, keys, heads, width, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("sizes", [(2, 128, 128, 3, 8), (1, 100, 77, 2, 16), (3, 5, 200, 1, 4)])
def test_blocks_give_what_the_whole_gives(sizes):
    """Also where the last block is not full."""
    given = inputs(*sizes)
    found, expected = attention.blockwise(*given), attention.whole(*given)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_large_scores_do_not_overflow():
    query, key, value = inputs(1, 64, 64, 1, 8)
    found = attention.blockwise(200 * query, 200 * key, value)
    np.testing.assert_allclose(found, attention.whole(200 * query, 200 * key, value), atol=1e-5)


def test_blocks_in_bfloat16_are_as_close_as_the_whole():
    given = inputs(2, 128, 128, 2, 8, jnp.bfloat16)
    exact = attention.whole(*(x.astype(jnp.float32) for x in given))
    errors = [
        np.abs(np.asarray(form(*given), np.float32) - exact).max()
        for form in (attention.blockwise, attention.whole)
    ]
    assert attention.blockwise(*given).dtype == jnp.bfloat16
    assert errors[0] <= errors[1]


def test_nothing_is_as_large_as_the_scores():
    sizes = {}
    for form in (attention.blockwise, attention.whole):
        text = str(jax.make_jaxpr(form)(*inputs(2, 512, 512, 2, 8)))
        shapes = (found.split(",") for found in re.findall(r"f32\[([\d,]+)\]", text))
        sizes[form] = max(math.prod(map(int, shape)) for shape in shapes)
    assert sizes == {attention.blockwise: 2 * 64 * 512, attention.whole: 2 * 2 * 512 * 512}


def test_a_batch_over_devices_stays_there():
    mesh = Mesh(np.array(jax.devices()), "data")
    spread = NamedSharding(mesh, PartitionSpec("data"))
    given = inputs(len(jax.devices()), 128, 128, 2, 8)
    program = jax.jit(attention.blockwise, in_shardings=spread, out_shardings=spread)
    compiled = program.lower(*given).compile()
    assert "all-gather" not in compiled.as_text()
    found = compiled(*jax.device_put(given, spread))
    np.testing.assert_allclose(found, attention.whole(*given), atol=2e-6)


def test_the_unet_predicts_the_same(monkeypatch):
    """Its maps of 32 x 32 attend to themselves block by block, and to the prompt as they did."""
    unet = flax_models.make_unet(create.configs(vocabulary=9, width=32)["unet"] | TINY)
    shapes = jax.eval_shape(functools.partial(flax_models.init_unet, unet), jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)
    latents = rng.normal(size=(2, 4, 32, 32)).astype(np.float32)
    states = rng.normal(size=(2, 9, 32)).astype(np.float32)
    attended = []
    attend = attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda *given: attended.append(given[1].shape) or attend(*given)
    )

    def predict(states):
        return flax_models.apply_unet(unet, params, latents, np.array([500, 3]), states)

    found = jax.jit(predict, compiler_options=QUICK)(states)
    assert attended and {shape[1] for shape in attended} == {1024}
    monkeypatch.setattr(attention, "is_large", lambda queries, keys: False)
    expected = jax.jit(lambda states: predict(states), compiler_options=QUICK)(states)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
