"""Scores of logits, head and images against pytorch-ood: same arrays, same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oal_jax import scores
from oal_jax.scores import Head, Outputs
from oal_jax.scores.temperature import fit_temperature

pytestmark = [
    pytest.mark.parity,
    # PyTorch's and pytorch-ood's own warnings are not ours to mend.
    pytest.mark.filterwarnings("default"),
]

CLASSES, WIDTH = 7, 40
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def detector():
    return pytest.importorskip("pytorch_ood.detector")


def _head():
    rng = np.random.default_rng(0)
    kernel = 2 * rng.normal(size=(WIDTH, CLASSES)) / np.sqrt(WIDTH)
    return Head(kernel.astype(np.float32), 0.3 * rng.normal(size=CLASSES).astype(np.float32))


def _outputs(n, seed):
    head = _head()
    features = np.maximum(np.random.default_rng(seed).normal(size=(n, WIDTH)) + 0.5, 0)
    features = (2 * features).astype(np.float32)
    logits = features @ head.kernel + head.bias[None]
    labels = (logits + np.random.default_rng(seed).gumbel(size=logits.shape)).argmax(axis=1)
    return Outputs(logits, features), labels


def _values(name, outputs, train=None, labels=None, **params):
    score = scores.make(name, **params)
    train, labels = (
        (outputs, np.zeros(len(outputs.logits), int)) if train is None else (train, labels)
    )
    return scores.apply(score, scores.fit(score, train, labels, _head()), outputs)


def _linear(torch):
    head = _head()
    linear = torch.nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(head.kernel.T.copy()))
        linear.bias.copy_(torch.tensor(head.bias))
    return linear


def _odds(negative_p):
    """Our log odds from pytorch-ood's `-max p`, increasing."""
    p = -np.asarray(negative_p, np.float64)
    return np.log((1 - p) / p) - np.log(CLASSES - 1)


def test_logits_alone(torch, detector):
    outputs, _ = _outputs(200, 1)
    z = torch.tensor(outputs.logits)
    theirs = {
        "max_logit": detector.MaxLogit(None).predict_logits(z),
        "msp": 1 + detector.MaxSoftmax(None).predict_logits(z),  # theirs is -p, ours 1 - p
        "energy": detector.EnergyBased(None).predict_logits(z),
    }
    for name, values in theirs.items():
        np.testing.assert_allclose(_values(name, outputs), values, **TOLERANCE)
    for t in (0.5, 10.0):
        values = detector.EnergyBased(None, t=t).predict_logits(z)
        np.testing.assert_allclose(_values("energy", outputs, temperature=t), values, **TOLERANCE)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("m", [2, CLASSES, 100])
def test_gen(torch, detector, gamma, m):
    outputs, _ = _outputs(200, 1)
    outputs = Outputs(outputs.logits / 3)  # no p within 1e-7 of 0 or 1, where theirs is clamped
    theirs = detector.GEN(None, gamma=gamma, M=m).predict_logits(torch.tensor(outputs.logits))
    # Theirs is the mean of the terms, the paper's and ours the sum.
    values = _values("gen", outputs, gamma=gamma, m=m) / min(m, CLASSES)
    np.testing.assert_allclose(values, theirs, **TOLERANCE)


def test_temperature_scaling(torch, detector):
    validation, labels = _outputs(1000, 2)
    outputs, _ = _outputs(200, 1)
    logits, targets = torch.tensor(validation.logits), torch.tensor(labels)
    theirs = detector.TemperatureScaling(None)
    theirs.fit_logits(logits, targets)

    def loss(t):
        return float(torch.nn.functional.cross_entropy(logits.double() / t, targets))

    ours = fit_temperature(validation.logits, labels)
    # Theirs takes small steps and stops where they no longer change the float32 loss, close by.
    assert loss(ours) < loss(float(theirs.t.detach()))
    for _ in range(20):  # each goes on from where the last one stopped
        theirs.fit_logits(logits, targets)
    assert loss(ours) <= loss(float(theirs.t.detach()))
    assert float(theirs.t.detach()) == pytest.approx(ours, rel=5e-3)

    theirs.t.data.fill_(ours)
    values = theirs.predict_logits(torch.tensor(outputs.logits).double()).detach()
    mine = _values("temperature_scaling", outputs, validation, labels)
    np.testing.assert_allclose(mine, _odds(values), **TOLERANCE)


def test_kl_matching(torch, detector):
    validation, labels = _outputs(1000, 2)
    outputs, _ = _outputs(200, 1)
    theirs = detector.KLMatching(None).fit_logits(
        torch.tensor(validation.logits), torch.tensor(labels)
    )
    values = theirs.predict_logits(torch.tensor(outputs.logits)).detach()
    np.testing.assert_allclose(
        _values("kl_matching", outputs, validation, labels), values, **TOLERANCE
    )


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_gradnorm(torch, detector, temperature):
    outputs, _ = _outputs(100, 1)
    theirs = detector.GradNorm(
        _linear(torch), param_filter=lambda name: name == "weight", temperature=temperature
    ).to("cpu")
    values = theirs.predict(torch.tensor(outputs.features))
    np.testing.assert_allclose(
        _values("gradnorm", outputs, temperature=temperature), values, **TOLERANCE
    )


@pytest.mark.parametrize("percentile", [65.0, 90.0])
def test_shaping(torch, detector, percentile):
    # Fewer zeros than are pruned: theirs would give ash_b's value to arbitrary zeros too.
    outputs, _ = _outputs(200, 1)
    linear = _linear(torch)
    maps = torch.tensor(outputs.features)[:, :, None, None]

    def head(x):
        with torch.no_grad():
            return linear(x.flatten(1))

    for variant in ("p", "b", "s"):
        theirs = detector.ASH(
            None, head, variant=f"ash-{variant}", percentile=percentile / 100
        ).predict_feature_maps(maps)
        mine = _values(f"ash_{variant}", outputs, percentile=percentile)
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)
    theirs = detector.SCALE(None, head, percentile=percentile / 100).predict_feature_maps(maps)
    mine = _values("scale", outputs, percentile=percentile)
    np.testing.assert_allclose(mine, theirs, **TOLERANCE)


def test_ash_b_with_fewer_active_features_than_are_kept(torch, detector):
    features = np.zeros((1, WIDTH), np.float32)
    features[0, 5] = 4  # 90 % pruned keeps four, of which three are 0
    head = _head()
    seen = []
    detector.ASH(
        None, lambda x: seen.append(x.flatten(1)) or x.flatten(1), variant="ash-b", percentile=0.9
    ).predict_feature_maps(torch.tensor(features)[:, :, None, None])
    shaped = seen[0].numpy()
    assert (shaped == 1).sum() == 4  # the sum in equal parts, three at features that are 0
    mine = _values("ash_b", Outputs(features @ head.kernel + head.bias[None], features))
    logits = features @ head.kernel + head.bias[None]  # ours leaves the one active feature
    np.testing.assert_allclose(mine, -np.log(np.exp(logits).sum(axis=1)), rtol=1e-5)


@pytest.mark.parametrize("percentile", [85.0, 90.0])
def test_react(torch, detector, percentile):
    train, labels = _outputs(500, 2)
    outputs, _ = _outputs(200, 1)
    linear = _linear(torch)
    theirs = detector.ReAct(None, lambda x: linear(x.flatten(1)), percentile=percentile / 100)
    theirs.fit_feature_maps(torch.tensor(train.features)[:, :, None, None], torch.tensor(labels))
    values = theirs.predict_feature_maps(torch.tensor(outputs.features)[:, :, None, None])
    mine = _values("react", outputs, train, labels, percentile=percentile)
    np.testing.assert_allclose(mine, values, **TOLERANCE)


@pytest.mark.parametrize("percentile", [10.0, 50.0, 90.0])
def test_dice(torch, detector, percentile):
    train, labels = _outputs(500, 2)
    outputs, _ = _outputs(200, 1)
    linear = _linear(torch)
    theirs = detector.DICE(None, linear.weight, linear.bias, p=percentile / 100)
    theirs.fit_features(torch.tensor(train.features), torch.tensor(labels))
    values = theirs.predict_features(torch.tensor(outputs.features))
    mine = _values("dice", outputs, train, labels, percentile=percentile)
    np.testing.assert_allclose(mine, values, **TOLERANCE)


@pytest.mark.parametrize(("tail", "alpha"), [(20, 3), (25, CLASSES)])
def test_openmax(torch, detector, tail, alpha):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 400)
    logits = (2.5 * np.eye(CLASSES)[labels] + 0.6 * rng.normal(size=(400, CLASSES))).astype(
        np.float32
    )
    outputs = Outputs((1.5 * rng.normal(size=(200, CLASSES))).astype(np.float32))
    right = logits.argmax(axis=1) == labels  # the paper fits on these only, theirs on all
    assert not right.all()
    theirs = detector.OpenMax(None, tailsize=tail, alpha=alpha)
    # In float64: in float32 theirs adds 10000 to distances and keeps three decimals of them.
    theirs.fit_logits(torch.tensor(logits[right]).double(), torch.tensor(labels[right]))
    values = theirs.predict_logits(torch.tensor(outputs.logits).double())
    log_odds = _values("openmax", outputs, Outputs(logits), labels, tail=tail, alpha=alpha)
    p = 1 / (1 + np.exp(-log_odds.astype(np.float64)))
    np.testing.assert_allclose(p, values, **TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.0014])
def test_odin(torch, detector, temperature, epsilon):
    rng = np.random.default_rng(0)
    first = rng.normal(size=(48, 16)).astype(np.float32)
    second = rng.normal(size=(16, CLASSES)).astype(np.float32)
    images = rng.uniform(size=(50, 4, 4, 3)).astype(np.float32)

    def forward(x):
        return Outputs(jnp.tanh(x.reshape(-1, 48) @ first) @ second)

    def model(x):
        flat = x.permute(0, 2, 3, 1).reshape(-1, 48)
        return torch.tanh(flat @ torch.tensor(first)) @ torch.tensor(second)

    theirs = detector.ODIN(model, eps=epsilon, temperature=temperature).to("cpu")
    values = theirs.predict(torch.tensor(images).permute(0, 3, 1, 2)).detach()
    score = scores.make("odin", temperature=temperature, epsilon=epsilon)
    state = scores.fit(score, jax.tree.map(np.asarray, forward(images)), np.zeros(50, int))
    mine = scores.apply_to_images(score, state, forward, images)
    np.testing.assert_allclose(mine, _odds(values), **TOLERANCE)
