"""One pass of ID images and outliers as one batch."""

import chex
import hypothesis
import jax
import numpy as np
import pytest
from helpers import Net, numpy_net
from hypothesis import strategies as st

from oal_jax.methods import student

IMAGE, NET = (6, 6, 1), Net()
batch_sizes = st.integers(1, 24)


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(batch_sizes, batch_sizes)
def test_two_batches_are_joined_and_separated(first, second):
    a, b = np.arange(2 * first).reshape(first, 2), -np.arange(2 * second).reshape(second, 2)
    joined = student.join(a, b)
    assert joined.shape == (first + second, 2)
    for one, other in zip(student.separate(joined, first), (a, b), strict=True):
        np.testing.assert_array_equal(one, other)
    groups = np.gcd(first, second)
    mask = student.join(np.ones(first, bool), np.zeros(second, bool)).reshape(groups, -1)
    np.testing.assert_array_equal(mask.sum(axis=1), first // groups)  # each device has its share


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
