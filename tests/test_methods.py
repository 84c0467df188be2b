"""Methods ce, kd, oal, pixel, um and umap: loss and gradient of a tiny batch, by groups."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    CLASSES,
    Net,
    assert_trees_close,
    difference,
    form,
    norm,
    numpy_cross_entropy,
    numpy_net,
    standard_like,
)

from oal_jax.methods import ce, kd, losses, masking, oal, pixel, unleashing_mask
from oal_jax.methods.base import Method
from oal_jax.models.mutual_information import GaussianPredictor
from oal_jax.models.projector import FeatureProjector
from oal_jax.runtime import ops
from oal_jax.training.state import init_state

ROWS, TEACHER = 8, 6
IMAGE, LATENT = (6, 6, 1), (5, 5, 4)
NET = Net()
SHAPES = (NET, IMAGE, TEACHER)

# Numbers that a test may change. They are traced, so one program serves all their values.
# `factor` multiplies the ID cross-entropy.
TRACED = {
    "factor": 1.0,
    "logit_weight": 4.0,
    "feature_weight": 8.0,
    "weight": 0.5,
    "energy_weight": 0.5,
    "latent_projector_weight": 0.05,
    "ramp_start": -2.0,
    "ramp_end": -1.0,
    "knn_club_weight": 0.1,
    "latent_club_weight": 0.2,
}


def make_method(name, traced) -> Method:
    transform = lambda ce: traced["factor"] * ce
    if name == "ce":
        return ce.cross_entropy(NET, IMAGE, ce_transform=transform)
    if name in ("um", "umap"):  # constraints above and below the first loss
        constraint = unleashing_mask.transform(3.0 if name == "um" else 0.5, 1.0)
        method = ce.cross_entropy(NET, IMAGE, ce_transform=constraint)
        return method if name == "um" else masking.with_mask(method, 0.8, freeze=False)
    pick = lambda *names: (
        {n: traced[n] for n in ("logit_weight", "feature_weight", *names)}
        | {"ce_transform": transform}
    )
    if name == "kd":
        return kd.distillation(*SHAPES, **pick())
    if name == "pixel":
        return pixel.outlier_exposure(*SHAPES, **pick("weight"))
    if name in ("oal energy", "oal without outliers"):
        return oal.energy(
            *SHAPES,
            LATENT if name == "oal energy" else None,
            **pick("energy_weight", "latent_projector_weight"),
            ramp_steps=(traced["ramp_start"], traced["ramp_end"]),
            feature_outliers=name == "oal energy",
        )
    return oal.club(
        *SHAPES,
        int(np.prod(LATENT)),
        **pick("knn_club_weight", "latent_club_weight"),
        alternate=name == "oal club_alternate",
    )


# Loss and gradient norm of the first step from `fixed_variables` on `make_batch`.
GOLDEN = {
    "ce": (1.59452, 1.78784),
    "kd": (26.4582, 16.195),
    "pixel": (27.33836, 17.23155),
    "oal energy": (29.9064, 25.0551),
    "oal club": (12.405, 6.5838),
    "oal club_alternate": (45.7344, 221.721),
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
    if "club" in method_name:
        batch["outlier_latent"] = latents[1].reshape(ROWS, -1)
    return {k: jnp.asarray(v, jnp.int32 if k == "label" else jnp.float32) for k, v in batch.items()}


@functools.cache
def fixed_variables(name):
    """Parameters and statistics from NumPy's generator."""
    return standard_like(jax.eval_shape(make_method(name, TRACED).init, jax.random.key(0)))


def loss_and_gradient(name, traced, params, model_state, batch):
    loss = make_method(name, traced).loss
    (value, (state, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
        params, model_state, batch, jnp.zeros((), jnp.int32), jax.random.key(0)
    )
    return grads, state, metrics | {"loss": value}


@functools.cache
def compiled_gradient(name):
    return jax.jit(functools.partial(loss_and_gradient, name))


def gradients(name, batch, params=None, **traced):
    """d loss / d params, the new batch statistics and the metrics of one batch at step 0."""
    fixed, model_state = fixed_variables(name)
    compute = compiled_gradient(name)
    return jax.tree.map(np.asarray, compute(TRACED | traced, params or fixed, model_state, batch))


@pytest.fixture(params=sorted(GOLDEN))
def name(request):
    return request.param


def test_loss_and_gradient_are_golden_and_a_step_lowers_the_loss(name):
    batch, (params, model_state) = make_batch(name), fixed_variables(name)
    grads, state, metrics = gradients(name, batch)
    assert all(v.shape == () and np.isfinite(v) for v in metrics.values())
    assert form(grads) == form(params) and form(state) == form(model_state)
    np.testing.assert_allclose((metrics["loss"], norm(grads)), GOLDEN[name], rtol=2e-4)
    assert all(norm(grads[group]) > 1e-4 for group in params)
    step = min(0.02, 0.1 / norm(grads))
    nudged = jax.tree.map(lambda p, g: p - np.float32(step) * g, params, grads)
    assert gradients(name, batch, nudged)[2]["loss"] < metrics["loss"]


def test_jit_changes_nothing():
    batch, loss = make_batch("ce"), make_method("ce", TRACED).loss
    value, (state, metrics) = loss(*fixed_variables("ce"), batch, 0, jax.random.key(0))
    assert_trees_close((state, metrics | {"loss": value}), gradients("ce", batch)[1:])


@pytest.mark.parametrize("name", ["ce", "kd", "oal energy", "oal club", "pixel"])
def test_a_transform_of_the_cross_entropy_touches_nothing_else(name):
    batch = make_batch(name)
    plain, metrics = (gradients(name, batch, factor=f)[2] for f in (1.0, 10.0))
    np.testing.assert_allclose(metrics["loss"], plain["loss"] + 9 * plain["ce"], rtol=1e-5)
    assert all(metrics[k] == plain[k] for k in metrics if k != "loss")


def test_a_fresh_state_is_finite_and_of_the_key():
    method, optimizer = make_method("kd", TRACED), optax.sgd(0.1, momentum=0.9)
    first, again, other = (init_state(method, optimizer, jax.random.key(s)) for s in (0, 0, 1))
    assert int(first.step) == 0 and norm(first.opt_state) == 0
    assert_trees_close(first, again, rtol=0, atol=0)
    for group in first.params:
        assert 0.1 < norm(difference(first.params[group], other.params[group])) < 1e3


# Distillation


def test_the_feature_projector_learns_through_the_target_of_the_feature_term_alone():
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
    params, model_state = fixed_variables("kd")
    (logits, features), _ = numpy_net(params, batch["image"], batch["image"])
    log_softmax = lambda z: z - np.log(np.exp(z).sum(1, keepdims=True))
    divergence = lambda p, q: (np.exp(p) * (p - q)).sum(1).mean()
    teacher = np.asarray(batch["teacher_logits"], np.float64)
    np.testing.assert_allclose(
        metrics["kd_logits"], divergence(log_softmax(teacher), log_softmax(logits)), rtol=1e-4
    )
    expected = numpy_cross_entropy(logits, batch["label"])
    np.testing.assert_allclose(metrics["ce"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == batch["label"]).mean())
    target = np.asarray(
        FeatureProjector(NET.feature_width).apply(
            {"params": params["projector"], **model_state["projector"]},
            ops.unit(batch["teacher_features"]),
            train=True,
            mutable=["batch_stats"],
        )[0],
        np.float64,
    )
    np.testing.assert_allclose(
        metrics["kd_features"],
        divergence(log_softmax(target), log_softmax(features)),
        rtol=1e-4,
    )
    assert plain["loss"] == plain["ce"]


@pytest.mark.parametrize("name", ["kd", "oal energy", "oal club"])
def test_the_feature_projector_sees_directions_except_with_club(name):
    batch = make_batch(name)
    lengths = jnp.linspace(0.5, 4, ROWS)[:, None]
    longer = batch | {"teacher_features": batch["teacher_features"] * lengths}
    one, other = (gradients(name, b)[2]["kd_features"] for b in (batch, longer))
    assert np.isclose(one, other, rtol=1e-4) == (name != "oal club")


# CLUB


def manual_club(batch, loss_of):
    """Gradients of `loss_of(mean, log variance, features)` by (q's parameters, features)."""
    params, model_state = fixed_variables("oal club")
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
    """CLUB as published, weighted with the weights of its two terms."""
    density = -((mean[:, None] - y[None]) ** 2) / 2 * jnp.exp(-log_variance)[:, None]
    paired = jnp.trace(density.sum(-1)) / ROWS
    return {"outlier": 0.1, "outlier_latent": 0.2}[key] * (paired - density.sum(-1).mean())


def likelihood(key, mean, log_variance, y):
    del key
    return -jnp.mean(losses.gaussian_log_likelihood(mean, log_variance, y))


def through_features(batch, cotangent):
    """The student's gradient that a gradient on its features becomes."""
    params, model_state = fixed_variables("oal club")

    def features(student):
        variables = {"params": student, **model_state["student"]}
        return NET.apply(variables, batch["image"], train=True, mutable=["batch_stats"])[0][1]

    return jax.jit(lambda s: jax.vjp(features, s)[1](cotangent)[0])(params["student"])


def test_club_minimises_the_estimate_in_q_and_in_the_student():
    batch = make_batch("oal club")
    grads, _, metrics = gradients("oal club", batch)
    none, _, _ = gradients("oal club", batch, knn_club_weight=0.0, latent_club_weight=0.0)
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
    batch = make_batch("oal club_alternate")
    grads, _, _ = gradients("oal club_alternate", batch)
    none, _, _ = gradients("oal club_alternate", batch, knn_club_weight=0.0, latent_club_weight=0.0)
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
    plain, _, _ = gradients("oal club", batch, knn_club_weight=0.0, latent_club_weight=0.0)
    assert_trees_close(none["student"], plain["student"], rtol=1e-4, atol=1e-5)


def test_over_all_pairings_club_does_nothing_to_the_student():
    batch = {k: v[:4] for k, v in make_batch("oal club").items()}
    params, model_state = fixed_variables("oal club")
    orders = jnp.array(list(itertools.permutations(range(4))))

    def loss(student, order, weights):
        paired = batch | {k: batch[k][order] for k in ("outlier", "outlier_latent")}
        method = make_method("oal club", TRACED | weights)
        return method.loss(
            params | {"student": student}, model_state, paired, 0, jax.random.key(0)
        )[0]

    def effect(order):
        without = {"knn_club_weight": 0.0, "latent_club_weight": 0.0}
        term = lambda student: loss(student, order, {}) - loss(student, order, without)
        return jax.grad(term)(params["student"])

    effects = jax.jit(lambda: jax.vmap(effect)(orders))()
    one = norm(jax.tree.map(lambda g: g[0], effects))
    average = norm(jax.tree.map(lambda g: jnp.mean(g, axis=0), effects))
    assert one > 1e-3 and average < 1e-2 * one


# Outliers through the head


def energy_effect(batch, name="oal energy"):
    """Gradient of the energy term alone."""
    weighted = gradients(name, batch, latent_projector_weight=0.0)[0]
    return difference(
        weighted, gradients(name, batch, latent_projector_weight=0.0, energy_weight=0.0)[0]
    )


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


def test_descent_on_the_energy_term_separates_the_energies():
    batch = make_batch("oal energy")
    params = fixed_variables("oal energy")[0]
    nudged = jax.tree.map(lambda p, g: p - 0.01 * g, params, energy_effect(batch))
    before, after = (gradients("oal energy", batch, params=p)[2] for p in (params, nudged))
    gap = lambda m: (
        2 * m["id_neg_energy"] - m["outlier_neg_energy_feature"] - m["outlier_neg_energy_latent"]
    )
    assert gap(after) > gap(before)
    total = lambda m: m["energy_feature"] + m["energy_latent"]
    assert total(after) < total(before)


def test_the_scale_of_feature_outliers_does_not_matter():
    batch = make_batch("oal energy")
    scaled = batch | {"outlier": 27 * batch["outlier"]}
    one, other = (gradients("oal energy", b)[0] for b in (batch, scaled))
    assert_trees_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_latent_projector_regresses_the_student_s_features_and_does_not_pull_them():
    batch = make_batch("oal energy")
    with_term, _, metrics = gradients("oal energy", batch)
    without, _, _ = gradients("oal energy", batch, latent_projector_weight=0.0)
    assert norm(with_term["adapter"]) > 1e-3 and norm(without["adapter"]) == 0
    assert_trees_close(with_term["student"], without["student"], rtol=1e-4, atol=1e-6)
    assert metrics["latent_projector_error"] > 0


def test_before_the_ramp_oal_is_distillation():
    batch = make_batch("oal energy")
    grads, _, _ = gradients("oal energy", batch, ramp_start=0.0, ramp_end=10.0)
    plain, _, _ = gradients("oal energy", batch, energy_weight=0.0)
    assert_trees_close(grads, plain, rtol=1e-5, atol=1e-6)


def test_without_outliers_the_id_side_trains_the_student_and_not_its_own_offset():
    batch = make_batch("oal energy")
    effect = energy_effect(batch, "oal without outliers")
    assert norm(effect["student"]["conv"]) > 1e-3
    assert norm(effect["energy"]) == 0


@pytest.mark.parametrize("name", ["oal energy", "oal club", "oal club_alternate", "pixel"])
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
    # The outliers are normalised by the moments of the ID images.
    params, _ = fixed_variables("pixel")
    _, (logits, _) = numpy_net(params, batch["image"], batch["outlier_image"])
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits.mean(1))
    np.testing.assert_allclose(metrics["outlier_exposure"], expected, rtol=1e-4)
