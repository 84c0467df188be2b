"""One pass of ID images and outliers as one batch."""

import chex
import jax
import numpy as np
import pytest
from helpers import Net, numpy_net

from oal_jax.methods import student

IMAGE, NET = (6, 6, 1), Net()


@pytest.mark.parametrize(("first", "second"), [(8, 12), (5, 3), (4, 1)])
def test_two_batches_are_joined_and_separated(first, second):
    a, b = 1 + np.arange(2 * first).reshape(first, 2), -np.arange(2 * second).reshape(second, 2)
    joined = jax.jit(student.join)(a, b)
    assert joined.shape == (first + second, 2)
    parts = jax.jit(student.separate, static_argnums=1)(joined, first)
    for one, other in zip(parts, (a, b), strict=True):
        np.testing.assert_array_equal(one, other)
    groups = np.gcd(first, second)  # each device has its share of both
    shares = (np.asarray(joined)[:, 1] > 0).reshape(groups, -1).sum(axis=1)
    np.testing.assert_array_equal(shares, first // groups)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("others", [8, 5])
def test_a_joined_pass_is_a_plain_one(others, shared):
    rng = np.random.default_rng(0)
    images = [rng.uniform(size=(n, *IMAGE)).astype(np.float32) for n in (8, others)]
    images[1] = np.sqrt(images[1])  # of other statistics
    params, model_state = student.init_student(jax.random.key(5), NET, IMAGE)

    @jax.jit
    def forward(images):
        return student.forward(
            NET, params, model_state, jax.random.key(5), *images, shared_statistics=shared
        )

    *outputs, state = forward(images)
    for one, other in zip(outputs, numpy_net(params, *images, shared), strict=True):
        chex.assert_trees_all_close(tuple(one), other, atol=1e-5)
    both = np.concatenate(images)
    variables = {"params": params["student"], **model_state["student"]}
    statistics = None if shared else np.arange(len(both)) < 8
    _, plain = NET.apply(
        variables, both, train=True, statistics=statistics, mutable=["batch_stats"]
    )
    chex.assert_trees_all_close(state, plain, atol=1e-5)
