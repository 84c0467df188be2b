"""Accumulated gradients: microbatches add up to the whole batch, with less memory."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Net, assert_trees_close, changed, refusal

from oal_jax.config import Config
from oal_jax.methods import ce, outlier_exposure
from oal_jax.models.vit import VisionTransformer
from oal_jax.runtime.keys import at_step
from oal_jax.stages import run as pipeline
from oal_jax.training.state import (
    check_split,
    compiler_options,
    fresh_state,
    init_state,
    make_train_step,
)

IMAGE = (8, 8, 1)


class Plain(nn.Module):
    """A classifier without batch statistics: its loss is a mean over examples."""

    @nn.compact
    def __call__(self, images, train=False, statistics=None):
        features = nn.gelu(nn.Dense(5, name="hidden")(images.reshape(images.shape[0], -1)))
        return nn.Dense(3, name="fc")(features), features


class Dropped(nn.Module):
    """A classifier with batch statistics and dropout."""

    @nn.compact
    def __call__(self, images, train=False, statistics=None):
        _, features = Net(name="net")(images, train, statistics)
        features = nn.Dropout(0.5, deterministic=not train)(features)
        return nn.Dense(3, name="fc")(features), features


def batch_of(count=16):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    image = 0.3 * rng.uniform(size=(count, *IMAGE)) + labels[:, None, None, None] / 4
    batch = {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(labels, jnp.int32)}
    return batch | {"outlier_image": 1 - batch["image"]}


def outcome(method, count, unroll=True):
    """State and metrics after one step of `count` microbatches."""
    optimizer = optax.sgd(1.0)
    step = make_train_step(method, optimizer, jax.random.key(1), count, unroll)
    return jax.jit(step)(init_state(method, optimizer, jax.random.key(0)), batch_of())


MEAN_LOSSES = {
    "ce": ce.cross_entropy(Plain(), IMAGE),
    "oe": outlier_exposure.exposure(Plain(), IMAGE),
}


@functools.cache
def whole_batch(name):
    return outcome(MEAN_LOSSES[name], 1)


@pytest.mark.parametrize(
    ("name", "count", "unroll"),
    [("ce", 2, True), ("ce", 4, False), ("oe", 4, True), ("oe", 2, False)],
)
def test_microbatches_add_up_to_the_whole_batch(name, count, unroll):
    parts = outcome(MEAN_LOSSES[name], count, unroll)
    assert_trees_close(whole_batch(name), parts, rtol=1e-5, atol=1e-6)
    assert int(parts[0].step) == 1


@pytest.mark.parametrize("unroll", [True, False])
def test_statistics_and_dropout_are_each_microbatch_s_and_gradients_are_averaged(unroll):
    method, batch, key = ce.cross_entropy(Dropped(), IMAGE), batch_of(), jax.random.key(1)
    before = init_state(method, optax.sgd(1.0), jax.random.key(0))
    after, metrics = outcome(method, 2, unroll)

    @jax.jit
    def by_hand():
        model_state, grads, losses = before.model_state, [], []
        for i in range(2):
            rows = {k: v[i::2] for k, v in batch.items()}
            part_key = at_step(at_step(key, "step", 0), "microbatch", i)
            (loss, (model_state, _)), grad = jax.value_and_grad(method.loss, has_aux=True)(
                before.params, model_state, rows, before.step, part_key
            )
            grads.append(grad)
            losses.append(loss)
        mean = jax.tree.map(lambda *g: sum(g) / 2, *grads)
        params = jax.tree.map(lambda p, g: p - g, before.params, mean)
        return params, model_state, sum(losses) / 2, optax.tree.norm(mean)

    params, model_state, loss, norm = by_hand()
    assert_trees_close(after.params, params, rtol=1e-5, atol=1e-6)
    assert_trees_close(after.model_state, model_state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [True, False])
def test_microbatches_need_less_memory(unroll):
    net = VisionTransformer(3, 4, 16, 2, 2, 2.0)
    method, optimizer = ce.cross_entropy(net, IMAGE), optax.sgd(1.0)
    make = functools.partial(fresh_state, method, optimizer)
    state = jax.eval_shape(make, jax.random.key(0))
    temporary = []
    for count in (1, 2):
        step = make_train_step(method, optimizer, jax.random.key(1), count, unroll)
        compiled = jax.jit(step).lower(state, batch_of(256)).compile(compiler_options("cpu"))
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 0.7 * temporary[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.accumulate": 0}, "train.accumulate=0"),
        ({"train.accumulate": 3}, "train.batch_size=128 for example 126"),
        ({"method.outlier_batch": 6}, "method.outlier_batch=6 for example 4"),
        ({"method.oal.objective": "club"}, "method.oal.objective='club'"),
        (
            {"method.name": "npos", "method.npos.contrastive_weight": 0.1},
            "method.npos.contrastive_weight",
        ),
        ({"method.name": "woods", "train.start": "run"}, "method.name='woods'"),
        ({"method.name": "um", "train.start": "run"}, "method.name='um'"),
        ({"method.unleash": True, "train.start": "run"}, "method.unleash=True"),
    ],
)
def test_what_does_not_split_is_one_line(changes, words):
    message = refusal(pipeline.ready, changed(Config(), {"train.accumulate": 4, **changes}))
    assert all(word in message for word in words.split())


def test_a_batch_that_the_devices_cannot_share_is_one_line():
    check_split("train.batch_size", 128, 4, 8)
    message = refusal(check_split, "train.batch_size", 120, 4, 8)
    assert "train.batch_size=120" in message and "96" in message
