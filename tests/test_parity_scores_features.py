"""Scores from feature statistics against the detectors of pytorch-ood.

Logits, features and weights are the same; where a definition differs, the test says by how much.
"""

import jax
import numpy as np
import pytest

from oal_jax import scores
from oal_jax.scores import Head, Outputs
from oal_jax.scores.outputs import summarise

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
detector = pytest.importorskip("pytorch_ood.detector")

N, D, C = 3000, 48, 6
RTOL = 1e-4


MEANS = 2 * np.random.default_rng(0).normal(size=(C, D))
# Units of many sizes: where two eigenvalues are nearly equal, float32 cannot tell the subspace.
SIZES = 0.93 ** np.arange(D)


def _data(n, seed, spread):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % C
    features = np.maximum(MEANS[labels] + spread * rng.normal(size=(n, D)), 0) + 0.1
    return (SIZES * features).astype(np.float32), labels


KERNEL = (np.maximum(MEANS, 0) / SIZES / D).T.astype(np.float32)
KERNEL -= KERNEL.mean(axis=1, keepdims=True)
BIAS = 0.1 * np.random.default_rng(1).normal(size=C).astype(np.float32)
WEIGHT, OFFSET = torch.from_numpy(KERNEL.T.copy()), torch.from_numpy(BIAS)
FEATURES, LABELS = _data(N, 2, 1.0)
QUERIES, _ = _data(400, 3, 2.0)


def _head(z):
    return z @ WEIGHT.T + OFFSET


def _logits(features):
    return _head(torch.from_numpy(features)).numpy()


def _theirs(model):
    model.fit_features(torch.from_numpy(FEATURES), torch.from_numpy(LABELS))
    return model.predict_features(torch.from_numpy(QUERIES)).numpy()


def _ours(name, **params):
    score = scores.make(name, **params)
    train, queries = (Outputs(_logits(x), x) for x in (FEATURES, QUERIES))
    state = scores.fit(score, train, LABELS, Head(KERNEL, BIAS))
    return scores.apply(score, state, queries)


@pytest.mark.parametrize("k", [1, 50, 1000])
def test_knn(k):
    np.testing.assert_allclose(_ours("knn", k=k), _theirs(detector.KNN(None, k=k)), rtol=RTOL)


def test_mahalanobis():
    # Half the square, and a covariance that is a sum over inputs: 1 / 2n of ours.
    theirs = 2 * N * _theirs(detector.Mahalanobis(None))
    np.testing.assert_allclose(_ours("mahalanobis"), theirs, rtol=RTOL)


def test_relative_mahalanobis():
    theirs = N * _theirs(detector.RMD(None))
    np.testing.assert_allclose(_ours("relative_mahalanobis"), theirs, rtol=RTOL, atol=1e-2)


@pytest.mark.parametrize("weights", [None, (0.25, 3.0)])
def test_mahalanobis_ensemble(weights):
    theirs = detector.MultiMahalanobis([None, None], alpha=list(weights) if weights else None)
    layers = [(x[:, :20].copy(), x) for x in (FEATURES, QUERIES)]
    theirs.fit_structured([torch.from_numpy(x) for x in layers[0]], torch.from_numpy(LABELS))
    expected = 2 * N * theirs.predict_structured([torch.from_numpy(x) for x in layers[1]]).numpy()
    score = scores.make("mahalanobis_ensemble", weights=weights)
    train, queries = (
        Outputs(_logits(x[1]), layers=tuple(x)) for x in layers
    )  # the second layer is the features
    values = scores.apply(score, scores.fit(score, train, LABELS), queries)
    np.testing.assert_allclose(values, expected, rtol=RTOL)


@pytest.mark.parametrize("dim", [4, 24, 40])
def test_vim(dim):
    theirs = _theirs(detector.ViM(None, dim, WEIGHT, OFFSET))
    # A difference of two terms, of which the smaller is about 1.
    np.testing.assert_allclose(_ours("vim", dim=dim), theirs, rtol=RTOL, atol=RTOL)


def test_she():
    np.testing.assert_allclose(_ours("she"), _theirs(detector.SHE(None, _head)), rtol=RTOL)


@pytest.mark.parametrize("k", [1, 10, 100])
def test_nnguide(k):
    theirs = _theirs(detector.NNGuide(None, _head, k=k))
    np.testing.assert_allclose(_ours("nnguide", k=k), theirs, rtol=RTOL, atol=RTOL)


def test_fdbd():
    linear = torch.nn.Linear(D, C)
    linear.load_state_dict({"weight": WEIGHT, "bias": OFFSET})
    np.testing.assert_allclose(_ours("fdbd"), _theirs(detector.fDBD(None, linear)), rtol=RTOL)


def test_gram(monkeypatch):
    """Theirs takes the ranges by label and not by prediction, and holds a random tenth out.

    So the labels here are the predictions, the draw is replaced by the order that holds out our
    tenth, and both read the same rows. Theirs adds 1e-6 to a bound before it divides by it.
    """
    rng = np.random.default_rng(4)
    shapes = ((12, 4), (20, 2))
    train, queries = (
        [np.float32(rng.uniform(0.1, top, (n, d, s, s))) for d, s in shapes]
        for n, top in ((600, 1.0), (90, 1.3))
    )
    project = np.float32(rng.normal(size=(20, C)))
    project -= project.mean(axis=0, keepdims=True)
    head = lambda x: x.mean((2, 3)) @ torch.from_numpy(project)
    logits = [head(torch.from_numpy(x[1])).numpy() for x in (train, queries)]
    labels = logits[0].argmax(axis=1)
    assert np.bincount(labels, minlength=C).min() > 0

    def order(n):
        # Theirs holds out the first int(n / 10); of those ours holds out every tenth.
        held_out = np.arange(n) % 10 == 9
        return torch.from_numpy(np.argsort(~held_out, kind="stable"))

    monkeypatch.setattr(torch, "randperm", order)
    theirs = detector.Gram(head, [lambda x: x, lambda x: x], C, num_poles_list=[1, 2, 3, 4, 5])
    monkeypatch.setattr(
        theirs, "_create_feature_list", lambda x: (head(x[1]), x) if isinstance(x, list) else None
    )

    class Maps(list):
        def to(self, device):
            return list(self)

    theirs.fit([(Maps(map(torch.from_numpy, train)), torch.from_numpy(labels))])
    expected = theirs.predict_structured(
        torch.from_numpy(logits[1]), list(map(torch.from_numpy, queries))
    ).numpy()

    score = scores.make("gram")
    ours = [
        jax.tree.map(
            np.asarray,
            summarise(z, None, [np.moveaxis(x, 1, 3) for x in maps], ("grams",)),
        )
        for z, maps in zip(logits, (train, queries), strict=True)
    ]
    values = scores.apply(score, scores.fit(score, ours[0], labels), ours[1])
    assert (expected > 0).mean() > 0.5
    # Deviations are differences of statistics that agree to 1e-6.
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4 * expected.max())
