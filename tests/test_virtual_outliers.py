"""Methods vos and npos: the queues, the outliers that are drawn from them, and the losses."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from helpers import CLASSES, assert_trees_close, difference, norm, numpy_cross_entropy, numpy_net
from outlier_methods import ROWS, WIDTH, fixed_variables, gradients, make_batch, warm_state

from oal_jax.methods import class_queue, losses, vos
from oal_jax.runtime.keys import named


def test_a_queue_keeps_the_latest_rows_of_every_class():
    rng, size = np.random.default_rng(0), 4
    queue = class_queue.empty(CLASSES, size, 2)
    model = {c: collections.deque(maxlen=size) for c in range(CLASSES)}
    push, is_full = jax.jit(class_queue.push), jax.jit(class_queue.is_full)
    for step in range(12):
        # The third batch is of one class alone, and more than its queue holds.
        labels = np.full(7, 1) if step == 2 else rng.integers(CLASSES, size=7)
        features = rng.normal(size=(7, 2)).astype(np.float32)
        queue = push(queue, features, labels)
        for row, label in zip(features, labels, strict=True):
            model[label].append(row)
        assert bool(is_full(queue)) == all(len(q) == size for q in model.values())
        for label, expected in model.items():
            rows = np.asarray(queue["rows"][label])
            assert {tuple(r) for r in rows if r.any()} == {tuple(r) for r in expected}
    # There are 9 rows for 4 places: the first 5 go nowhere, and no place is written twice.
    slots = jax.jit(class_queue.slots, static_argnums=2)
    places, _ = slots(jnp.array([0, 3, 0]), jnp.full(9, 1), size)
    assert places.tolist() == [4, 4, 4, 4, 4, 0, 1, 2, 3]
    # The oldest is the next to go.
    oldest = {c: q[0] for c, q in model.items()}
    after = push(queue, np.ones((CLASSES, 2), np.float32), np.arange(CLASSES))["rows"]
    for label, row in oldest.items():
        assert not (np.asarray(after[label]) == row).all(1).any()
    value = lambda x: class_queue.push(queue, x, jnp.array([0]))["rows"].sum()
    assert not jax.jit(jax.grad(value))(jnp.ones((1, 2))).any()


@pytest.mark.parametrize(("name", "group"), [("vos", "energy"), ("npos", "discriminator")])
def test_nothing_happens_before_the_start_or_before_the_queues_are_full(name, group):
    fresh = fixed_variables(name)[1]
    none = gradients(name, state=warm_state(name), step=2, weight=0.0)[0]
    for state, step, start in ((fresh, 0, 0), (warm_state(name), 4, 5)):
        grads, new, metrics = gradients(name, state=state, step=step, start_step=start)
        assert_trees_close(grads["student"], none["student"])
        assert norm(grads[group]) == 0
        assert new[name]["queue"]["written"].sum() == state[name]["queue"]["written"].sum() + ROWS
        assert not new[name]["ready"] or state[name]["ready"]
    grads, new, _ = gradients(name, state=warm_state(name), step=5, start_step=5)
    assert norm(grads[group]) > 1e-3 and new[name]["ready"]
    assert norm(difference(grads["student"], none["student"])) > 1e-4


# VOS


def test_vos_outliers_reach_the_head_and_nothing_before_it():
    state = warm_state("vos")
    moved = state["vos"]["queue"] | {"rows": 3 + 2 * state["vos"]["queue"]["rows"]}
    other = state | {"vos": state["vos"] | {"queue": moved}}
    one, two = (gradients("vos", state=s, step=2)[0] for s in (state, other))
    change = difference(one, two)
    assert norm(change["student"]["fc"]["kernel"]) > 1e-4
    assert norm(change["energy"]) > 1e-4
    assert norm(change["student"]["conv"]) < 1e-6 > norm(change["student"]["bn"])
    # The ID side reaches the whole student.
    effect = difference(one, gradients("vos", state=state, step=2, weight=0.0)[0])
    assert norm(effect["student"]["conv"]) > 1e-4


def test_vos_value_is_the_logistic_loss_of_weighted_energies():
    params, _ = fixed_variables("vos")
    state, batch = warm_state("vos"), make_batch(4)
    params = params | {
        "energy": {
            "class_weight": jnp.array([0.5, 2.0, -1.0]),
            "scale": jnp.float32(0.3),
            "offset": jnp.float32(-0.7),
        }
    }
    _, new, metrics = gradients("vos", batch, params=params, state=state, step=2, key=9)
    (logits, features), _ = numpy_net(params, batch["image"], batch["image"])
    rows = np.asarray(new["vos"]["queue"]["rows"], np.float64)
    means = rows.mean(1)
    centred = (rows - means[:, None]).reshape(-1, WIDTH)
    covariance = centred.T @ centred / len(centred) + 1e-4 * np.eye(WIDTH)
    np.testing.assert_allclose(new["vos"]["means"], means, rtol=1e-4, atol=1e-5)
    factor = new["vos"]["factor"]
    np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-3, atol=1e-5)
    outliers = jax.jit(vos.least_likely, static_argnums=(3, 4))(
        named(jax.random.key(9), "vos"), new["vos"]["means"], factor, 50, 2
    )
    head = jax.tree.map(np.asarray, params["student"]["fc"])
    slope = np.log1p(np.exp(0.3))
    energy = lambda z: np.log((np.array([0.5, 2.0, 1e-6]) * np.exp(z)).sum(1))
    inside = energy(logits)
    outside = energy(np.asarray(outliers, np.float64) @ head["kernel"] + head["bias"])
    expected = np.log1p(np.exp(-(slope * inside - 0.7))).mean()
    expected += np.log1p(np.exp(slope * outside - 0.7)).mean()
    np.testing.assert_allclose(metrics["energy_virtual"], expected, rtol=1e-3)
    plain = numpy_cross_entropy(logits, batch["label"])
    np.testing.assert_allclose(metrics["loss"], plain + 0.1 * expected, rtol=1e-3)
    assert len(features) == ROWS


def test_least_likely_samples_have_the_order_statistics_of_all_samples():
    classes, samples, count, width = 3000, 40, 3, 6
    rng = np.random.default_rng(0)
    factor = np.tril(rng.normal(size=(width, width))) + 3 * np.eye(width)
    means = rng.normal(size=(classes, width))
    lowest = jax.jit(vos.least_likely, static_argnums=(3, 4))(
        jax.random.key(0), jnp.float32(means), jnp.float32(factor), samples, count
    )
    noise = np.asarray(lowest, np.float64).reshape(classes, count, width) - means[:, None]
    white = np.linalg.solve(factor, noise.reshape(-1, width).T).T.reshape(noise.shape)
    quantiles = scipy.stats.chi2.cdf((white**2).sum(-1), width)
    for place in range(count):  # the place-th largest of n uniform numbers
        exact = scipy.stats.beta(samples - place, place + 1)
        assert scipy.stats.kstest(quantiles[:, place], exact.cdf).pvalue > 0.01
    directions = (white / np.linalg.norm(white, axis=-1, keepdims=True)).reshape(-1, width)
    np.testing.assert_allclose(directions.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(np.cov(directions.T), np.eye(width) / width, atol=0.01)


@pytest.mark.parametrize(("name", "field"), [("vos", "means"), ("npos", "outliers")])
def test_what_is_sampled_stays_between_refreshes(name, field):
    state = warm_state(name)
    old, same, new = (
        s[name][field]
        for s in (
            state,
            gradients(name, state=state, step=5, key=8, refresh=3)[1],
            gradients(name, state=state, step=6, key=8, refresh=3)[1],
        )
    )
    np.testing.assert_array_equal(old, same)
    assert np.abs(old - new).max() > 1e-3


# NPOS


def test_npos_outliers_train_the_discriminator_and_nothing_else():
    state = warm_state("npos")
    outliers = state["npos"]["outliers"]
    np.testing.assert_allclose(np.linalg.norm(outliers, axis=1), 1, rtol=1e-5)
    assert outliers.shape == (CLASSES * 2 * 3, WIDTH)
    other = state | {"npos": state["npos"] | {"outliers": -outliers}}
    between = {"step": 5, "refresh": 3}
    one, two = (gradients("npos", state=s, **between)[0] for s in (state, other))
    change = difference(one, two)
    assert norm(change["discriminator"]) > 1e-3
    assert norm(change["student"]) < 1e-6
    effect = difference(one, gradients("npos", state=state, **between, weight=0.0)[0])
    assert norm(effect["student"]["conv"]) > 1e-4
    assert norm(effect["student"]["fc"]) < 1e-5


def test_npos_value_is_the_logistic_loss_of_unit_features_and_the_contrast():
    params, _ = fixed_variables("npos")
    state, batch = warm_state("npos"), make_batch(4)
    _, new, metrics = gradients("npos", batch, state=state, step=2)
    (logits, features), _ = numpy_net(params, batch["image"], batch["image"])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    net = jax.tree.map(np.asarray, params["discriminator"])
    layer = lambda x, n: x @ net[n]["kernel"] + net[n]["bias"]
    score = lambda x: layer(np.maximum(layer(x, "hidden"), 0), "out")[:, 0]
    separation = np.log1p(np.exp(-score(unit))).mean()
    separation += np.log1p(np.exp(score(np.asarray(new["npos"]["outliers"])))).mean()
    labels = np.asarray(batch["label"])
    similarity = unit @ unit.T / 0.1
    contrast = []
    for i in range(ROWS):
        others = [a for a in range(ROWS) if a != i]
        total = scipy.special.logsumexp(similarity[i, others])
        positives = [a for a in others if labels[a] == labels[i]]
        contrast.append(np.mean([total - similarity[i, p] for p in positives]))
    ce = numpy_cross_entropy(logits, labels)
    np.testing.assert_allclose(metrics["separation"], separation, rtol=1e-3)
    np.testing.assert_allclose(metrics["contrastive"], np.mean(contrast), rtol=1e-3)
    expected = ce + 0.1 * separation + 0.1 * np.mean(contrast)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-3)


def test_a_row_without_positives_has_no_contrast():
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    value = lambda r: losses.supervised_contrastive(r, jnp.array([0, 0, 1, 2]), 0.1)
    assert (np.asarray(jax.jit(value)(rows)) > 0).tolist() == [True, True, False, False]
    assert np.isfinite(jax.jit(jax.grad(lambda r: value(r).sum()))(rows)).all()
