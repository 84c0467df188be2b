"""The methods that train on outliers, virtual ones and wild data: values, gradients and states."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from oal_jax.methods import (
    class_queue,
    doe,
    logitnorm,
    losses,
    npos,
    outlier_exposure,
    poem,
    vos,
    woods,
)
from oal_jax.runtime import distributed
from oal_jax.runtime.keys import named

ROWS, CLASSES, WIDTH, IMAGE = 16, 3, 8, (12, 12, 1)
# The programs are tiny: compiling them is the cost.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Net(nn.Module):
    """The smallest classifier with batch statistics and a head `fc`."""

    @nn.compact
    def __call__(self, images, train=False, statistics=None):
        x = nn.Conv(WIDTH, (3, 3), use_bias=False, name="conv")(images)
        mask = None if statistics is None else statistics[:, None, None, None]
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")
        features = jnp.mean(nn.relu(norm(x, mask=mask)), axis=(1, 2))
        return nn.Dense(CLASSES, name="fc")(features), features


NET = Net()


class SpyNet:
    """`Net`, and whether each call in training was told of whom the batch statistics are."""

    def __init__(self):
        self.given = []
        self.init, self.init_with_output = NET.init, NET.init_with_output

    def apply(self, *arguments, train=False, **options):
        if train:
            self.given.append("statistics" in options)
        return NET.apply(*arguments, train=train, **options)


BUILD = {
    "oe": (outlier_exposure.exposure, {}),
    "energy": (outlier_exposure.energy, {"margin_in": -6.0, "margin_out": -1.0}),
    "poem": (
        poem.posterior_sampling,
        {
            "margin_in": -6.0,
            "margin_out": -1.0,
            "candidate_ratio": 2,
            "buffer_size": 24,
            "refresh_steps": 2,
        },
    ),
    "doe": (doe.worst_perturbation, {}),
    "vos": (vos.virtual_outliers, {"queue_size": 6, "samples": 50, "keep": 2}),
    "npos": (
        npos.boundary_outliers,
        {
            "queue_size": 6,
            "neighbour": 3,
            "boundary": 4,
            "anchors": 2,
            "candidates": 10,
            "keep": 3,
            "contrastive_weight": 0.1,
        },
    ),
    "logitnorm": (logitnorm.normalised_cross_entropy, {}),
    "woods": (woods.wild_mixture, {}),
}
# What a test may change without another compilation: traced. `factor` and `shift` make the
# transform of the cross-entropy.
TRACED = {
    "oe": {"weight": 0.5},
    "energy": {"weight": 0.1},
    "poem": {"weight": 0.1},
    "doe": {"weight": 1.0, "start_step": 0},
    "vos": {"weight": 0.1, "start_step": 0, "refresh_steps": 1},
    "npos": {"weight": 0.1, "start_step": 0, "refresh_steps": 1},
    "logitnorm": {"temperature": 0.5},
    "woods": {"epoch_steps": 3, "ce_limit": 0.5, "multiplier_rate": 1.0, "wild_weight": 1.0},
}
WITH_OUTLIERS = ("oe", "energy", "poem", "doe", "woods")
RANDOM = ("poem", "doe", "vos", "npos")  # those that draw something in a step


def make_method(name, factor=1.0, shift=0.0, **options):
    build, fixed = BUILD[name]
    transform = lambda ce: factor * ce + shift
    return build(NET, IMAGE, **fixed | TRACED[name] | options, ce_transform=transform)


def make_batch(name, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(ROWS) % CLASSES
    others = rng.uniform(size=(2 * ROWS, *IMAGE)) * rng.uniform(0.2, 2, size=(2 * ROWS, 1, 1, 1))
    batch = {
        "image": 0.3 * rng.uniform(size=(ROWS, *IMAGE)) + labels[:, None, None, None] / 4,
        "outlier_image": others if name == "poem" else others[:ROWS],
        "wild_image": others[ROWS:],
    }
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    return batch | {"label": jnp.asarray(labels, jnp.int32)}


@functools.cache
def fixed_variables(name):
    """Parameters and statistics from NumPy's generator; what else a method holds, as it starts."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        values = np.exp(values) if path[-1].key in ("var", "scale") else values
        return jnp.asarray(values, jnp.float32)

    params, state = quick(make_method(name).init)(jax.random.key(0))
    student = {"params": params["student"], "state": state["student"]}
    student = jax.tree_util.tree_map_with_path(draw, student)
    params, state = params | {"student": student["params"]}, state | {"student": student["state"]}
    return params, state


def loss_and_gradient(name, options, params, model_state, batch, step, key):
    (value, (state, metrics)), grads = jax.value_and_grad(
        make_method(name, **options).loss, has_aux=True
    )(params, model_state, batch, step, key)
    return grads, state, metrics | {"loss": value}


@functools.cache
def compiled(name):
    return quick(functools.partial(loss_and_gradient, name))


def gradients(name, batch=None, params=None, state=None, step=0, key=0, **options):
    """Gradient, new state and metrics of one batch."""
    fixed, fixed_state = fixed_variables(name)
    every = {"factor": 1.0, "shift": 0.0} | TRACED[name] | options
    batch = make_batch(name) if batch is None else batch
    state = fixed_state if state is None else state
    arguments = (params or fixed, state, batch, jnp.int32(step), jax.random.key(key))
    return jax.tree.map(np.asarray, compiled(name)(every, *arguments))


@functools.cache
def warm_state(name):
    """The state after two batches: queues are full, directions and posteriors are there."""
    state = fixed_variables(name)[1]
    for step in range(2):
        _, state, _ = gradients(name, make_batch(name, step), state=state, step=step)
    return state


def norm(tree):
    return float(optax.tree.norm(tree))


def difference(one, other):
    return jax.tree.map(np.subtract, one, other)


def assert_close(one, other, rtol=1e-4, atol=1e-4):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, err_msg=message, rtol=rtol, atol=atol)


def by_hand(params, images, others, statistics="id"):
    """Logits and features of ID rows and of others, in float64, normalised by `statistics`."""
    student = jax.tree.map(np.asarray, params["student"])
    both = np.concatenate([images, others])
    window = np.lib.stride_tricks.sliding_window_view(
        np.pad(both.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2)
    )
    maps = np.einsum("nhwcij,ijco->nhwo", window, student["conv"]["kernel"])
    seen = maps[: len(images)] if statistics == "id" else maps
    mean, variance = (f(seen, axis=(0, 1, 2)) for f in (np.mean, np.var))
    x = (maps - mean) / np.sqrt(variance + 1e-5) * student["bn"]["scale"] + student["bn"]["bias"]
    features = np.maximum(x, 0).mean((1, 2))
    logits = features @ student["fc"]["kernel"] + student["fc"]["bias"]
    count = len(images)
    return (logits[:count], features[:count]), (logits[count:], features[count:])


def numpy_cross_entropy(logits, labels):
    return np.mean(-scipy.special.log_softmax(logits, axis=1)[np.arange(len(labels)), labels])


@pytest.fixture(params=sorted(BUILD))
def name(request):
    return request.param


# Every method


def test_steps_are_finite_keep_all_shapes_and_bring_the_loss_down(name):
    params, state = start, before = fixed_variables(name)
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    history = []
    for step in range(25):
        grads, state, metrics = gradients(name, params=params, state=state, step=step, key=step)
        assert kind((grads, state)) == kind((start, before))  # so that steps fit a scan
        assert all(v.shape == () for v in metrics.values())
        rate = np.float32(0.1 / max(1.0, norm(grads)))
        params = difference(params, jax.tree.map(functools.partial(np.multiply, rate), grads))
        history.append({k: float(v) for k, v in metrics.items()})
    assert all(np.isfinite(v) for m in history for v in m.values())
    first = 2 if name in ("vos", "npos") else 0  # their queues are full in the second step
    ce, total = ([m[k] for m in history[first:]] for k in ("ce", "loss"))
    assert ce[-1] < ce[0]
    # Multipliers that rise make the Lagrangian larger.
    assert total[-1] < total[0] or name == "woods"
    for group in params:
        assert norm(difference(params[group], start[group])) > 1e-4, group


@pytest.mark.parametrize("name", ["oe", "energy", "poem", "logitnorm", "woods"])
def test_jit_changes_nothing(name):
    params, _ = fixed_variables(name)
    state, batch = jax.tree.map(jnp.asarray, warm_state(name)), make_batch(name, 5)
    value, (new, metrics) = make_method(name).loss(
        params, state, batch, jnp.int32(2), jax.random.key(3)
    )
    _, jitted, jitted_metrics = gradients(name, batch, state=state, step=2, key=3)
    assert_close((new, metrics | {"loss": value}), (jitted, jitted_metrics), rtol=1e-3)


def test_the_key_alone_decides_what_is_drawn(name):
    state = warm_state(name)
    one, again, other = (gradients(name, state=state, step=2, key=k) for k in (0, 0, 1))
    assert_close(one, again, rtol=0, atol=0)
    moved = norm(difference(one[0], other[0])) > 1e-6 or one[2]["loss"] != other[2]["loss"]
    assert moved == (name in RANDOM)


def test_a_transform_touches_the_id_cross_entropy_alone(name):
    state = warm_state(name)
    plain, _, metrics = gradients(name, state=state, step=2)
    none, _, _ = gradients(name, state=state, step=2, factor=0.0)
    twice, _, changed = gradients(name, state=state, step=2, factor=2.0, shift=0.25)
    same = lambda m: {k: v for k, v in m.items() if k != "loss"}
    assert_close(same(metrics), same(changed), rtol=0, atol=1e-6)
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
        assert_close(difference(twice, plain), difference(plain, none))
    np.testing.assert_allclose(changed["loss"] - metrics["loss"], expected, rtol=1e-4)
    outside = set(plain) - {"student"}
    assert norm(difference(*({g: t[g] for g in outside} for t in (plain, twice)))) < 1e-6


@pytest.mark.parametrize("name", WITH_OUTLIERS)
def test_batch_statistics_never_see_an_outlier_unless_shared(name):
    batch = make_batch(name)
    wild = batch | {k: 20 + 9 * v for k, v in batch.items() if k in ("outlier_image", "wild_image")}
    one, other = (gradients(name, b) for b in (batch, wild))
    assert one[2]["loss"] != other[2]["loss"]
    assert_close(one[1]["student"], other[1]["student"], rtol=0, atol=0)
    for shared in (False, True):
        net = SpyNet()
        build, fixed = BUILD[name]
        method = build(net, IMAGE, **fixed | TRACED[name], shared_statistics=shared)
        arguments = (*fixed_variables(name), batch, jnp.int32(0), jax.random.key(0))
        jax.eval_shape(method.loss, *arguments)
        assert net.given and not any(given == shared for given in net.given)


@pytest.mark.parametrize("name", ["poem", "vos"])
def test_four_devices_compute_what_one_does(name):
    batch, mesh = make_batch(name), distributed.make_mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    variables = distributed.replicate((fixed_variables(name)[0], warm_state(name)), mesh)
    split = {k: jax.device_put(v, sharding) for k, v in batch.items()}
    assert len(split["image"].addressable_shards) == 4
    four = gradients(name, split, params=variables[0], state=variables[1], step=2)
    assert_close(four, gradients(name, batch, state=warm_state(name), step=2), rtol=1e-3)


# Images of outliers


@pytest.mark.parametrize("statistics", ["id", "shared"])
def test_oe_is_cross_entropy_and_that_to_the_uniform(statistics):
    params, state = fixed_variables("oe")
    batch = make_batch("oe")
    (logits, _), (outliers, _) = by_hand(params, batch["image"], batch["outlier_image"], statistics)
    ce = numpy_cross_entropy(logits, batch["label"])
    uniform = np.mean([-np.log(scipy.special.softmax(z)).mean() for z in outliers])
    method = make_method("oe", shared_statistics=statistics == "shared")
    value, (_, metrics) = method.loss(params, state, batch, jnp.int32(0), jax.random.key(0))
    np.testing.assert_allclose(metrics["ce"], ce, rtol=1e-4)
    np.testing.assert_allclose(metrics["outlier_exposure"], uniform, rtol=1e-4)
    np.testing.assert_allclose(value, ce + 0.5 * uniform, rtol=1e-4)


def test_energy_holds_the_energies_apart_by_squared_hinges():
    params, _ = fixed_variables("energy")
    batch = make_batch("energy")
    (logits, _), (outliers, _) = by_hand(params, batch["image"], batch["outlier_image"])
    energies = [-np.log(np.exp(z).sum(1)) for z in (logits, outliers)]
    hinge_in = np.mean(np.maximum(energies[0] + 6, 0) ** 2)
    hinge_out = np.mean(np.maximum(-1 - energies[1], 0) ** 2)
    assert hinge_in > 0.1 and hinge_out > 0.01
    _, _, metrics = gradients("energy")
    ce = numpy_cross_entropy(logits, batch["label"])
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
    batch = make_batch("logitnorm")
    (logits, _), _ = by_hand(params, batch["image"], batch["image"])
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
    value = quick(loss)(best)
    bound = np.log1p((classes - 1) * np.exp(-np.sqrt(classes / (classes - 1)) / temperature))
    np.testing.assert_allclose(value, np.full(classes, bound), rtol=1e-4)
    slope = quick(jax.grad(lambda z: losses.unit_rows(z).sum()))(jnp.zeros((2, 3)))
    assert np.isfinite(slope).all()


# POEM


def test_poem_trains_on_the_candidates_nearest_to_the_boundary_and_on_no_other():
    params, _ = fixed_variables("poem")
    state, batch = warm_state("poem"), make_batch("poem", 7)
    # A posterior without spread: beta is its mean.
    state = state | {"poem": state["poem"] | {"factor": 1e6 * np.eye(WIDTH, dtype=np.float32)}}
    state = jax.tree.map(jnp.asarray, state)
    variables = {"params": params["student"], **state["student"]}
    _, features = NET.apply(variables, batch["outlier_image"], train=False)
    distance = np.abs(np.asarray(features, np.float64) @ state["poem"]["mean"])
    expected = np.sort(np.argsort(distance)[:ROWS])
    method = make_method("poem", weight=1.0)
    value = lambda images: method.loss(
        params, state, batch | {"outlier_image": images}, jnp.int32(2), jax.random.key(0)
    )[0]
    pull = quick(jax.grad(value))(batch["outlier_image"])
    sizes = np.abs(pull).max((1, 2, 3))
    left_out = np.setdiff1d(np.arange(2 * ROWS), expected)
    assert (sizes[left_out] == 0).all()
    assert (sizes[expected] > 0).sum() > ROWS / 2  # the rest lie beyond their margin
    _, new, metrics = gradients("poem", batch, state=state, step=2)
    np.testing.assert_allclose(metrics["boundary_distance"], distance[expected].mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["candidate_distance"], distance.mean(), rtol=1e-3)
    # The buffer holds their features, and goes on behind those of two steps: 2 * 16 % 24 = 8.
    rows = new["poem"]["buffer"]["rows"][1]
    order = np.argsort(distance)[:ROWS]
    got = rows[(8 + np.arange(ROWS)) % 24]
    assert_close(np.sort(got, axis=0), np.sort(features[order], axis=0))
    np.testing.assert_array_equal(rows[:8], state["poem"]["buffer"]["rows"][1][:8])


def test_posterior_is_that_of_bayesian_linear_regression_where_cholesky_fails():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 500, 40)) * 0.01 + 10 * rng.normal(size=(2, 1, 40)) + 20
    rows[:, :, 30:] = rows[:, :, :10]  # and redundant
    rows[1, 400:] = 0  # not yet written
    rows = rows.astype(np.float32)
    z, y = rows.reshape(-1, 40).astype(np.float64), np.repeat([-3.9, 3.9], 500)
    precision = z.T @ z / 0.5 + np.eye(40) / 20
    assert np.isnan(jnp.linalg.cholesky(jnp.float32(precision))).any()
    mean, factor = quick(poem.posterior)(jnp.asarray(rows), jnp.array([-3.9, 3.9]), 0.5, 20.0)
    factor = np.asarray(factor, np.float64)
    expected = np.linalg.solve(precision, z.T @ y / 0.5)
    np.testing.assert_allclose(factor.T @ factor, precision, rtol=1e-4)
    np.testing.assert_allclose(z @ mean, z @ expected, atol=0.02)
    # Of the spread, the widest direction is the prior's.
    spread = np.linalg.inv(factor.T @ factor)
    np.testing.assert_allclose(np.linalg.eigvalsh(spread)[-1], 20, rtol=0.05)


def test_beta_has_the_posterior_s_covariance():
    rng = np.random.default_rng(1)
    factor = np.triu(rng.normal(size=(3, 3))) + 2 * np.eye(3)
    mean = rng.normal(size=3)
    keys = jax.random.split(jax.random.key(0), 40_000)
    draw = lambda k: poem.sample_beta(k, jnp.float32(mean), jnp.float32(factor), 4.0)
    draws = np.asarray(quick(jax.vmap(draw))(keys), np.float64)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(draws.T), 4 * np.linalg.inv(factor.T @ factor), atol=0.03)


# DOE


def test_doe_is_oe_at_weights_moved_up_the_regret():
    params, _ = fixed_variables("doe")
    batch = make_batch("doe")
    grads, state, metrics = gradients("doe")

    def outlier_logits(student):
        images = jnp.concatenate([batch["image"], batch["outlier_image"]])
        variables = {"params": student, **fixed_variables("doe")[1]["student"]}
        mask = jnp.arange(2 * ROWS) < ROWS
        out, _ = NET.apply(variables, images, train=True, statistics=mask, mutable=["batch_stats"])
        return out[0][ROWS:]

    exposure = lambda z: -jnp.mean(jax.nn.log_softmax(z, axis=-1))

    def regret(student):
        z = outlier_logits(student)
        slope = jnp.mean(jnp.sum((jax.nn.softmax(z) - 1 / CLASSES) * z, axis=-1))
        return slope**2

    student, direction = params["student"], state["doe"]["direction"]
    size, raw = quick(jax.value_and_grad(regret))(student)
    np.testing.assert_allclose(metrics["regret"], size, rtol=1e-4)
    for layer in ("conv", "fc"):
        w, g = (np.asarray(t[layer]["kernel"]) for t in (student, raw))
        expected = g / np.linalg.norm(g) * np.linalg.norm(w)
        np.testing.assert_allclose(direction[layer]["kernel"], expected, rtol=1e-3, atol=1e-4)
    assert norm({k: direction[k] for k in ("bn",)}) == norm(direction["fc"]["bias"]) == 0
    step = lambda g: jax.tree.map(lambda w, d: w + g * d, student, direction)
    assert regret(step(1e-3)) > size > regret(step(-1e-3))
    chosen = float(metrics["perturbation"])
    assert min(abs(chosen - g) for g in (1e-1, 1e-2, 1e-3, 1e-4)) < 1e-7
    # The gradient: that of CE here and of OE there, with the direction held.
    assert_close(
        difference(grads["student"], gradients("doe", weight=0.0)[0]["student"]),
        quick(jax.grad(lambda s: exposure(outlier_logits(s))))(step(chosen)),
        rtol=1e-3,
    )


def test_doe_averages_directions_and_draws_every_size():
    state = warm_state("doe")
    first = gradients("doe", make_batch("doe", 3))[1]["doe"]["direction"]
    after = gradients("doe", make_batch("doe", 3), state=state)[1]["doe"]
    mixed = jax.tree.map(lambda a, b: 0.6 * a + 0.4 * b, state["doe"]["direction"], first)
    assert_close(after["direction"], mixed)
    assert after["steps"] == 3
    sizes = [float(gradients("doe", key=k)[2]["perturbation"]) for k in range(30)]
    assert set(np.round(np.log10(sizes)).astype(int)) == {-1, -2, -3, -4}


def test_doe_before_its_start_is_outlier_exposure():
    grads, state, metrics = gradients("doe", start_step=5, step=4)
    plain, _, expected = gradients("oe", make_batch("doe"), weight=1.0)
    assert_close(grads["student"], plain["student"])
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert norm(state["doe"]["direction"]) == 0 == state["doe"]["steps"]


# Queues


def test_a_queue_keeps_the_latest_rows_of_every_class():
    rng, size = np.random.default_rng(0), 4
    queue = class_queue.empty(CLASSES, size, 2)
    model = {c: collections.deque(maxlen=size) for c in range(CLASSES)}
    push = quick(class_queue.push)
    for step in range(12):
        # The third batch is of one class alone, and more than its queue holds.
        labels = np.full(7, 1) if step == 2 else rng.integers(CLASSES, size=7)
        features = rng.normal(size=(7, 2)).astype(np.float32)
        queue = push(queue, features, labels)
        for row, label in zip(features, labels, strict=True):
            model[label].append(row)
        assert bool(class_queue.is_full(queue)) == all(len(q) == size for q in model.values())
        for label, expected in model.items():
            got = np.asarray(queue["rows"][label])
            assert {tuple(r) for r in got if r.any()} == {tuple(r) for r in expected}
    # Of 9 rows for 4 places the first 5 go nowhere, and no place is written twice.
    places, _ = class_queue.slots(jnp.array([0, 3, 0]), jnp.full(9, 1), size)
    assert places.tolist() == [4, 4, 4, 4, 4, 0, 1, 2, 3]
    # The oldest is the next to go.
    oldest = {c: q[0] for c, q in model.items()}
    after = push(queue, np.ones((CLASSES, 2), np.float32), np.arange(CLASSES))["rows"]
    for label, row in oldest.items():
        assert not (np.asarray(after[label]) == row).all(1).any()
    value = lambda x: class_queue.push(queue, x, jnp.array([0]))["rows"].sum()
    assert not jax.grad(value)(jnp.ones((1, 2))).any()


@pytest.mark.parametrize(("name", "group"), [("vos", "energy"), ("npos", "discriminator")])
def test_nothing_happens_before_the_start_or_before_the_queues_are_full(name, group):
    fresh = fixed_variables(name)[1]
    none = gradients(name, state=warm_state(name), step=2, weight=0.0)[0]
    for state, step, start in ((fresh, 0, 0), (warm_state(name), 4, 5)):
        grads, new, metrics = gradients(name, state=state, step=step, start_step=start)
        assert_close(grads["student"], none["student"])
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
    state, batch = warm_state("vos"), make_batch("vos", 4)
    params = params | {
        "energy": {
            "class_weight": jnp.array([0.5, 2.0, -1.0]),
            "scale": jnp.float32(0.3),
            "offset": jnp.float32(-0.7),
        }
    }
    _, new, metrics = gradients("vos", batch, params=params, state=state, step=2, key=9)
    (logits, features), _ = by_hand(params, batch["image"], batch["image"])
    rows = np.asarray(new["vos"]["queue"]["rows"], np.float64)
    means = rows.mean(1)
    centred = (rows - means[:, None]).reshape(-1, WIDTH)
    covariance = centred.T @ centred / len(centred) + 1e-4 * np.eye(WIDTH)
    np.testing.assert_allclose(new["vos"]["means"], means, rtol=1e-4, atol=1e-5)
    factor = new["vos"]["factor"]
    np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-3, atol=1e-5)
    outliers = quick(vos.least_likely, static_argnums=(3, 4))(
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
    classes, samples, keep, width = 3000, 40, 3, 6
    rng = np.random.default_rng(0)
    factor = np.tril(rng.normal(size=(width, width))) + 3 * np.eye(width)
    means = rng.normal(size=(classes, width))
    drawn = quick(vos.least_likely, static_argnums=(3, 4))(
        jax.random.key(0), jnp.float32(means), jnp.float32(factor), samples, keep
    )
    noise = np.asarray(drawn, np.float64).reshape(classes, keep, width) - means[:, None]
    white = np.linalg.solve(factor, noise.reshape(-1, width).T).T.reshape(noise.shape)
    quantiles = scipy.stats.chi2.cdf((white**2).sum(-1), width)
    for place in range(keep):  # the place-th largest of n uniform numbers
        exact = scipy.stats.beta(samples - place, place + 1)
        assert scipy.stats.kstest(quantiles[:, place], exact.cdf).pvalue > 0.01
    directions = (white / np.linalg.norm(white, axis=-1, keepdims=True)).reshape(-1, width)
    np.testing.assert_allclose(directions.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(np.cov(directions.T), np.eye(width) / width, atol=0.01)


@pytest.mark.parametrize(("name", "kept"), [("vos", "means"), ("npos", "outliers")])
def test_what_is_sampled_is_kept_between_refreshes(name, kept):
    state = warm_state(name)
    old, same, new = (
        s[name][kept]
        for s in (
            state,
            gradients(name, state=state, step=5, key=8, refresh_steps=3)[1],
            gradients(name, state=state, step=6, key=8, refresh_steps=3)[1],
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
    keep = {"step": 5, "refresh_steps": 3}
    one, two = (gradients("npos", state=s, **keep)[0] for s in (state, other))
    change = difference(one, two)
    assert norm(change["discriminator"]) > 1e-3
    assert norm(change["student"]) < 1e-6
    effect = difference(one, gradients("npos", state=state, **keep, weight=0.0)[0])
    assert norm(effect["student"]["conv"]) > 1e-4
    assert norm(effect["student"]["fc"]) < 1e-5


def test_npos_value_is_the_logistic_loss_of_unit_features_and_the_contrast():
    params, _ = fixed_variables("npos")
    state, batch = warm_state("npos"), make_batch("npos", 4)
    _, new, metrics = gradients("npos", batch, state=state, step=2)
    (logits, features), _ = by_hand(params, batch["image"], batch["image"])
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
    assert (np.asarray(quick(value)(rows)) > 0).tolist() == [True, True, False, False]
    assert np.isfinite(quick(jax.grad(lambda r: value(r).sum()))(rows)).all()


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
    np.testing.assert_allclose(quick(value)(np.float32(c)), expected, atol=1e-6)
    slope = quick(jax.grad(lambda x: value(x).sum()))(np.float32(c))
    np.testing.assert_allclose(slope, np.maximum(penalty * c + multiplier, 0), atol=1e-5)


def test_woods_value_is_the_wild_term_and_both_constraints():
    params, state = fixed_variables("woods")
    batch = make_batch("woods")
    params = params | {"energy": {"scale": jnp.float32(0.4), "offset": jnp.float32(-0.9)}}
    held = {"multiplier": np.float32([0.5, 2.0]), "penalty": np.float32([1.5, 3.0])}
    state = state | {"woods": state["woods"] | held}
    _, new, metrics = gradients("woods", batch, params=params, state=state, ce_limit=0.2)
    (logits, _), (wild, _) = by_hand(params, batch["image"], batch["wild_image"])
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
        batch = make_batch("woods", step)
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
