"""Every training method on a tiny batch: one step everywhere, and who gets a gradient from what."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_outlier_methods
from oal_jax.config.ranges import CHOICES

from oal_jax.methods import ce, kd, losses, masking, oal, pixel, unleashing_mask
from oal_jax.methods.base import Method
from oal_jax.models.mutual_information import GaussianPredictor
from oal_jax.models.projector import Projector
from oal_jax.runtime import distributed, ops
from oal_jax.training.optimizer import grouped_sgd
from oal_jax.training.state import TrainState, init_state, make_train_step

ROWS, CLASSES, TEACHER = 8, 3, 6
IMAGE, LATENT = (6, 6, 1), (5, 5, 4)
RATES = {"student": 0.05, "projector": 0.05, "adapter": 0.02, "club": 0.02, "energy": 0.05}
RATES["mask"] = 0.05


class Net(nn.Module):
    """The smallest classifier with what the methods rely on: batch statistics and a head `fc`."""

    feature_width: int = 5

    @nn.compact
    def __call__(self, images, train=False, statistics=None):
        x = nn.Conv(self.feature_width, (3, 3), use_bias=False, name="conv")(images)
        mask = None if statistics is None else statistics[:, None, None, None]
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x, mask=mask)
        features = jnp.mean(nn.relu(x), axis=(1, 2))
        return nn.Dense(CLASSES, name="fc")(features), features


NET = Net()
SHAPES = (NET, IMAGE, TEACHER)


QUICK = {"xla_backend_optimization_level": 0}  # the programs are tiny: compiling them is the cost

# Weights that a test may change; they are traced, so that one program serves all their values.
WEIGHTS = {
    "logit_weight": 4.0,
    "feature_weight": 8.0,
    "pixel_weight": 0.5,
    "energy_weight": 0.5,
    "adapter_weight": 0.05,
    "ramp_start": -2.0,
    "ramp_end": -1.0,
    "knn_weight": 0.1,
    "latent_weight": 0.2,
}


def make_method(name, weights, **more) -> Method:
    if name == "ce":
        return ce.cross_entropy(NET, IMAGE, **more)
    if name in ("um", "umap"):  # constraints above and below the first loss
        constraint = unleashing_mask.transform(3.0 if name == "um" else 0.5, 1.0)
        method = ce.cross_entropy(NET, IMAGE, ce_transform=constraint)
        return method if name == "um" else masking.with_mask(method, 0.8, freeze=False)
    pick = lambda *names: {n: weights[n] for n in ("logit_weight", "feature_weight", *names)}
    if name == "kd":
        return kd.distillation(*SHAPES, **pick(), **more)
    if name == "pixel":
        return pixel.outlier_exposure(*SHAPES, **pick("pixel_weight"), **more)
    if name in ("oal energy", "oal energy without outliers"):
        return oal.energy(
            *SHAPES,
            LATENT if name == "oal energy" else None,
            **pick("energy_weight", "adapter_weight"),
            ramp_steps=(weights["ramp_start"], weights["ramp_end"]),
            feature_outliers=name == "oal energy",
            **more,
        )
    return oal.club(
        *SHAPES,
        int(np.prod(LATENT)),
        **pick("knn_weight", "latent_weight"),
        alternate=name == "oal alternate",
        **more,
    )


# Loss and gradient norm of the first step from `fixed_variables` on `make_batch`.
GOLDEN = {
    "ce": (1.59452, 1.78784),
    "kd": (26.4582, 16.195),
    "pixel": (27.33836, 17.23155),
    "oal energy": (29.9064, 25.0551),
    "oal reference": (12.405, 6.5838),
    "oal alternate": (45.7344, 221.721),
    "um": (6.0 - 1.59452, 1.78784),  # the constraint's reflection of ce's
    "umap": (2.7719, 2.73051),
}


def make_batch(method_name, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(ROWS) % CLASSES
    image = 0.3 * rng.uniform(size=(ROWS, *IMAGE)) + labels[:, None, None, None] / 4
    latents = rng.normal(size=(2, ROWS, *LATENT))
    batch = {
        "image": image,
        "label": labels,
        "teacher_logits": 3 * np.eye(CLASSES)[labels] + rng.normal(size=(ROWS, CLASSES)),
        "teacher_features": 2 * rng.normal(size=(ROWS, TEACHER)),
        "latent": latents[0],
        "outlier": rng.normal(size=(ROWS, TEACHER)),
        "outlier_latent": latents[1],
        "outlier_image": rng.uniform(size=(ROWS, *IMAGE)),
    }
    if method_name in ("oal reference", "oal alternate"):
        batch["outlier_latent"] = latents[1].reshape(ROWS, -1)
    return {k: jnp.asarray(v, jnp.int32 if k == "label" else jnp.float32) for k, v in batch.items()}


@functools.cache
def fixed_variables(name):
    """Parameters and statistics from NumPy's generator: no change of JAX's can move them."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        values = np.exp(values) if path[-1].key in ("var", "scale") else values
        return values.astype(np.float32)  # kept for other tests: nothing of a trace may be in it

    shapes = jax.eval_shape(make_method(name, WEIGHTS).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def start(name):
    """The first state of a training, and its step."""
    params, model_state = fixed_variables(name)
    optimizer = grouped_sgd(
        {group: RATES[group] for group in params},
        steps=100,
        warmup=0.0,
        floor=0.0,
        momentum=0.9,
        weight_decay=1e-4,
        clip=1.0,
    )
    state = TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(params))
    train_step = make_train_step(make_method(name, WEIGHTS), optimizer, jax.random.key(1))
    return state, jax.jit(train_step, compiler_options=QUICK)


def loss_and_gradient(name, weights, params, model_state, batch):
    loss = make_method(name, weights).loss
    (value, (state, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
        params, model_state, batch, jnp.zeros((), jnp.int32), jax.random.key(0)
    )
    return grads, state, metrics | {"loss": value}


@functools.cache
def compiled_gradient(name):
    return jax.jit(functools.partial(loss_and_gradient, name), compiler_options=QUICK)


def gradients(name, batch, params=None, **weights):
    """d loss / d params, the new batch statistics and the metrics of one batch at step 0."""
    fixed, model_state = fixed_variables(name)
    compute = compiled_gradient(name)
    return jax.tree.map(np.asarray, compute(WEIGHTS | weights, params or fixed, model_state, batch))


def norm(tree):
    return float(optax.tree.norm(tree))


def difference(one, other):
    return jax.tree.map(np.subtract, one, other)


def assert_trees_close(one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.fixture(params=sorted(GOLDEN))
def name(request):
    return request.param


def test_every_method_of_the_config_is_tested_here():
    names = {name.split()[0] for name in GOLDEN} | set(test_outlier_methods.BUILD)
    micl = {name.split()[1] for name in GOLDEN if " " in name}
    assert names == set(CHOICES["method.name"])
    assert micl == set(CHOICES["method.micl"])


def test_steps_are_finite_golden_and_bring_the_loss_down(name):
    batch = make_batch(name)
    before, step = start(name)
    state, history = before, []
    for _ in range(12):
        state, metrics = step(state, batch)
        assert all(v.shape == () for v in metrics.values())
        history.append({k: float(v) for k, v in metrics.items()})
    assert all(np.isfinite(v) for m in history for v in m.values())
    first = (history[0]["loss"], history[0]["gradient_norm"])
    np.testing.assert_allclose(first, GOLDEN[name], rtol=2e-4)
    assert history[-1]["loss"] < history[0]["loss"] - 0.05 * abs(history[0]["loss"])
    assert int(state.step) == 12
    assert history[-1]["parameter_norm"] == pytest.approx(norm(state.params))
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for group in state.params:
        assert norm(difference(state.params[group], before.params[group])) > 1e-4, group


def test_jit_changes_nothing(name):
    batch = make_batch(name)
    loss = make_method(name, WEIGHTS).loss
    value, (state, metrics) = loss(*fixed_variables(name), batch, jnp.array(0), jax.random.key(0))
    assert_outcomes_close((state, metrics | {"loss": value}), gradients(name, batch)[1:])


@pytest.mark.parametrize("name", ["ce", "kd", "oal energy", "oal reference", "pixel"])
def test_a_transform_of_the_cross_entropy_touches_nothing_else(name):
    batch = make_batch(name)
    method = make_method(name, WEIGHTS, ce_transform=lambda ce: 10 * ce)
    loss = jax.jit(
        lambda b: method.loss(*fixed_variables(name), b, jnp.array(0), jax.random.key(0))
    )
    value, (_, metrics) = loss(batch)
    plain = gradients(name, batch)[2]
    np.testing.assert_allclose(value, plain["loss"] + 9 * plain["ce"], rtol=1e-5)
    np.testing.assert_allclose(metrics["ce"], plain["ce"], rtol=1e-5)


def test_four_devices_compute_what_one_does(name):
    batch, mesh = make_batch(name), distributed.make_mesh()
    assert mesh.shape["data"] == 4
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = jax.device_put(batch, sharding)
    assert [s.data.shape[0] for s in split["image"].addressable_shards] == [ROWS // 4] * 4
    variables = distributed.replicate(fixed_variables(name), mesh)
    four = compiled_gradient(name)(WEIGHTS, *variables, split)
    assert len(four[0]["student"]["fc"]["kernel"].sharding.device_set) == 4
    assert_outcomes_close(four, gradients(name, batch))


def assert_outcomes_close(one, other):
    for a, b in zip(one, other, strict=True):
        assert_trees_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_fresh_state_is_finite_and_of_the_key():
    method, optimizer = make_method("kd", WEIGHTS), optax.sgd(0.1, momentum=0.9)
    first, again, other = (init_state(method, optimizer, jax.random.key(s)) for s in (0, 0, 1))
    assert int(first.step) == 0 and norm(first.opt_state) == 0
    assert_trees_close(first, again, rtol=0)
    for group in first.params:
        assert 0.1 < norm(difference(first.params[group], other.params[group])) < 1e3


# Distillation


def test_dt_learns_through_the_target_of_the_feature_term_alone():
    batch = make_batch("kd")
    assert norm(gradients("kd", batch)[0]["projector"]) > 1e-2
    assert norm(gradients("kd", batch, feature_weight=0.0)[0]["projector"]) == 0


def test_distillation_is_cross_entropy_and_the_weighted_divergences():
    batch = make_batch("kd")
    _, _, metrics = gradients("kd", batch)
    _, _, plain = gradients("ce", batch)
    assert metrics["kd_logits"] > 0.01 and metrics["kd_features"] > 0.01
    expected = metrics["ce"] + 4 * metrics["kd_logits"] + 8 * metrics["kd_features"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    student = {
        k: v["student"] for k, v in zip(("params", "stats"), fixed_variables("kd"), strict=True)
    }
    (logits, features), _ = NET.apply(
        {"params": student["params"], **student["stats"]},
        batch["image"],
        train=True,
        mutable=["batch_stats"],
    )
    log_softmax = lambda z: z - np.log(np.exp(z).sum(1, keepdims=True))
    divergence = lambda p, q: (np.exp(p) * (p - q)).sum(1).mean()
    teacher, logits = (np.asarray(z, np.float64) for z in (batch["teacher_logits"], logits))
    np.testing.assert_allclose(
        metrics["kd_logits"], divergence(log_softmax(teacher), log_softmax(logits)), rtol=1e-4
    )
    right = -log_softmax(logits)[np.arange(ROWS), batch["label"]].mean()
    np.testing.assert_allclose(metrics["ce"], right, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == batch["label"]).mean())
    target = np.asarray(
        Projector(NET.feature_width).apply(
            {
                "params": fixed_variables("kd")[0]["projector"],
                **fixed_variables("kd")[1]["projector"],
            },
            ops.unit(batch["teacher_features"]),
            train=True,
            mutable=["batch_stats"],
        )[0],
        np.float64,
    )
    np.testing.assert_allclose(
        metrics["kd_features"],
        divergence(log_softmax(target), log_softmax(np.asarray(features, np.float64))),
        rtol=1e-4,
    )
    assert plain["loss"] == plain["ce"]


@pytest.mark.parametrize("name", ["kd", "oal energy", "oal reference"])
def test_dt_sees_directions_except_in_the_reference(name):
    batch = make_batch(name)
    lengths = jnp.linspace(0.5, 4, ROWS)[:, None]
    longer = batch | {"teacher_features": batch["teacher_features"] * lengths}
    one, other = (gradients(name, b)[2]["kd_features"] for b in (batch, longer))
    assert np.isclose(one, other, rtol=1e-4) == (name != "oal reference")


# CLUB


def manual_club(batch, loss_of):
    """Gradients of `loss_of(mean, log variance, features)` by (q's parameters, features)."""
    params, model_state = fixed_variables("oal reference")
    variables = {"params": params["student"], **model_state["student"]}
    (_, features), _ = NET.apply(variables, batch["image"], train=True, mutable=["batch_stats"])

    def value(q_params, features):
        total = 0.0
        for key, hidden in (("outlier", (256,)), ("outlier_latent", (32, 16, 256))):
            q = GaussianPredictor(NET.feature_width, hidden)
            mean, log_variance = q.apply({"params": q_params[key]}, batch[key])
            total += loss_of(key, mean, log_variance, features)
        return total

    return jax.jit(jax.grad(value, (0, 1)))(params["club"], features)


def all_pairs(key, mean, log_variance, y):
    """CLUB as published, weighted as the reference weights its two terms."""
    density = -((mean[:, None] - y[None]) ** 2) / 2 * jnp.exp(-log_variance)[:, None]
    paired = jnp.trace(density.sum(-1)) / ROWS
    return {"outlier": 0.1, "outlier_latent": 0.2}[key] * (paired - density.sum(-1).mean())


def likelihood(key, mean, log_variance, y):
    del key
    return -jnp.mean(losses.gaussian_log_likelihood(mean, log_variance, y))


def through_features(batch, cotangent):
    """The student's gradient that a gradient on its features becomes."""
    params, model_state = fixed_variables("oal reference")

    def features(student):
        variables = {"params": student, **model_state["student"]}
        return NET.apply(variables, batch["image"], train=True, mutable=["batch_stats"])[0][1]

    return jax.jit(lambda s: jax.vjp(features, s)[1](cotangent)[0])(params["student"])


def test_reference_minimises_club_in_q_and_in_the_student():
    batch = make_batch("oal reference")
    grads, _, metrics = gradients("oal reference", batch)
    none, _, _ = gradients("oal reference", batch, knn_weight=0.0, latent_weight=0.0)
    of_q, of_features = manual_club(batch, all_pairs)
    assert norm(of_q) > 1e-3
    assert_trees_close(grads["club"], of_q, rtol=1e-3, atol=1e-5)
    student = through_features(batch, of_features)
    assert norm(student) > 1e-3
    assert_trees_close(difference(grads["student"], none["student"]), student, rtol=1e-3, atol=1e-4)
    assert norm(difference(grads["projector"], none["projector"])) < 1e-5
    for key in ("outlier", "outlier_latent"):
        assert metrics[f"club_gradient_{key}"] > 1e-3
        assert metrics[f"club_expected_gradient_{key}"] < 1e-6


def test_alternate_fits_q_by_likelihood_and_moves_the_student_by_club():
    batch = make_batch("oal alternate")
    grads, _, _ = gradients("oal alternate", batch)
    none, _, _ = gradients("oal alternate", batch, knn_weight=0.0, latent_weight=0.0)
    # q: the likelihood, and nothing of CLUB.
    of_q, _ = manual_club(batch, likelihood)
    assert_trees_close(grads["club"], of_q, rtol=1e-3, atol=1e-4)
    assert_trees_close(grads["club"], none["club"], rtol=1e-5, atol=1e-6)
    # The student: CLUB with q as it is, and nothing of the likelihood.
    _, of_features = manual_club(batch, all_pairs)
    assert_trees_close(
        difference(grads["student"], none["student"]),
        through_features(batch, of_features),
        rtol=1e-3,
        atol=1e-4,
    )
    plain, _, _ = gradients("oal reference", batch, knn_weight=0.0, latent_weight=0.0)
    assert_trees_close(none["student"], plain["student"], rtol=1e-4, atol=1e-5)


def test_over_all_pairings_the_reference_does_nothing_to_the_student():
    batch = {k: v[:4] for k, v in make_batch("oal reference").items()}
    params, model_state = fixed_variables("oal reference")
    orders = jnp.array(list(itertools.permutations(range(4))))

    def loss(student, order, weights):
        paired = batch | {k: batch[k][order] for k in ("outlier", "outlier_latent")}
        method = make_method("oal reference", WEIGHTS | weights)
        return method.loss(
            params | {"student": student}, model_state, paired, 0, jax.random.key(0)
        )[0]

    def effect(order):
        without = {"knn_weight": 0.0, "latent_weight": 0.0}
        term = lambda student: loss(student, order, {}) - loss(student, order, without)
        return jax.grad(term)(params["student"])

    effects = jax.jit(lambda: jax.vmap(effect)(orders))()
    one = norm(jax.tree.map(lambda g: g[0], effects))
    average = norm(jax.tree.map(lambda g: jnp.mean(g, axis=0), effects))
    assert one > 1e-3 and average < 1e-2 * one


# Outliers through the head


def energy_effect(batch, name="oal energy"):
    """Gradient of the energy term alone."""
    weighted = gradients(name, batch, adapter_weight=0.0)[0]
    return difference(weighted, gradients(name, batch, adapter_weight=0.0, energy_weight=0.0)[0])


@pytest.mark.parametrize("moved", ["outlier", "outlier_latent"])
def test_outliers_reach_the_head_and_nothing_before_it(moved):
    batch = make_batch("oal energy")
    effect = energy_effect(batch)
    assert norm(effect["student"]["fc"]["kernel"]) > 1e-2
    assert norm(effect["energy"]) > 1e-3
    assert norm(effect["projector"]) < 1e-6
    assert norm(effect["adapter"]) == 0
    assert norm(effect["student"]["conv"]) > 1e-3  # the ID side reaches the whole student
    other = energy_effect(batch | {moved: -batch[moved]})
    change = difference(effect, other)
    assert norm(change["student"]["fc"]["kernel"]) > 1e-3
    assert norm(change["student"]["conv"]) < 1e-6
    assert norm(change["student"]["bn"]) < 1e-6


def test_descent_on_the_energy_term_parts_the_energies():
    batch = make_batch("oal energy")
    params = fixed_variables("oal energy")[0]
    nudged = jax.tree.map(lambda p, g: p - 0.01 * g, params, energy_effect(batch))
    before, after = (gradients("oal energy", batch, params=p)[2] for p in (params, nudged))
    gap = lambda m: 2 * m["id_energy"] - m["outlier_energy_feature"] - m["outlier_energy_latent"]
    assert gap(after) > gap(before)
    total = lambda m: m["energy_feature"] + m["energy_latent"]
    assert total(after) < total(before)


def test_the_scale_of_feature_outliers_does_not_matter():
    batch = make_batch("oal energy")
    scaled = batch | {"outlier": 27 * batch["outlier"]}
    one, other = (gradients("oal energy", b)[0] for b in (batch, scaled))
    assert_trees_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_adapter_regresses_the_student_s_features_and_does_not_pull_them():
    batch = make_batch("oal energy")
    with_term, _, metrics = gradients("oal energy", batch)
    without, _, _ = gradients("oal energy", batch, adapter_weight=0.0)
    assert norm(with_term["adapter"]) > 1e-3 and norm(without["adapter"]) == 0
    assert_trees_close(with_term["student"], without["student"], rtol=1e-4, atol=1e-6)
    assert metrics["adapter_error"] > 0


def test_before_the_ramp_energy_trains_as_distillation_does():
    batch = make_batch("oal energy")
    grads, _, _ = gradients("oal energy", batch, ramp_start=0.0, ramp_end=10.0)
    plain, _, _ = gradients("oal energy", batch, energy_weight=0.0)
    assert_trees_close(grads, plain, rtol=1e-5, atol=1e-6)


def test_without_outliers_the_id_side_trains_the_student_and_not_its_own_offset():
    batch = make_batch("oal energy")
    effect = energy_effect(batch, "oal energy without outliers")
    assert norm(effect["student"]["conv"]) > 1e-3
    assert norm(effect["energy"]) == 0


@pytest.mark.parametrize("name", ["oal energy", "oal reference", "oal alternate", "pixel"])
def test_batch_statistics_never_see_an_outlier(name):
    batch = make_batch(name)
    wild = batch | {k: 50 + 9 * v for k, v in batch.items() if k.startswith("outlier")}
    _, state, metrics = gradients(name, batch)
    _, other, other_metrics = gradients(name, wild)
    assert any(metrics[k] != other_metrics[k] for k in metrics)  # the outliers were used
    assert_trees_close(state, other, rtol=0)
    before = fixed_variables(name)[1]
    for group in ("student", "projector"):
        assert norm(difference(state[group], before[group])) > 1e-2  # the ID images were


def test_pixel_outliers_train_the_whole_student_towards_the_uniform_prediction():
    batch = make_batch("pixel")
    plain, _, _ = gradients("kd", batch)
    grads, _, metrics = gradients("pixel", batch)
    effect = difference(grads["student"], plain["student"])
    assert norm(effect["conv"]) > 1e-3 and norm(effect["fc"]) > 1e-3
    # Rounding alone: the larger batch is summed in another order.
    rest = norm(difference(grads["projector"], plain["projector"]))
    assert rest < 2e-6 * norm(plain["projector"])
    params, _ = fixed_variables("pixel")
    # By hand: the outliers are normalised by the moments of the ID images.
    kernel = params["student"]["conv"]["kernel"]
    maps = {
        name: np.asarray(
            jax.lax.conv_general_dilated(
                batch[name], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            np.float64,
        )
        for name in ("image", "outlier_image")
    }
    bn, fc = jax.tree.map(np.asarray, (params["student"]["bn"], params["student"]["fc"]))
    mean, variance = (f(maps["image"], axis=(0, 1, 2)) for f in (np.mean, np.var))
    x = (maps["outlier_image"] - mean) / np.sqrt(variance + 1e-5) * bn["scale"] + bn["bias"]
    logits = np.maximum(x, 0).mean((1, 2)) @ fc["kernel"] + fc["bias"]
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits.mean(1))
    np.testing.assert_allclose(metrics["outlier_exposure"], expected, rtol=1e-4)
