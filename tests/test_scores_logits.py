"""Scores that read logits, the head or images, each against float64 NumPy and at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import logsumexp, softmax

from oal_jax import scores
from oal_jax.errors import UserError
from oal_jax.scores import Outputs
from oal_jax.scores.logits import log_others, log_probabilities
from oal_jax.scores.openmax import fit_weibull
from oal_jax.scores.temperature import RANGE, fit_temperature, log_odds

CLASSES, WIDTH = 6, 9
NAMES = ("msp", "max_logit", "energy", "temperature_scaling", "odin", "gen", "gradnorm", "openmax")
NAMES += ("kl_matching",)


def _outputs(n=40, seed=0, classes=CLASSES, spread=3.0):
    rng = np.random.default_rng(seed)
    logits = (spread * rng.normal(size=(n, classes))).astype(np.float32)
    return Outputs(logits, rng.gamma(0.5, size=(n, WIDTH)).astype(np.float32))


def _classified(n=300, seed=0, noise=0.8):
    """Logits about 8 at the label; most labels right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    logits = 4 * np.eye(CLASSES)[labels] + noise * rng.normal(size=(n, CLASSES))
    return Outputs(logits.astype(np.float32), np.ones((n, WIDTH), np.float32)), labels


def _values(name, outputs, train=None, labels=None, **params):
    score = scores.make(name, **params)
    train = outputs if train is None else train
    labels = np.zeros(len(train.logits), int) if labels is None else labels
    return scores.apply(score, scores.fit(score, train, labels), outputs)


def _double(outputs):
    return outputs.logits.astype(np.float64)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0, 40.0])
def test_log_probabilities_keep_their_digits(spread):
    logits = _outputs(spread=spread).logits
    z = logits.astype(np.float64)
    # log p = -log(1 + sum of the other ratios), each from float64 differences.
    expected = -np.log1p(
        np.exp(z[:, None, :] - z[:, :, None]).sum(axis=2, where=~np.eye(CLASSES, dtype=bool)[None])
    )
    np.testing.assert_allclose(log_probabilities(logits), expected, rtol=2e-5, atol=1e-37)
    top = z.argmax(axis=1)
    others = logsumexp(np.where(np.eye(CLASSES)[top] > 0, -np.inf, z), axis=1) - z.max(axis=1)
    np.testing.assert_allclose(log_others(logits), others, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("m", [1, 3, 100])
def test_gen_is_the_formula(gamma, m):
    outputs = _outputs()
    p = np.sort(softmax(_double(outputs), axis=1), axis=1)[:, ::-1][:, :m]
    expected = ((p * (1 - p)) ** gamma).sum(axis=1)
    np.testing.assert_allclose(
        _values("gen", outputs, gamma=gamma, m=m), expected, rtol=1e-4, atol=1e-30
    )


def test_gen_keeps_the_order_of_confident_inputs():
    logits = np.zeros((60, 3), np.float32)
    logits[:, 1] = np.linspace(10, 70, 60)  # 1 - p is 0 in float32 from 18 on
    values = _values("gen", Outputs(logits), m=1)
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize("true", [0.3, 1.0, 2.7])
def test_temperature_is_the_minimum_of_the_likelihood(true):
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(4000, CLASSES))
    labels = (logits / true + rng.gumbel(size=logits.shape)).argmax(axis=1)

    def loss(t):
        return -np.log(softmax(logits / t, axis=1)[np.arange(len(labels)), labels]).mean()

    fitted = fit_temperature(logits, labels)
    best = optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x
    assert fitted == pytest.approx(best, rel=1e-4)
    assert fitted == pytest.approx(true, rel=0.1)  # the labels were drawn at that temperature


def test_temperature_without_a_minimum():
    outputs, labels = _classified(noise=0.1)
    assert fit_temperature(outputs.logits, labels) == RANGE[0]
    assert fit_temperature(-outputs.logits, labels) == RANGE[1]
    assert fit_temperature(np.full((5, 3), 2.0), np.arange(5) % 3) == 1.0
    assert fit_temperature(np.ones((5, 1)), np.zeros(5, int)) == 1.0
    # At the lowest temperature every probability is 1 in float64 too; the order survives.
    values = _values("temperature_scaling", outputs, outputs, labels)
    ordered = np.sort(_double(outputs), axis=1)
    rho = stats.spearmanr(values, ordered[:, -2] - ordered[:, -1]).statistic
    assert np.isfinite(values).all() and rho > 0.9999


def test_temperature_wants_labels_of_these_logits():
    outputs, labels = _classified(20)
    labels[3] = CLASSES
    with pytest.raises(UserError, match=f"label {CLASSES} in row 3, .* have {CLASSES} classes"):
        scores.fit(scores.make("temperature_scaling"), outputs, labels)


def test_temperature_scaling_is_calibrated_msp():
    outputs, labels = _classified(noise=2.0)
    t = fit_temperature(outputs.logits, labels)
    p = softmax(_double(outputs) / t, axis=1).max(axis=1)
    values = _values("temperature_scaling", outputs, outputs, labels)
    np.testing.assert_allclose(values, np.log((1 - p) / p / (CLASSES - 1)), rtol=1e-4, atol=1e-6)
    assert scores.make("temperature_scaling").fit_on == "validation"


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0, 1000.0, 1e6])
def test_log_odds_keep_order_and_digits(temperature):
    logits = _outputs(3000, spread=5.0).logits
    z = logits.astype(np.longdouble) / temperature
    p = np.exp(z - z.max(axis=1, keepdims=True))
    others = np.where(np.eye(CLASSES)[z.argmax(axis=1)] > 0, 0, p).sum(axis=1)
    expected = np.log(others) - np.log(np.longdouble(CLASSES - 1))
    values = np.asarray(log_odds(logits, jnp.float32(temperature)))
    np.testing.assert_allclose(values, expected.astype(float), rtol=3e-6)
    # Neighbours closer than float32 resolves may tie; no more than that.
    assert len(np.unique(values)) > 0.99 * len(values)
    assert (np.diff(values[np.argsort(expected)]) > -3e-6 * np.abs(values).max()).all()
    if temperature == 1e6:  # what the plain probability would have left
        plain = np.asarray(jax.nn.softmax(logits / temperature, axis=1).max(axis=1))
        assert len(np.unique(plain)) < 0.2 * len(plain)


def test_log_odds_at_the_edges():
    logits = np.float32([[2, 2, 2], [1e4, 0, 0], [5, 5, -1e4]])
    values = np.asarray(log_odds(logits, jnp.float32(1.0)))
    np.testing.assert_allclose(values, [0.0, -1e4, -np.log(2)], rtol=1e-6)
    assert (np.asarray(log_odds(np.ones((4, 1), np.float32), jnp.float32(1.0))) == 0).all()


def _forward(images):
    """A small smooth network on (n, 4, 4, 1); the first pixel does not reach it."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(16, 8)), rng.normal(size=(8, CLASSES))
    first[0] = 0
    hidden = jnp.tanh(images.reshape(-1, 16) @ jnp.float32(first))
    return Outputs(hidden @ jnp.float32(second) * 3)


def _images(n=12):
    return np.random.default_rng(4).uniform(size=(n, 4, 4, 1)).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_odin_moves_towards_confidence(temperature):
    epsilon = 0.01
    score = scores.make("odin", temperature=temperature, epsilon=epsilon)
    state = scores.fit(score, _forward(_images()), np.zeros(12, int))
    seen = []

    def forward(images):
        seen.append(images)
        return _forward(images)

    images = _images()
    moved = score.perturb(state, forward, images)
    steps = np.asarray(seen[-1]) - images
    assert (steps[:, 0, 0] == 0).all()  # sign(0) is 0
    np.testing.assert_allclose(np.abs(steps.reshape(12, -1)[:, 1:]), epsilon, rtol=1e-4)

    def log_p(images):  # float64, by central differences: independent of autodiff
        rng = np.random.default_rng(3)
        first, second = rng.normal(size=(16, 8)), rng.normal(size=(8, CLASSES))
        first[0] = 0
        z = np.tanh(images.reshape(-1, 16) @ first) @ second * 3 / temperature
        return z.max(axis=1) - logsumexp(z, axis=1)

    x = images.reshape(12, 16).astype(np.float64)
    for pixel in range(1, 16):
        delta = 1e-5 * np.eye(16)[pixel][None, :]
        slope = log_p(x + delta) - log_p(x - delta)
        sure = np.abs(slope) > 1e-3 * np.abs(slope).max()
        np.testing.assert_array_equal(
            np.sign(slope)[sure], np.sign(steps.reshape(12, 16)[:, pixel])[sure]
        )
    plain = scores.apply(score, state, jax.tree.map(np.asarray, _forward(images)))
    values = scores.apply_to_images(score, state, _forward, images, batch_size=5)
    np.testing.assert_allclose(values, np.asarray(score.score(state, moved)), rtol=1e-4, atol=1e-6)
    assert (values < plain).all()


def test_odin_without_a_step_is_the_plain_score():
    score = scores.make("odin", epsilon=0.0)
    state = scores.fit(score, _forward(_images()), np.zeros(12, int))
    values = scores.apply_to_images(score, state, _forward, _images())
    outputs = jax.tree.map(np.asarray, _forward(_images()))
    np.testing.assert_allclose(values, scores.apply(score, state, outputs), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1000.0])
def test_gradnorm_is_the_formula_and_the_gradient(temperature):
    outputs = _outputs()
    values = _values("gradnorm", outputs, temperature=temperature)
    p = softmax(_double(outputs) / temperature, axis=1)
    length = outputs.features.astype(np.float64).sum(axis=1)
    expected = -length * np.abs(p - 1 / CLASSES).sum(axis=1) / temperature
    np.testing.assert_allclose(values, expected, rtol=1e-5)

    kernel = np.random.default_rng(5).normal(size=(WIDTH, CLASSES)).astype(np.float32)

    def divergence(kernel, features):
        return -jnp.mean(jax.nn.log_softmax(features @ kernel / temperature))

    gradients = jax.vmap(jax.grad(divergence), (None, 0))(kernel, outputs.features)
    outputs = outputs._replace(logits=outputs.features @ kernel)
    values = _values("gradnorm", outputs, temperature=temperature)
    # Autodiff takes p - u, of which a high temperature leaves it few digits.
    rtol = 1e-5 if temperature < 100 else 1e-2
    np.testing.assert_allclose(values, -np.abs(gradients).sum(axis=(1, 2)), rtol=rtol)


def test_kl_matching_is_the_formula():
    validation, labels = _classified()
    outputs = _outputs(seed=2)
    score = scores.make("kl_matching")
    assert score.fit_on == "validation"
    p, q = (softmax(_double(x), axis=1) for x in (outputs, validation))
    typical = [q[q.argmax(axis=1) == c].mean(axis=0) for c in range(CLASSES)]
    expected = np.min([(p * np.log(p / d[None])).sum(axis=1) for d in typical], axis=0)
    values = _values("kl_matching", outputs, validation, labels)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)


def test_kl_matching_with_certain_predictions_and_absent_classes():
    # Float32 probabilities of the other classes are 0 here; log 0 would make every score infinite.
    validation = Outputs(np.float32([[300, 0, 0], [250, 0, 0], [0, 200, 0]]))
    score = scores.make("kl_matching")
    state = scores.fit(score, validation, np.zeros(3, int))
    assert state["log_typical"].shape == (2, 3)
    values = scores.apply(score, state, Outputs(np.float32([[300, 0, 0], [0, 0, 0], [0, 0, 300]])))
    assert np.isfinite(values).all() and values[0] < values[1] < values[2]
    assert values[2] == pytest.approx(200, rel=1e-4)  # against d of class 1


def _openmax(x, train, labels, tail, alpha):
    """OpenMax's probability of the unknown class in float64, Weibulls by SciPy's own search."""
    weibulls, means = [], []
    for c in range(CLASSES):
        rows = train[(labels == c) & (train.argmax(axis=1) == c)]
        means.append(rows.mean(axis=0))
        distances = np.sort(np.linalg.norm(rows - means[c], axis=1))[-tail:]
        shape, _, size = stats.weibull_min.fit(distances - distances[0] + 1e4, floc=0)
        weibulls.append((shape, size, distances[0]))
    unknown = []
    for v in x:
        revised, given_up = v.copy(), 0.0
        for i, c in enumerate(np.argsort(-v)[:alpha]):
            shape, size, start = weibulls[c]
            d = np.linalg.norm(v - means[c]) - start + 1e4
            share = (alpha - i) / alpha * stats.weibull_min.cdf(d, shape, scale=size)
            revised[c] = v[c] * (1 - share)
            given_up += v[c] * share
        unknown.append(np.exp(given_up) / (np.exp(given_up) + np.exp(revised).sum()))
    return np.array(unknown)


@pytest.mark.parametrize(("tail", "alpha"), [(20, 3), (10, 1), (30, CLASSES)])
def test_openmax_is_the_formula(tail, alpha):
    train, labels = _classified()
    outputs = Outputs(np.concatenate([_classified(60, seed=1)[0].logits, _outputs(60).logits]))
    p = _openmax(_double(outputs), _double(train), labels, tail, alpha)
    values = _values("openmax", outputs, train, labels, tail=tail, alpha=alpha)
    np.testing.assert_allclose(values, np.log(p / (1 - p)), rtol=2e-3, atol=2e-3)
    more = _values("openmax", outputs, train, labels, tail=tail, alpha=alpha + 100)
    all_of_them = _values("openmax", outputs, train, labels, tail=tail, alpha=CLASSES)
    np.testing.assert_array_equal(more, all_of_them)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_weibull_is_the_maximum_of_the_likelihood(unit):
    distances = unit * np.sort(np.random.default_rng(0).gamma(9.0, size=20))
    shift = 1e4 * max(unit, 1)
    k, offset = fit_weibull(distances, shift)
    x = distances - distances[0] + shift
    size = shift * np.exp(-offset / k)

    def likelihood(k, size):
        return stats.weibull_min.logpdf(x, k, scale=size).sum()

    best = likelihood(k, size)
    for a in (0.99, 1.01):
        assert likelihood(a * k, size) < best
        assert likelihood(k, size + (a - 1) * (x[-1] - x[0])) < best
        # Along the ridge where the scale is the best one for the shape.
        ridge = np.mean((x / shift) ** (a * k)) ** (1 / (a * k)) * shift
        assert likelihood(a * k, ridge) < best


def test_openmax_does_not_saturate():
    train, labels = _classified()
    far = np.zeros((50, CLASSES), np.float32)
    far[:, 0] = np.linspace(30, 200, 50)  # the probability is 1 in float64 for all of these
    values = _values("openmax", Outputs(far), train, labels)
    assert np.isfinite(values).all() and (np.diff(values) > 0).all()


def test_openmax_with_few_inputs():
    train, labels = _classified(60)
    labels = np.where(labels == 2, 1, labels)  # nothing is classified as 2 and right
    single = np.flatnonzero(labels == 4)[1:]
    keep = np.setdiff1d(np.arange(60), single)  # one input of class 4: its distance is 0
    train, labels = jax.tree.map(lambda x: x[keep], train), labels[keep]
    score = scores.make("openmax")
    state = scores.fit(score, train, labels)
    assert all(np.isfinite(x).all() for x in state.values())
    middle = np.array(state["means"])
    middle[2, 2] = 4
    values = scores.apply(score, state, Outputs(middle))
    assert np.isfinite(values).all()
    assert values[2] > 1 and np.delete(values, 2).max() < -2  # only an input of class 2 is unknown
    # Class 4 has borrowed its tail: an input a little off is still no stranger.
    near = middle[4:5] + np.float32(0.3)
    assert scores.apply(score, state, Outputs(near))[0] < -1


def test_openmax_without_a_tail():
    score = scores.make("openmax")
    same = Outputs(np.tile(np.float32([[3, 0, 0]]), (5, 1)))
    with pytest.raises(UserError, match="equally far from their class means"):
        scores.fit(score, same, np.zeros(5, int))
    with pytest.raises(UserError, match="no training input is classified correctly"):
        scores.fit(score, same, np.ones(5, int))


@pytest.mark.parametrize("name", NAMES)
def test_constant_logits_and_dead_features(name):
    train, labels = _classified(60)
    train.features[:] = 0
    flat = Outputs(np.full((8, CLASSES), 1.5, np.float32), np.zeros((8, WIDTH), np.float32))
    values = _values(name, flat, train, labels)
    assert np.isfinite(values).all() and (values == values[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_class(name):
    outputs = _outputs(30, classes=1)
    assert np.isfinite(_values(name, outputs)).all()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("gen", {"gamma": 0.0}, "gamma must be above 0, got 0.0"),
        ("gen", {"m": 0}, "m must be 1 or more, got 0"),
        ("odin", {"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        ("odin", {"epsilon": -0.1}, "epsilon must be 0 or more, got -0.1"),
        ("gradnorm", {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ("openmax", {"tail": 1}, "tail must be 2 or more, got 1"),
        ("openmax", {"alpha": 0}, "alpha must be 1 or more, got 0"),
        ("temperature_scaling", {"temperature": 1.0}, "known: none"),
    ],
)
def test_mistakes_in_parameters(name, params, message):
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        scores.make(name, **params)


def test_every_combination_of_a_grid_can_be_made():
    for name, grid in scores.GRIDS.items():
        for param, values in grid.items():
            for value in values:
                scores.make(name, **{param: value})
