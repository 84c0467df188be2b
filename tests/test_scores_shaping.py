"""Scores that clip, prune or scale features, against float64 NumPy that works on one input."""

import numpy as np
import pytest
from scipy.special import logsumexp

from oal_jax import scores
from oal_jax.errors import UserError
from oal_jax.scores import Head, Outputs

CLASSES, WIDTH = 5, 40
NAMES = ("react", "ash_p", "ash_b", "ash_s", "scale", "dice")


def _head(classes=CLASSES):
    rng = np.random.default_rng(9)
    kernel = rng.normal(size=(WIDTH, classes)) / np.sqrt(WIDTH)
    return Head(kernel.astype(np.float32), rng.normal(size=classes).astype(np.float32))


def _outputs(n=50, seed=0, head=None):
    """Sparse features as after a ReLU."""
    head = head or _head()
    features = np.maximum(np.random.default_rng(seed).normal(size=(n, WIDTH)) + 0.3, 0)
    features = features.astype(np.float32)
    return Outputs(features @ head.kernel + head.bias[None], features)


def _values(name, outputs, train=None, head=None, **params):
    score = scores.make(name, **params)
    train = _outputs(seed=7, head=head) if train is None else train
    state = scores.fit(score, train, np.zeros(len(train.logits), int), head or _head())
    return scores.apply(score, state, outputs)


def _energies(features, head):
    kernel, bias = (x.astype(np.float64) for x in head)
    return np.array([-logsumexp(f @ kernel + bias) for f in features])


def _prune(f, percentile):
    count = max(len(f) - int(np.round(len(f) * percentile / 100)), 1)
    out = np.zeros_like(f)
    best = np.argsort(-f)[:count]
    out[best] = f[best]
    return out


def _ash_b(f, p):
    pruned = _prune(f, p)
    return np.where(pruned > 0, f.sum() / (pruned > 0).sum(), 0)


SHAPES = {
    "ash_p": _prune,
    "ash_b": _ash_b,
    "ash_s": lambda f, p: _prune(f, p) * np.exp(f.sum() / _prune(f, p).sum()),
    "scale": lambda f, p: f * np.exp(f.sum() / _prune(f, p).sum()),
}


@pytest.mark.parametrize("percentile", [0.0, 85.0])
@pytest.mark.parametrize("name", SHAPES)
def test_shaping_is_the_formula(name, percentile):
    outputs = _outputs()
    shaped = [SHAPES[name](f, percentile) for f in outputs.features.astype(np.float64)]
    values = _values(name, outputs, percentile=percentile)
    np.testing.assert_allclose(values, _energies(shaped, _head()), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "percentile"), [("ash_p", 90), ("ash_b", 90), ("scale", 85)])
def test_default_percentiles(name, percentile):
    outputs = _outputs()
    default = _values(name, outputs)
    np.testing.assert_array_equal(default, _values(name, outputs, percentile=float(percentile)))


@pytest.mark.parametrize("percentile", [50.0, 99.0])
def test_react_is_the_formula(percentile):
    train, outputs = _outputs(seed=7), _outputs()
    threshold = np.sort(train.features.ravel())[int(percentile / 100 * (train.features.size - 1))]
    values = _values("react", outputs, train, percentile=percentile)
    clipped = np.minimum(outputs.features, threshold)
    # The percentile lies between two order statistics; the lower one is what we took here.
    np.testing.assert_allclose(values, _energies(clipped, _head()), atol=2e-2)
    exact = np.minimum(outputs.features, np.percentile(train.features.astype(float), percentile))
    np.testing.assert_allclose(values, _energies(exact, _head()), rtol=1e-5, atol=1e-6)
    assert scores.make("react").fit_on == "train"


@pytest.mark.parametrize("percentile", [0.0, 90.0])
def test_dice_is_the_formula(percentile):
    train, outputs, head = _outputs(seed=7), _outputs(), _head()
    contribution = train.features.astype(np.float64).mean(axis=0)[:, None] * head.kernel
    order = np.argsort(contribution, axis=None)
    # The percentile lies at 0-based rank p (size - 1); the weights above it stay.
    dropped = int(np.floor(percentile / 100 * (order.size - 1))) + 1
    kernel = head.kernel.ravel().copy()
    kernel[order[:dropped]] = 0
    values = _values("dice", outputs, train, percentile=percentile)
    sparse = Head(kernel.reshape(head.kernel.shape), head.bias)
    np.testing.assert_allclose(values, _energies(outputs.features, sparse), rtol=1e-5, atol=1e-6)


def test_pruning_does_not_depend_on_the_order_of_equal_features():
    head = _head()
    features = np.zeros((1, WIDTH), np.float32)
    features[0, :20] = 1  # 20 equal ones, of which 90 % pruned would keep 4
    order = np.random.default_rng(1).permutation(WIDTH)
    shuffled = Head(head.kernel[order], head.bias)
    for name in ("ash_p", "ash_b", "ash_s", "scale"):
        values = [
            _values(name, Outputs(f @ h.kernel + h.bias[None], f), head=h)
            for f, h in ((features, head), (features[:, order], shuffled))
        ]
        np.testing.assert_allclose(*values, rtol=1e-5)
    # One active feature where four may be kept: ash_b switches none on.
    features[0, 1:] = 0
    values = _values("ash_b", Outputs(features @ head.kernel + head.bias[None], features))
    np.testing.assert_allclose(values, _energies(features, head), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dead_features_leave_the_bias(name):
    head = _head()
    dead = Outputs(np.tile(head.bias[None], (4, 1)), np.zeros((4, WIDTH), np.float32))
    expected = -logsumexp(head.bias.astype(np.float64))
    np.testing.assert_allclose(_values(name, dead), expected, rtol=1e-6)
    np.testing.assert_allclose(_values(name, dead, train=dead), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_class_and_one_feature(name):
    head = _head(classes=1)
    values = _values(name, _outputs(head=head), head=head)
    assert np.isfinite(values).all() and len(np.unique(values)) > 10
    narrow = Head(np.ones((1, 2), np.float32), np.zeros(2, np.float32))
    features = np.float32([[0.0], [1.0], [2.0]])
    outputs = Outputs(features @ narrow.kernel, features)
    assert np.isfinite(_values(name, outputs, outputs, narrow)).all()


@pytest.mark.parametrize("name", ["ash_s", "scale"])
def test_factors_stay_finite(name):
    head = _head()
    features = np.ones((3, WIDTH), np.float32)  # the ratio of the sums is 40 at its largest
    features[1, :20] = -1  # a vanishing sum
    features[2] = -1e-20
    features[2, 0] = 1e-30
    outputs = Outputs(features @ head.kernel + head.bias[None], features)
    values = _values(name, outputs, percentile=99.0)
    assert np.isfinite(values).all()
    if name == "scale":
        shaped = SHAPES[name](features[0].astype(float), 99.0)
        np.testing.assert_allclose(values[0], _energies([shaped], head)[0], rtol=1e-5)


@pytest.mark.parametrize("percentile", [-1.0, 100.0, float("nan")])
@pytest.mark.parametrize("name", NAMES)
def test_mistakes(name, percentile):
    with pytest.raises(UserError, match=f"{name}: percentile"):
        scores.make(name, percentile=percentile)
    with pytest.raises(UserError, match=f"{name} .*head"):
        scores.fit(scores.make(name), _outputs(), np.zeros(50, int))
