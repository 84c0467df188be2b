"""Unleashing Mask: the loss, the masks and their gradients, the constraint, the configs."""

import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers import changed, numpy_mask, refusal

from oal_jax.config import Config, Method, Train, rules
from oal_jax.config.methods import UnleashingMask
from oal_jax.methods import ce, masking, unleashing_mask
from oal_jax.models.densenet import DenseNet
from oal_jax.runtime import artifacts, distributed
from oal_jax.stages import plan, student, train
from oal_jax.stages.context import Context
from oal_jax.training.state import TrainState, make_train_step

CONFIGS = Path(__file__).parent.parent / "configs"
IMAGE, CLASSES = (2, 3, 1), 4


class Linear(nn.Module):
    """A head alone, so that a step is one formula."""

    feature_width: int = 6

    @nn.compact
    def __call__(self, images, train=False, statistics=None):
        features = images.reshape(images.shape[0], -1)
        return nn.Dense(CLASSES, name="fc")(features), features


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linear_batch(rows=8):
    image = np.abs(draw(rows, *IMAGE))
    return {"image": jnp.asarray(image), "label": jnp.arange(rows, dtype=jnp.int32) % CLASSES}


def linear_params():
    return {
        "student": {
            "fc": {"kernel": jnp.asarray(draw(6, CLASSES, seed=1)), "bias": jnp.zeros(CLASSES)}
        }
    }


def numpy_step(batch, params):
    """(mean cross-entropy, its gradient by kernel and bias) in float64."""
    x = np.asarray(batch["image"], np.float64).reshape(len(batch["image"]), -1)
    head = params["student"]["fc"]
    z = x @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"], np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    rows = np.arange(len(x))
    loss = -np.log(p[rows, batch["label"]]).mean()
    p[rows, batch["label"]] -= 1
    return loss, x.T @ p / len(x), p.mean(0)


def unleashed(constraint, beta=1.0):
    return ce.cross_entropy(
        Linear(), IMAGE, ce_transform=unleashing_mask.transform(constraint, beta)
    )


# The loss


@pytest.mark.parametrize(("ce_value", "beta"), [(0.9, 1.0), (0.05, 1.0), (0.9, 0.5), (0.2, 0.5)])
def test_the_loss_and_its_gradient_on_both_sides_of_the_constraint(ce_value, beta):
    value, slope = jax.value_and_grad(unleashing_mask.unleash)(jnp.float32(ce_value), 0.15, beta)
    assert float(value) == pytest.approx(abs(beta * ce_value - 0.15) + 0.15)
    assert float(slope) == pytest.approx(beta if beta * ce_value > 0.15 else -beta)


def test_no_gradient_at_the_constraint_and_plain_cross_entropy_without_one():
    gradient = jax.grad(unleashing_mask.unleash)
    assert float(gradient(jnp.float32(0.25), 0.25)) == 0
    assert float(unleashing_mask.unleash(jnp.float32(0.7), 0.0)) == pytest.approx(0.7)
    assert float(gradient(jnp.float32(0.7), 0.0)) == 1


@pytest.mark.parametrize(("constraint", "beta"), [(0.3, 1.0), (5.0, 1.0), (0.3, 2.0)])
def test_a_step_is_numpys(constraint, beta):
    batch, params, optimizer = linear_batch(), linear_params(), optax.sgd(0.5)
    loss, of_kernel, of_bias = numpy_step(batch, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params))
    step = make_train_step(unleashed(constraint, beta), optimizer, jax.random.key(0))
    new, metrics = jax.jit(step)(state, batch)
    sign = np.sign(beta * loss - constraint)
    assert sign == (-1 if constraint == 5 else 1)
    assert float(metrics["ce"]) == pytest.approx(loss, rel=1e-5)
    expected = abs(beta * loss - constraint) + constraint
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    old, after = params["student"]["fc"], new.params["student"]["fc"]
    moved = lambda name: np.asarray(old[name] - after[name])
    np.testing.assert_allclose(moved("kernel"), 0.5 * beta * sign * of_kernel, atol=1e-6)
    np.testing.assert_allclose(moved("bias"), 0.5 * beta * sign * of_bias, atol=1e-6)


# Masks


def kernels(params):
    return masking.masked_tensors(params).values()


@pytest.mark.parametrize(("density", "removed"), [(0.965, 26_034), (0.8, 148_962)])
def test_densenet_loses_as_many_weights_as_published(density, removed):
    net = DenseNet(num_classes=10, affine_bn=False)
    shapes = jax.eval_shape(lambda k: net.init(k, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))
    sizes = [k.size for k in kernels(shapes["params"])]
    assert (len(sizes), sum(sizes)) == (100, 745_164)
    assert sum(masking.zero_count(density, size) for size in sizes) == removed
    assert sum(int((1 - density) * size) for size in sizes) == removed


def test_the_count_is_pythons_whole_part_in_float64():
    assert masking.zero_count(0.8, 5) == 0  # (1 - 0.8) 5 = 0.99999...
    assert masking.zero_count(0.75, 8) == 2


jitted_mask = jax.jit(masking.magnitude_mask, static_argnames="density")


@pytest.mark.parametrize("density", [0.965, 0.8, 0.01, 1.0])
@pytest.mark.parametrize("kind", ["normal", "few values", "all equal", "half zero"])
def test_the_largest_scores_stay_and_of_equal_ones_the_last(kind, density):
    scores = draw(3, 3, 5, 7)
    if kind == "few values":
        scores = np.round(2 * scores)
    elif kind == "all equal":
        scores = np.full_like(scores, -0.25)
    elif kind == "half zero":
        scores = np.maximum(scores, 0)
    expected = numpy_mask(scores, density)
    np.testing.assert_array_equal(jitted_mask(jnp.asarray(scores), density), expected)
    assert (~expected).sum() == int((1 - density) * scores.size)


def test_scores_are_uniform_by_fan_in_and_of_the_key():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 40, 8))},
        "bn": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
        "fc": {"kernel": jnp.zeros((90, 30)), "bias": jnp.zeros(30)},
    }
    scores, again, other = (masking.init_scores(jax.random.key(s), params) for s in (0, 0, 1))
    flat = flatten_dict(scores)
    assert set(flat) == {("conv", "kernel"), ("fc", "kernel")}
    for path, fan_in in ((("conv", "kernel"), 360), (("fc", "kernel"), 90)):
        values = np.asarray(flat[path])
        assert 0.98 < np.abs(values).max() * np.sqrt(fan_in) <= 1
        assert values.std() * np.sqrt(3 * fan_in) == pytest.approx(1, abs=0.05)
        np.testing.assert_array_equal(values, flatten_dict(again)[path])
        assert (values != flatten_dict(other)[path]).mean() > 0.99
    assert (
        abs(np.corrcoef(flat["conv", "kernel"].ravel()[:2700], flat["fc", "kernel"].ravel())[0, 1])
        < 0.1
    )


def test_gradients_of_weights_and_scores_are_the_closed_forms():
    weights, scores, upstream = (jnp.asarray(draw(3, 3, 4, 6, seed=i)) for i in range(3))
    scores = scores.at[0, 0, 0, 0].set(0)
    params = {"a": {"kernel": weights}, "b": {"scale": jnp.ones(2)}}

    def value(params, scores):
        effective = masking.apply_masks(params, {"a": {"kernel": scores}}, 0.8)
        return jnp.sum(upstream * effective["a"]["kernel"]) + jnp.sum(effective["b"]["scale"])

    mask = numpy_mask(np.asarray(scores), 0.8)
    gradient = jax.jit(jax.value_and_grad(value, (0, 1)))
    result, (of_params, of_scores) = gradient(params, scores)
    assert float(result) == pytest.approx(float(np.sum(upstream * weights * mask)) + 2, rel=1e-4)
    np.testing.assert_allclose(of_params["a"]["kernel"], upstream * mask)
    np.testing.assert_allclose(of_scores, upstream * weights * np.sign(scores), rtol=1e-6)
    np.testing.assert_allclose(of_params["b"]["scale"], 1)


@pytest.mark.parametrize("freeze", [True, False])
def test_umap_gives_the_scores_the_masked_models_gradient(freeze):
    batch, base = linear_batch(), unleashed(5.0)
    method = masking.with_mask(base, 0.8, freeze=freeze)
    params, state = linear_params(), {}
    params["mask"] = {"fc": {"kernel": jnp.asarray(draw(6, CLASSES, seed=2))}}
    weights, scores = params["student"]["fc"]["kernel"], params["mask"]["fc"]["kernel"]
    mask = numpy_mask(np.asarray(scores), 0.8)
    masked = {"student": {"fc": params["student"]["fc"] | {"kernel": weights * mask}}}
    loss, of_kernel, _ = numpy_step(batch, masked)
    gradient = jax.jit(
        jax.value_and_grad(lambda p: method.loss(p, state, batch, 0, jax.random.key(0))[0])
    )
    value, grads = gradient(params)
    assert float(value) == pytest.approx(10 - loss, rel=1e-5)
    by_hand = -of_kernel * np.asarray(weights) * np.sign(scores)
    np.testing.assert_allclose(grads["mask"]["fc"]["kernel"], by_hand, atol=1e-5)
    of_weights = 0 if freeze else -of_kernel * mask
    np.testing.assert_allclose(grads["student"]["fc"]["kernel"], of_weights, atol=1e-5)
    np.testing.assert_array_equal(
        method.finish(params)["student"]["fc"]["kernel"], np.asarray(weights) * mask
    )


# The stages


def test_the_constraint_comes_from_the_config_or_from_the_estimate(tmp_path):
    def of(method):
        """The constraint that the method logs."""
        config = Config(method=method, train=Train(start="run"))
        context = Context(config, tmp_path, distributed.make_mesh(), jax.random.key(0))
        arrays = {"images": np.zeros((16, *IMAGE), np.uint8)}
        net = Linear()
        method = train.make_method(context, net, IMAGE, arrays, 16)
        params, state = method.init(jax.random.key(0))
        batch = linear_batch() | {"teacher_logits": jnp.zeros((8, CLASSES))}
        batch["teacher_features"] = jnp.ones((8, context.config.teacher.width))
        _, (_, metrics) = jax.jit(method.loss)(params, state, batch, 0, jax.random.key(0))
        return pytest.approx(float(metrics["constraint"])) if "constraint" in metrics else None

    artifacts.write_json(tmp_path / "estimate_loss" / train.CONSTRAINT, {"constraint": 0.42})
    assert of(Method(name="um")) == 0.42
    assert of(Method(name="kd", unleash=True)) == 0.42
    assert of(Method(name="umap", um=UnleashingMask(constraint=0.0))) == 0
    assert of(Method(name="kd")) is None


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method(name="um"), ["estimate_loss", "train"]),
        (Method(name="umap"), ["estimate_loss", "train"]),
        (Method(name="umap", um=UnleashingMask(constraint=0.1)), ["train"]),
        (Method(name="kd", unleash=True), ["teacher", "features", "estimate_loss", "train"]),
        (Method(name="kd"), ["teacher", "features", "train"]),
    ],
)
def test_the_estimate_is_made_where_the_loss_reads_it(method, expected):
    stages = [stage.name for stage in plan.plan(Config(method=method))]
    assert stages == [*expected, "evaluate", "report"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_um*.py")), ids=lambda p: p.stem)
def test_the_shipped_configs_are_the_papers(path):
    settings = runpy.run_path(str(path))["get_config"]()
    message = refusal(rules.validate, settings)
    assert "data.root" in message or "train.start" in message
    settings.train.start, settings.data.root = "run", "data"
    rules.validate(settings)
    assert settings.method.name == path.stem.rpartition("_")[2]
    if not path.stem.startswith("cifar"):
        return
    classes = int(path.stem.removeprefix("cifar").partition("_")[0])
    net = student.network(settings, classes)
    shapes = jax.eval_shape(lambda k: net.init(k, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == {10: 745_174, 100: 776_044}[classes]
    assert (net.dropout, net.mean[0]) == (0.3, 125.3 / 255)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method.name": "um"}, ["method.name='um'", "train.start"]),
        ({"method.name": "umap", "method.um.constraint": 0.2}, ["'umap'", "train.start"]),
        ({"method.unleash": True}, ["method.unleash=True", "train.start"]),
        ({"method.um.constraint": -0.5}, ["method.um.constraint=-0.5"]),
        ({"method.um.n_masks": 0}, ["method.um.n_masks=0"]),
        ({"method.um.beta": 0.0}, ["method.um.beta=0.0"]),
        ({"method.umap.mask_density": 0.0}, ["method.umap.mask_density=0.0"]),
        ({"method.um.mask_density": 1.5}, ["method.um.mask_density=1.5"]),
        ({"student.depth": 20}, ["student.depth=20", "18, 34, 50"]),
        ({"student.dropout": 0.3}, ["student.dropout=0.3", "resnet"]),
        ({"student.architecture": "densenet", "student.depth": 101}, ["depth=101", "6 n"]),
        ({"student.architecture": "wide_resnet", "student.depth": 4}, ["depth=4", "6 n"]),
        ({"student.dropout": 1.0}, ["student.dropout=1.0"]),
    ],
)
def test_impossible_configs_are_one_line(changes, words):
    message = refusal(rules.validate, changed(Config(), changes))
    assert all(word in message for word in words)


def test_a_given_constraint_needs_no_start_unless_the_weights_come_from_it():
    rules.validate(changed(Config(), {"method.unleash": True, "method.um.constraint": 0.2}))
    rules.validate(changed(Config(), {"method.name": "um", "train.start": "run"}))
