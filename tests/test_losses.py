"""The losses against NumPy and SciPy, CLUB also against its published form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from oal_jax.methods import losses

# Worked by hand: two pairs in two dimensions.
MEAN = np.array([[1.0, 0.0], [0.0, 2.0]])
LOG_VARIANCE = np.array([[0.0, 0.5], [-0.5, 0.0]])
Y = np.array([[1.0, 2.0], [3.0, 0.0]])


def gaussians(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    shape = (rows, width)
    values = (rng.normal(size=shape), np.tanh(rng.normal(size=shape)), 2 + rng.normal(size=shape))
    return tuple(v.astype(np.float32) for v in values)


def naive_club(mean, log_variance, y):
    """Equation 8 of arXiv 2006.12013 with its (B, B, d) tensor."""
    log_density = lambda m, v, t: -((m - t) ** 2) / (2 * np.exp(v))
    positive = log_density(mean, log_variance, y).sum(-1)
    every_pair = log_density(mean[:, None], log_variance[:, None], y[None])
    return positive - every_pair.mean(1).sum(-1)


def test_cross_entropy_is_minus_the_log_probability_of_the_label():
    logits = 5 * np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    labels = np.arange(7) % 4
    expected = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(7), labels]
    actual = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    values = losses.cross_entropy(jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.array([0, 0]))
    np.testing.assert_allclose(values, [0, 1e4])


def test_kl_divergence_equals_scipy_and_has_the_target_first():
    rng = np.random.default_rng(1)
    target, logits = 3 * rng.normal(size=(2, 6, 5)).astype(np.float32)
    expected = rel_entr(
        softmax(target.astype(np.float64), axis=1), softmax(logits.astype(np.float64), axis=1)
    ).sum(1)
    np.testing.assert_allclose(losses.kl_divergence(target, logits), expected, rtol=1e-5)
    assert np.abs(losses.kl_divergence(logits, target) - expected).max() > 0.1


def test_kl_divergence_is_zero_for_equal_distributions_and_differentiable_in_both():
    logits = jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(losses.kl_divergence(logits, logits + 7), 0, atol=1e-6)
    other = jnp.array([[0.0, 1.0, -1.0]])
    for argument in (0, 1):
        gradient = jax.grad(lambda *a: losses.kl_divergence(*a).sum(), argument)(logits, other)
        assert jnp.abs(gradient).max() > 1e-2


def test_uniform_cross_entropy_equals_numpy_and_is_least_for_equal_logits():
    logits = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    expected = -log_softmax(logits.astype(np.float64), axis=1).mean(1)
    np.testing.assert_allclose(losses.uniform_cross_entropy(logits), expected, rtol=1e-5)
    flat = losses.uniform_cross_entropy(jnp.ones((1, 5)))
    np.testing.assert_allclose(flat, np.log(5), rtol=1e-6)
    assert (expected > np.log(5)).all()


def test_energy_logistic_is_the_binary_cross_entropy_of_the_negative_energy():
    inside, outside = np.array([3.0, -1.0]), np.array([0.5, 2.0, -4.0])
    scale, offset = 0.3, -0.7
    a = np.log1p(np.exp(scale))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    id_loss, outlier_loss = losses.energy_logistic(
        jnp.asarray(inside),
        jnp.asarray(outside),
        jnp.array(scale),
        jnp.array(offset),
    )
    np.testing.assert_allclose(id_loss, -np.log(sigmoid(a * inside + offset)), rtol=1e-5)
    np.testing.assert_allclose(outlier_loss, -np.log(1 - sigmoid(a * outside + offset)), rtol=1e-5)


@pytest.mark.parametrize("scale", [-3.0, 0.0, 2.0])
def test_descent_raises_id_neg_energy_and_lowers_outlier_neg_energy_at_any_scale(scale):
    def total(inside, outside):
        parts = losses.energy_logistic(inside, outside, jnp.array(scale), jnp.array(0.1))
        return sum(p.sum() for p in parts)

    of_id, of_outliers = jax.grad(total, (0, 1))(jnp.array([-2.0, 4.0]), jnp.array([-2.0, 4.0]))
    assert (of_id < 0).all() and (of_outliers > 0).all()


def test_club_of_the_worked_example():
    value = jnp.mean(losses.club(jnp.array(MEAN), jnp.array(LOG_VARIANCE), jnp.array(Y)))
    np.testing.assert_allclose(value, -1.9519866, rtol=1e-6)
    swapped = losses.club(jnp.array(MEAN[::-1]), jnp.array(LOG_VARIANCE[::-1]), jnp.array(Y))
    np.testing.assert_allclose(jnp.mean(swapped), 1.9519866, rtol=1e-6)


def test_log_likelihood_of_the_worked_example():
    values = losses.gaussian_log_likelihood(jnp.array(MEAN), jnp.array(LOG_VARIANCE), jnp.array(Y))
    assert values.shape == (2,)
    np.testing.assert_allclose(jnp.mean(values), -10.6323070, rtol=1e-6)


def test_log_likelihood_is_best_at_the_mean_and_the_variance_of_the_residual():
    y = jnp.array([[1.0, -2.0]])
    value = lambda mean, log_variance: losses.gaussian_log_likelihood(mean, log_variance, y).sum()
    mean, log_variance = y + 0.5, jnp.full((1, 2), np.log(0.25))
    np.testing.assert_allclose(jax.grad(value, 1)(mean, log_variance), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(value)(y, log_variance), 0, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(2, 3), (17, 8)])
def test_club_equals_the_form_with_all_pairs(rows, width):
    values = gaussians(rows, width)
    expected = naive_club(*(v.astype(np.float64) for v in values))
    np.testing.assert_allclose(losses.club(*values), expected, rtol=1e-4, atol=1e-4)


def test_club_never_forms_all_pairs():
    rows, width = 512, 16
    compiled = jax.jit(losses.club).lower(*gaussians(rows, width)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * rows * 4


def test_over_all_pairings_club_and_its_gradient_are_zero():
    mean, log_variance, y = gaussians(4, 3, seed=3)
    orders = np.array(list(itertools.permutations(range(4))))

    @jax.jit
    def paired(mean, log_variance, y):
        one = lambda order: jnp.mean(losses.club(mean[order], log_variance[order], y))
        return jax.vmap(one)(orders)

    values = paired(mean, log_variance, y)
    average = lambda *a: jnp.mean(paired(*a))
    assert jnp.std(values) > 0.1
    np.testing.assert_allclose(jnp.mean(values), 0, atol=1e-5)
    gradients = jax.grad(average, (0, 1, 2))(mean, log_variance, y)
    single = jax.grad(lambda *a: paired(*a)[0], (0, 1, 2))(mean, log_variance, y)
    for expected, one in zip(gradients, single, strict=True):
        np.testing.assert_allclose(expected, 0, atol=1e-5)
        assert jnp.abs(one).max() > 1e-2


def test_ramp():
    steps = jnp.array([0, 10, 15, 20, 99])
    np.testing.assert_allclose(
        jax.vmap(lambda s: losses.ramp(s, 10.0, 20.0))(steps), [0, 0, 0.5, 1, 1]
    )
    np.testing.assert_allclose(losses.ramp(jnp.array(1), 0.0, 0.0), 1)
