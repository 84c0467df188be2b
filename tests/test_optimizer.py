"""The optimizer against a NumPy transcription of PyTorch's SGD, and the schedule's ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oal_jax.training.optimizer import adamw, grouped_sgd, one_cycle

PARAMS = {"student": {"w": np.array([[1.0, -2.0]]), "b": np.array([0.5])}, "club": np.array(3.0)}
RATES = {"student": 0.1, "club": 0.01}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: 2 * rng.normal(size=p.shape), PARAMS)


def torch_sgd(rates, decay, momentum, steps, clip=None, nesterov=True):
    """torch.optim.SGD(dampening=0), step by step; `clip(gradients)` before it."""
    flat = lambda tree: {"w": tree["student"]["w"], "b": tree["student"]["b"], "c": tree["club"]}
    params, buffers = flat(PARAMS), {}
    for step in range(steps):
        grads = flat(gradients(step))
        grads = clip(grads) if clip else grads
        for name, p in params.items():
            g = grads[name] + decay * p
            buffers[name] = g if step == 0 else momentum * buffers[name] + g
            rate = rates["club" if name == "c" else "student"](step)
            params[name] = p - rate * (g + momentum * buffers[name] if nesterov else buffers[name])
    return params


def run(optimizer, steps):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(jax.tree.map(jnp.asarray, gradients(step)), state, params)
        params = optax.apply_updates(params, updates)
    return {"w": params["student"]["w"], "b": params["student"]["b"], "c": params["club"]}


def sgd(**changes):
    defaults = {"steps": 8, "warmup": 0.0, "floor": 0.01, "momentum": 0.9, "weight_decay": 0.05}
    return grouped_sgd(RATES, **(defaults | {"clip": 0.0} | changes))


def cosine(peak):
    """The reference's multiplier with its floor m: m + (1 - m) (1 + cos(pi t / T)) / 2."""
    return lambda t: peak * (0.01 + 0.99 * (1 + np.cos(np.pi * t / 8)) / 2)


def assert_same(actual, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_grouped_sgd_is_pytorch_s_with_one_rate_per_group():
    rates = {group: cosine(rate) for group, rate in RATES.items()}
    assert_same(run(sgd(), 8), torch_sgd(rates, 0.05, 0.9, 8))


def test_without_nesterov_it_is_pytorch_s_default():
    rates = {group: cosine(rate) for group, rate in RATES.items()}
    expected = torch_sgd(rates, 0.05, 0.9, 8, nesterov=False)
    assert_same(run(sgd(nesterov=False), 8), expected)


def test_the_rate_of_an_epoch_is_that_of_its_first_step():
    rates = {g: lambda t, r=rate: cosine(r)(t - t % 3) for g, rate in RATES.items()}
    assert_same(run(sgd(rate_every=3), 8), torch_sgd(rates, 0.05, 0.9, 8))


def test_a_group_of_rate_zero_is_frozen_weight_decay_included():
    optimizer = grouped_sgd(
        RATES | {"student": 0.0},
        **{"steps": 8, "warmup": 0.0, "floor": 0.01, "momentum": 0.9},
        weight_decay=0.05,
        clip=0.0,
    )
    after = run(optimizer, 4)
    np.testing.assert_array_equal(after["w"], PARAMS["student"]["w"])
    np.testing.assert_array_equal(after["b"], PARAMS["student"]["b"])
    assert abs(after["c"] - PARAMS["club"]) > 1e-3


def test_warm_up_rises_to_the_peak_of_each_group():
    rates = {
        group: lambda t, rate=rate: float(one_cycle(rate, 8, 0.5, 0.01)(t))
        for group, rate in RATES.items()
    }
    assert_same(run(sgd(warmup=0.5), 8), torch_sgd(rates, 0.05, 0.9, 8))
    assert max(rates["club"](t) for t in range(9)) == pytest.approx(0.01)


def scaled_to(limit, *names):
    def clip(grads):
        norm = np.sqrt(sum((grads[n] ** 2).sum() for n in names))
        assert norm > limit
        return {n: g * (limit / norm if n in names else 1) for n, g in grads.items()}

    return clip


def test_gradients_are_clipped_together_before_the_weight_decay_and_club_s_by_itself():
    rates = {group: cosine(rate) for group, rate in RATES.items()}
    limit = 1e-3
    both = lambda grads: scaled_to(limit, "c")(scaled_to(limit, "w", "b")(grads))
    assert_same(run(sgd(clip=limit), 5), torch_sgd(rates, 0.05, 0.9, 5, both))
    together = scaled_to(limit, "w", "b", "c")
    actual = run(sgd(clip=limit, clip_separately=()), 5)
    assert_same(actual, torch_sgd(rates, 0.05, 0.9, 5, together))


def test_a_large_gradient_of_club_does_not_slow_the_student():
    params = jax.tree.map(jnp.asarray, PARAMS)
    optimizer = sgd(clip=1.0)
    step = lambda size: optimizer.update(
        {"student": {"w": jnp.ones((1, 2)), "b": jnp.ones(1)}, "club": jnp.array(size)},
        optimizer.init(params),
        params,
    )[0]["student"]["w"]
    np.testing.assert_array_equal(step(1.0), step(1e6))


def test_small_gradients_are_not_clipped():
    assert_same(run(sgd(clip=1e3), 3), run(sgd(), 3))


def test_a_group_without_a_rate_is_an_error():
    with pytest.raises(ValueError, match="adapter"):
        sgd().init({**PARAMS, "adapter": np.array(1.0)})


def test_one_cycle_s_ends():
    schedule = one_cycle(0.4, steps=100, warmup=0.1, floor=1e-3)
    assert float(schedule(0)) == pytest.approx(0.4 / 10)
    assert float(schedule(10)) == pytest.approx(0.4)
    assert float(schedule(100)) == pytest.approx(0.4e-3)
    assert float(schedule(55)) == pytest.approx(0.4 * (1e-3 + 0.999 / 2))
    values = np.array([schedule(t) for t in range(101)])
    assert (np.diff(values[:11]) > 0).all() and (np.diff(values[10:]) < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_cycle_of_very_short_trainings_is_finite_and_positive(steps):
    for warmup in (0.0, 0.15, 1.0):
        schedule = one_cycle(0.4, steps, warmup, 1e-3)
        values = np.array([schedule(t) for t in range(steps)])
        assert np.isfinite(values).all() and (values > 0).all() and values.max() <= 0.4 + 1e-6


def test_adamw_decays_matrices_alone():
    optimizer = adamw(peak=0.1, steps=10, warmup=0.0, floor=0.1, weight_decay=0.5, clip=1.0)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5)
    np.testing.assert_array_equal(updates["bias"], 0)
