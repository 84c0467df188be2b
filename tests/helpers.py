"""What several test modules share: a small classifier, random variables, and comparisons."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oal_jax.errors import UserError

CLASSES = 3


class Net(nn.Module):
    """The smallest classifier with what the methods rely on: batch statistics and a head `fc`."""

    feature_width: int = 5
    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, images, train=False, statistics=None):
        x = nn.Conv(self.feature_width, (3, 3), use_bias=False, name="conv")(images)
        mask = None if statistics is None else statistics[:, None, None, None]
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x, mask=mask)
        features = jnp.mean(nn.relu(x), axis=(1, 2))
        return nn.Dense(self.num_classes, name="fc")(features), features


def numpy_net(params, images, others, shared_statistics=False):
    """(logits, features) of images and of others in training mode, in float64.

    Batch statistics are those of `images`, or of both kinds.
    """
    student = jax.tree.map(np.asarray, params["student"])
    both = np.concatenate([images, others]).astype(np.float64)
    padded = np.pad(both, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    maps = np.einsum("nhwcij,ijco->nhwo", windows, student["conv"]["kernel"])
    normalised_by = maps if shared_statistics else maps[: len(images)]
    mean, variance = (f(normalised_by, axis=(0, 1, 2)) for f in (np.mean, np.var))
    x = (maps - mean) / np.sqrt(variance + 1e-5) * student["bn"]["scale"] + student["bn"]["bias"]
    features = np.maximum(x, 0).mean((1, 2))
    logits = features @ student["fc"]["kernel"] + student["fc"]["bias"]
    count = len(images)
    return (logits[:count], features[:count]), (logits[count:], features[count:])


def numpy_cross_entropy(logits, labels):
    """Mean cross-entropy in float64."""
    z = np.asarray(logits, np.float64)
    return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels])


def numpy_mask(scores, density):
    """Mask of the largest |score|, by a sort."""
    order = np.argsort(np.abs(scores).ravel(), kind="stable")
    mask = np.ones(scores.size, bool)
    mask[order[: int((1 - density) * scores.size)]] = False
    return mask.reshape(scores.shape)


def unit(x):
    """Rows of unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def shapes(module, *inputs, **options):
    """Shapes of a module's variables. Computes nothing."""
    return jax.eval_shape(lambda k: module.init(k, *inputs, **options), jax.random.key(0))


def random_like(tree, seed=0):
    """NumPy's random variables of the same shapes: none is 0 or 1, and variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.exp(0.3 * values) if name in ("var", "scale") else 0.3 * values

    return jax.tree_util.tree_map_with_path(draw, tree)


def standard_like(tree):
    """NumPy's random variables of the same shapes and unit variance, whatever JAX draws."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        values = np.exp(values) if path[-1].key in ("var", "scale") else values
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def random_variables(module, *inputs, **options):
    """Random variables of a module, without a compilation of its initialisers."""
    return random_like(shapes(module, *inputs, **options))


def norm(tree):
    """Joint L2 norm."""
    return float(optax.tree.norm(tree))


def difference(one, other):
    """Leaf by leaf."""
    return jax.tree.map(np.subtract, one, other)


def form(tree):
    """Shape and type of every leaf."""
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_trees_close(one, other, rtol=1e-4, atol=1e-4):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, err_msg=message, rtol=rtol, atol=atol)


def changed(config, values):
    """The config, its fields "a.b" set in place."""
    for path, value in values.items():
        *parents, name = path.split(".")
        setattr(functools.reduce(getattr, parents, config), name, value)
    return config


def refusal(function, *arguments):
    """The line of the `UserError` that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
