"""Detectors of models that this package knows nothing of, on the bundled images."""

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from scipy.special import logsumexp

import oal_jax
from oal_jax.data import sources
from oal_jax.errors import UserError
from oal_jax.evaluation.metrics import auroc

WIDTH, CLASSES = 48, 8


def features_of(images, matrix):
    """A fixed random layer: enough for a classifier that is fitted in closed form."""
    x = images.reshape(images.shape[0], -1) - 0.3
    return jax.nn.relu(x @ matrix)


class Linen(nn.Module):
    """Gives (logits, features)."""

    @nn.compact
    def __call__(self, images):
        features = features_of(images, self.param("matrix", nn.initializers.zeros, (784, WIDTH)))
        return nn.Dense(CLASSES, name="head")(features), features


class Nnx(nnx.Module):
    """Gives a dict, a feature map in it."""

    def __init__(self, own):
        self.matrix = nnx.Param(jnp.asarray(own.matrix))
        self.kernel = nnx.Param(jnp.asarray(own.head[0]))
        self.bias = nnx.Param(jnp.asarray(own.head[1]))

    def __call__(self, images):
        features = features_of(images, self.matrix[...])
        logits = features @ self.kernel[...] + self.bias[...][None, :]
        return {"logits": logits, "features": features, "maps": [images]}


@pytest.fixture(scope="module")
def own():
    """Images, and a classifier with one random and one ridge-regressed layer."""
    train = sources.load("bundled", "fashion", "train", limit=1500)
    validation = sources.load("bundled", "fashion", "validation", limit=400)
    digits = sources.load("bundled", "mnist", "test", limit=200)
    matrix = np.random.default_rng(0).normal(size=(784, WIDTH)).astype(np.float32) / 10
    features = np.asarray(features_of(train.images / np.float32(255), matrix))
    design = np.c_[features, np.ones(len(features))]
    targets = 6 * np.eye(CLASSES)[train.labels]
    solved = np.linalg.solve(design.T @ design + np.eye(WIDTH + 1), design.T @ targets)
    head = solved[:-1].astype(np.float32), solved[-1].astype(np.float32)
    return SimpleNamespace(
        matrix=matrix,
        head=head,
        train=(train.images, train.labels),
        validation=(validation.images, validation.labels),
        digits=digits.images,
        names=train.class_names,
    )


def function_of(own):
    def forward(images):
        features = features_of(images, own.matrix)
        return features @ own.head[0] + own.head[1][None, :], features

    return jax.jit(forward)


def linen_of(own):
    kernel, bias = own.head
    variables = {"params": {"matrix": own.matrix, "head": {"kernel": kernel, "bias": bias}}}
    return Partial(Linen().apply, variables)


MODELS = {"function": function_of, "linen": linen_of, "nnx": Nnx}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("score", ["mahalanobis", "odin"])
def test_every_kind_of_model(own, kind, score):
    detector = oal_jax.calibrate(
        MODELS[kind](own),
        train=own.train,
        validation=own.validation,
        score=score,
        keep_id=0.9,
        class_names=own.names,
        batch_size=512,
    )
    result = detector(own.validation[0])
    assert abs(result.is_ood.mean() - 0.1) < 1.01 / 400  # as was asked for
    assert (result.label == own.validation[1]).mean() > 0.7  # guessing has 0.125
    assert result.class_names[0] == own.names[result.label[0]]
    assert auroc(result.ood_score, detector(own.digits).ood_score) > 0.7


def test_the_energy_is_that_of_the_logits(own):
    detector = oal_jax.calibrate(function_of(own), own.train, own.validation, keep_id=0.8)
    images = own.digits[:50]
    logits, _ = function_of(own)(images / np.float32(255))
    energy = -logsumexp(np.float64(logits), axis=1)
    np.testing.assert_allclose(detector(images).ood_score, energy, rtol=1e-5)
    np.testing.assert_array_equal(
        detector(images).is_ood, detector(images).ood_score > detector.threshold
    )
    floats = [(x / np.float32(255), y) for x, y in (own.train, own.validation)]
    same = oal_jax.calibrate(function_of(own), *floats, keep_id=0.8)
    np.testing.assert_allclose(same.threshold, detector.threshold, rtol=1e-5)


def test_parameters_reach_the_score(own):
    calibrate = partial(oal_jax.calibrate, function_of(own), own.train, own.validation, "knn")
    near, far = calibrate(params={"k": 1}), calibrate(params={"k": 100})
    assert near.params == {"k": 1} and near.threshold < far.threshold
    with pytest.raises(UserError, match="score 'knn' has no parameter 'kk'; did you mean 'k'"):
        calibrate(params={"kk": 1})


def test_a_score_that_needs_the_head(own):
    calibrate = partial(oal_jax.calibrate, function_of(own), own.train, own.validation, "vim")
    with pytest.raises(UserError, match="vim needs the last linear layer; give head=Head"):
        calibrate()
    assert np.isfinite(calibrate(head=own.head).threshold)


def test_a_model_in_training_mode_is_refused(own):
    def normalised_by_the_batch(images):
        features = features_of(images, own.matrix)
        return (features - features.mean(0, keepdims=True)) @ own.head[0]

    def with_dropout(images):
        features = features_of(images, own.matrix)
        kept = jax.random.bernoulli(jax.random.key(0), 0.5, features.shape)
        return (features * kept) @ own.head[0]

    for model in (normalised_by_the_batch, with_dropout):
        with pytest.raises(UserError, match="change with the rest of the batch.*evaluation mode"):
            oal_jax.calibrate(model, own.train, own.validation)


RETURNS = {
    "no array": (lambda x: "cat", "forward's logits are a str, not an array; return logits"),
    "none": (lambda x: None, "forward returned no logits; return logits, "),
    "four": (lambda x: (x, x, x, x), "forward returned 4 values; return logits"),
    "images": (lambda x: x, r"logits have shape \(.*\) for .* images, not \(.*, width\)"),
    "a sum": (lambda x: x.sum(), r"logits have shape \(\) for"),
    "a name": (lambda x: {"logit": x}, "a dict with 'logit'; nearest: 'logits'"),
    "features": (lambda x: (x[:, 0, :, 0], x), r"forward's features have shape"),
    "maps": (lambda x: (x[:, 0, :, 0], None, [x[0]]), r"forward's maps\[0\] have shape"),
    "nan": (lambda x: x[:, 0, :8, 0] + jnp.nan, "the logits of ID train have NaN"),
    "few classes": (lambda x: x[:, 0, :3, 0], "labels are 0 to 7, but the model gives 3 logits"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_else_a_model_returns_is_told(own, name):
    model, said = RETURNS[name]
    small = own.train[0][:40], own.train[1][:40]
    with pytest.raises(UserError, match=said):
        oal_jax.calibrate(model, small, own.validation)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forward": 3}, "forward must be a function of images, is a int"),
        ({"train": 3}, r"train must be \(images, labels\)"),
        ({"train": (np.zeros((4, 28, 28), np.uint8), [0] * 4)}, "add|have shape"),
        ({"train": (np.zeros((4, 28, 28, 1), np.uint8), [0] * 3)}, "labels of train are int64"),
        ({"train": (np.zeros((0, 28, 28, 1), np.uint8), [])}, "train has no images"),
        ({"validation": (np.zeros((4, 9, 9, 1), np.uint8), [0] * 4)}, "not .n, 28, 28, 1."),
        ({"score": "enrgy"}, "did you mean 'energy'"),
        ({"score": "mahalanobis", "forward": lambda x: x[:, 0, :8, 0]}, "features .* not given"),
        ({"keep_id": 2}, "keep_id must lie between 0 and 1"),
        ({"class_names": ["a", "b"]}, "2 class_names for a model of 8 logits"),
    ],
)
def test_wrong_arguments_are_told(own, changes, said):
    usual = {"forward": function_of(own), "train": own.train, "validation": own.validation}
    with pytest.raises(UserError, match=said):
        oal_jax.calibrate(**(usual | changes))
