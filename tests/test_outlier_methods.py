"""Methods oe, energy, logitnorm and woods, and what they share with vos and npos."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import (
    assert_trees_close,
    difference,
    form,
    norm,
    numpy_cross_entropy,
    numpy_net,
)
from outlier_methods import (
    BUILD,
    TRACED,
    fixed_variables,
    gradients,
    make_batch,
    make_method,
    warm_state,
)

from oal_jax.methods import losses

RANDOM = ("vos", "npos")  # those that draw in a step


@pytest.fixture(params=sorted(BUILD))
def name(request):
    return request.param


def test_a_step_lowers_the_loss_and_keeps_all_shapes(name):
    (params, before), state = fixed_variables(name), warm_state(name)
    grads, after, metrics = gradients(name, state=state, step=2)
    assert form((grads, after)) == form((params, before))  # so that steps fit a scan
    assert all(v.shape == () and np.isfinite(v) for v in metrics.values())
    assert all(norm(grads[group]) > 1e-4 for group in params)
    rate = np.float32(0.05 / max(1.0, norm(grads)))
    nudged = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    lower = gradients(name, params=nudged, state=state, step=2)[2]
    assert lower["loss"] < metrics["loss"]


def test_the_key_alone_decides_what_is_drawn(name):
    state = warm_state(name)
    one, again, other = (gradients(name, state=state, step=2, key=k) for k in (0, 0, 1))
    assert_trees_close(one, again, rtol=0, atol=0)
    assert (one[2]["loss"] != other[2]["loss"]) == (name in RANDOM)


def test_a_transform_touches_the_id_cross_entropy_alone(name):
    state = warm_state(name)
    plain, _, metrics = gradients(name, state=state, step=2)
    none, _, _ = gradients(name, state=state, step=2, factor=0.0)
    twice, _, changed = gradients(name, state=state, step=2, factor=2.0, shift=0.25)
    same = lambda m: {k: v for k, v in m.items() if k != "loss"}
    assert_trees_close(same(metrics), same(changed), rtol=0, atol=1e-6)
    ce, limit = float(metrics["ce"]), TRACED["woods"]["ce_limit"]
    if name == "woods":
        term = lambda value: float(
            losses.augmented_lagrangian(
                jnp.float32(value - limit),
                state["woods"]["multiplier"][1],
                state["woods"]["penalty"][1],
            )
        )
        expected = term(2 * ce + 0.25) - term(ce)
    else:
        expected = ce + 0.25
        # The gradient moves along that of the cross-entropy.
        assert_trees_close(difference(twice, plain), difference(plain, none))
    np.testing.assert_allclose(changed["loss"] - metrics["loss"], expected, rtol=1e-4)
    outside = set(plain) - {"student"}
    assert norm(difference(*({g: t[g] for g in outside} for t in (plain, twice)))) < 1e-6


@pytest.mark.parametrize("name", ["oe", "energy", "woods"])
def test_batch_statistics_never_see_an_outlier_unless_they_are_shared(name):
    batch = make_batch()
    wild = batch | {k: 20 + 9 * v for k, v in batch.items() if k in ("outlier_image", "wild_image")}
    one, other = (gradients(name, b) for b in (batch, wild))
    assert one[2]["loss"] != other[2]["loss"]
    assert_trees_close(one[1]["student"], other[1]["student"], rtol=0, atol=0)
    method = make_method(name, shared_statistics=True)
    loss = jax.jit(lambda b: method.loss(*fixed_variables(name), b, 0, jax.random.key(0))[1][0])
    one, other = (loss(b)["student"] for b in (batch, wild))
    assert norm(difference(one, other)) > 1


# Images of outliers


@pytest.mark.parametrize("statistics", ["id", "shared"])
def test_oe_is_cross_entropy_and_that_to_the_uniform(statistics):
    params, state = fixed_variables("oe")
    batch = make_batch()
    shared = statistics == "shared"
    images = batch["image"], batch["outlier_image"]
    (logits, _), (outliers, _) = numpy_net(params, *images, shared)
    ce = numpy_cross_entropy(logits, batch["label"])
    uniform = np.mean([-np.log(scipy.special.softmax(z)).mean() for z in outliers])
    method = make_method("oe", shared_statistics=shared)
    value, (_, metrics) = jax.jit(method.loss)(params, state, batch, 0, jax.random.key(0))
    np.testing.assert_allclose(metrics["ce"], ce, rtol=1e-4)
    np.testing.assert_allclose(metrics["outlier_exposure"], uniform, rtol=1e-4)
    np.testing.assert_allclose(value, ce + 0.5 * uniform, rtol=1e-4)


def test_energy_holds_the_energies_apart_by_squared_hinges():
    params, _ = fixed_variables("energy")
    batch = make_batch()
    (logits, _), (outliers, _) = numpy_net(params, batch["image"], batch["outlier_image"])
    energies = [-np.log(np.exp(z).sum(1)) for z in (logits, outliers)]
    hinge_in = np.mean(np.maximum(energies[0] + 6, 0) ** 2)
    hinge_out = np.mean(np.maximum(-1 - energies[1], 0) ** 2)
    assert hinge_in > 0.1 and hinge_out > 0.01
    _, _, metrics = gradients("energy")
    ce = numpy_cross_entropy(logits, batch["label"])
    np.testing.assert_allclose(metrics["id_energy"], energies[0].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["outlier_energy"], energies[1].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["id_hinge"], hinge_in, rtol=1e-4)
    np.testing.assert_allclose(metrics["outlier_hinge"], hinge_out, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], ce + 0.1 * (hinge_in + hinge_out), rtol=1e-4)


def test_hinges_are_flat_beyond_their_margins():
    inside, outside = jnp.array([-30.0, -25.0, -20.0]), jnp.array([-10.0, -7.0, 0.0])
    one, other = losses.energy_hinges(inside, outside, -25.0, -7.0)
    np.testing.assert_allclose(one, [0, 0, 25])
    np.testing.assert_allclose(other, [9, 0, 0])


def test_logitnorm_is_cross_entropy_of_directions():
    params, _ = fixed_variables("logitnorm")
    batch = make_batch()
    (logits, _), _ = numpy_net(params, batch["image"], batch["image"])
    lengths = np.linalg.norm(logits, axis=1, keepdims=True)
    for temperature in (0.5, 0.04):
        grads, _, metrics = gradients("logitnorm", temperature=temperature)
        expected = numpy_cross_entropy(logits / lengths / temperature, batch["label"])
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-3)
    np.testing.assert_allclose(metrics["logit_norm"], lengths.mean(), rtol=1e-4)
    # The length of the logits is not trained: no gradient along the head's own direction.
    slope, head = grads["student"]["fc"], params["student"]["fc"]
    assert abs(sum(np.vdot(slope[k], head[k]) for k in head)) < 1e-3 * norm(slope)


def test_unit_rows_reach_the_stated_bound_and_have_a_gradient_at_zero():
    classes, temperature = 5, 0.3
    best = np.float32(100 * (np.eye(classes) - 1 / classes))
    loss = lambda z: losses.cross_entropy(losses.unit_rows(z) / temperature, jnp.arange(classes))
    value = jax.jit(loss)(best)
    bound = np.log1p((classes - 1) * np.exp(-np.sqrt(classes / (classes - 1)) / temperature))
    np.testing.assert_allclose(value, np.full(classes, bound), rtol=1e-4)
    slope = jax.jit(jax.grad(lambda z: losses.unit_rows(z).sum()))(jnp.zeros((2, 3)))
    assert np.isfinite(slope).all()


# WOODS


def test_augmented_lagrangian_is_smooth_and_flat_where_the_constraint_holds():
    c = np.linspace(-3, 3, 61)
    multiplier, penalty = 0.8, 1.6
    active = penalty * c + multiplier >= 0
    expected = np.where(
        active, multiplier * c + penalty * c**2 / 2, -(multiplier**2) / (2 * penalty)
    )
    fill = lambda v: np.full(c.shape, v, np.float32)
    value = lambda x: losses.augmented_lagrangian(x, fill(multiplier), fill(penalty))
    np.testing.assert_allclose(jax.jit(value)(np.float32(c)), expected, atol=1e-6)
    slope = jax.jit(jax.grad(lambda x: value(x).sum()))(np.float32(c))
    np.testing.assert_allclose(slope, np.maximum(penalty * c + multiplier, 0), atol=1e-5)


def test_woods_value_is_the_wild_term_and_both_constraints():
    params, state = fixed_variables("woods")
    batch = make_batch()
    params = params | {"energy": {"scale": jnp.float32(0.4), "offset": jnp.float32(-0.9)}}
    held = {"multiplier": np.float32([0.5, 2.0]), "penalty": np.float32([1.5, 3.0])}
    state = state | {"woods": state["woods"] | held}
    _, new, metrics = gradients("woods", batch, params=params, state=state, ce_limit=0.2)
    (logits, _), (wild, _) = numpy_net(params, batch["image"], batch["wild_image"])
    energy = lambda z: np.log1p(np.exp(0.4)) * scipy.special.logsumexp(z, axis=1) - 0.9
    as_ood = [scipy.special.expit(-energy(z)).mean() for z in (logits, wild)]
    np.testing.assert_allclose(metrics["id_as_ood"], as_ood[0], rtol=1e-4)
    np.testing.assert_allclose(metrics["wild_as_ood"], as_ood[1], rtol=1e-4)
    ce = numpy_cross_entropy(logits, batch["label"])
    constraint = np.array([as_ood[0] - 0.05, ce - 0.2])
    m, p = held["multiplier"], held["penalty"]
    assert (p * constraint + m > 0).all()
    expected = 1 - as_ood[1] + (m * constraint + p * constraint**2 / 2).sum()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(new["woods"]["total"], constraint, rtol=1e-3, atol=1e-5)


def test_woods_moves_both_multipliers_apart_at_the_end_of_an_epoch():
    state = fixed_variables("woods")[1]
    multiplier, penalty = np.zeros(2), np.ones(2)
    seen = []
    for step in range(9):
        batch = make_batch(step)
        # In the last epoch both constraints hold with room to spare.
        limit = 0.5 if step < 6 else 50.0
        _, state, metrics = gradients("woods", batch, state=state, step=step, ce_limit=limit)
        seen.append([metrics["id_as_ood"] - 0.05, metrics["ce"] - limit])
        if step % 3 == 2:
            c = np.mean(seen, axis=0)
            active = penalty * c + multiplier >= 0
            multiplier = multiplier + np.where(active, c, -multiplier / penalty)
            penalty = np.where(c > 0, 1.5 * penalty, penalty)
            seen = []
        np.testing.assert_allclose(state["woods"]["multiplier"], multiplier, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state["woods"]["penalty"], penalty, rtol=1e-6)
        assert state["woods"]["count"] == (step + 1) % 3
        if step == 5:
            assert abs(multiplier[0] - multiplier[1]) > 0.1 and multiplier[1] > 0
    assert penalty[0] != penalty[1]


def test_woods_energy_is_higher_for_id_the_better_the_terms():
    grads, _, before = gradients("woods", ce_limit=50.0, wild_weight=1.0)
    params, _ = fixed_variables("woods")
    nudged = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    _, _, after = gradients("woods", params=nudged, ce_limit=50.0)
    assert after["loss"] < before["loss"]
    assert norm(grads["energy"]) > 1e-4
