"""Unleashing Mask: the loss, the masks and their gradients, the estimate, the saved model."""

import dataclasses
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import changed, refusal

from oal_jax.config import Config, Data, Method, Student, Train, rules
from oal_jax.config.methods import UnleashingMask
from oal_jax.methods import ce, masking, unleashing_mask
from oal_jax.models.densenet import DenseNet
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import at_step, named
from oal_jax.stages import estimate_loss, plan, train
from oal_jax.stages.context import Context
from oal_jax.training.state import TrainState, init_state, make_train_step

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


def numpy_mask(scores, density):
    order = np.argsort(np.abs(scores).ravel(), kind="stable")
    mask = np.ones(scores.size, bool)
    mask[order[: int((1 - density) * scores.size)]] = False
    return mask.reshape(scores.shape)


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


def small(**changes) -> Config:
    """A tiny DenseNet on a few of the embedded images, without augmentation."""
    settings = Config(
        data=Data(train_images=70, shift=0, flip=False),
        method=Method(name="umap", um=UnleashingMask(n_masks=2)),
        student=Student(architecture="densenet", depth=10, width=2),
        train=Train(epochs=1, batch_size=32, warmup=0.0, log_every=1),
    )
    settings.evaluation.batch_size = 32
    return dataclasses.replace(settings, **changes)


def context_of(settings, workdir, start):
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, start=str(start))
    )
    return Context(settings, workdir, distributed.make_mesh(), jax.random.key(settings.seed))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run's directory with a classifier in it, and that classifier's variables."""
    directory = tmp_path_factory.mktemp("start")
    context = context_of(small(), directory, "")
    data = context.train_images()
    net = train.student(context.config, len(data.class_names))
    fresh = init_state(
        ce.cross_entropy(net, data.images.shape[1:]), optax.sgd(0.1), jax.random.key(3)
    )
    tree = {"params": fresh.params, "state": fresh.model_state}
    flat = {".".join(k): np.asarray(v) for k, v in flatten_dict(tree).items()}
    artifacts.write_tensors(directory / "train" / train.STUDENT, flat)
    write_card(directory, data, net)
    return directory, data, net, {"params": fresh.params["student"], **fresh.model_state["student"]}


def write_card(directory, data, net, **changes):
    fields = ("depth", "growth", "affine_bn", "dropout", "mean", "std")
    architecture = {"name": "densenet", "dtype": "float32"} | {f: getattr(net, f) for f in fields}
    card = {
        "image_shape": data.image_shape,
        "class_names": data.class_names,
        "architecture": architecture,
    }
    artifacts.write_json(directory / "train" / train.CLASSIFIER, card | changes)


def test_the_estimate_is_the_mean_loss_with_random_weights_removed(start, tmp_path):
    directory, data, net, variables = start
    context = context_of(small(), tmp_path, directory)
    (path,) = estimate_loss.run(context)
    estimate = artifacts.read_json(path)

    @jax.jit
    def logits(params):
        return net.apply(
            variables | {"params": params}, jnp.asarray(data.images / np.float32(255))
        )[0]

    def mean_loss(params):
        z = np.asarray(logits(params), np.float64)
        rows = np.arange(len(z))
        return (np.log(np.exp(z).sum(1)) - z[rows, data.labels]).mean()

    assert estimate["unmasked"] == pytest.approx(mean_loss(variables["params"]), rel=1e-5)
    sizes = [k.size for k in kernels(variables["params"])]
    assert estimate["weights"] == sum(sizes)
    assert estimate["removed"] == sum(int((1 - 0.965) * size) for size in sizes) > 0
    assert estimate["keep_rate"] == 0.965
    one, two = estimate["per_mask"]
    assert one != two and abs(one - estimate["unmasked"]) > 1e-6
    assert estimate["constraint"] == pytest.approx((one + two) / 2)
    assert estimate["std"] == pytest.approx(abs(one - two) / np.sqrt(2))
    # The first mask again, by a sort.
    key = at_step(named(context.key, "estimate_loss"), "mask", 0)
    scores = flatten_dict(masking.init_scores(key, variables["params"]))
    removed = flatten_dict(variables["params"])
    removed |= {path: removed[path] * numpy_mask(s, 0.965) for path, s in scores.items()}
    assert one == pytest.approx(mean_loss(unflatten_dict(removed)), rel=1e-5)


def test_the_masked_model_is_saved_as_a_plain_one(start, tmp_path):
    directory, data, net, variables = start
    method = Method(name="umap", um=UnleashingMask(constraint=0.3))
    context = context_of(small(method=method), tmp_path, directory)
    train.run(context)
    params, state = train.load(context)
    before, after = flatten_dict(variables["params"]), flatten_dict(params["student"])
    scores = flatten_dict(params["mask"])
    assert set(scores) == {path for path in before if path[-1] == "kernel"}
    fresh = flatten_dict(masking.init_scores(jax.random.key(0), variables["params"]))
    for path, saved in after.items():
        if path not in scores:
            np.testing.assert_array_equal(saved, before[path])
            continue
        mask = numpy_mask(scores[path], 0.8)
        np.testing.assert_array_equal(saved, np.asarray(before[path]) * mask)
        assert scores[path].shape == fresh[path].shape
    moved = np.abs(
        state["student"]["batch_stats"]["bn1"]["mean"] - variables["batch_stats"]["bn1"]["mean"]
    )
    assert moved.max() > 1e-3
    logits, _ = jax.jit(net.apply)(
        train.student_variables(params, state), jnp.zeros((1, *data.images.shape[1:]))
    )
    assert np.isfinite(logits).all()
    logged = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert logged and all('"constraint": 0.3' in line for line in logged)


def test_the_constraint_comes_from_the_config_or_from_the_estimate(tmp_path):
    def of(method):
        """The constraint that the method logs."""
        context = context_of(small(method=method), tmp_path, "x")
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
    net = train.student(settings, classes)
    shapes = jax.eval_shape(lambda k: net.init(k, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == {10: 745_174, 100: 776_044}[classes]
    assert (net.dropout, net.mean[0]) == (0.3, 125.3 / 255)


# Mistakes


def test_a_start_that_does_not_fit_is_refused(start, tmp_path):
    directory, data, net, variables = start
    context = context_of(small(), tmp_path, directory)
    params, _ = train.start(context, net, data)
    kernel = lambda tree: tree["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel(params), kernel(variables["params"]))
    file = context_of(small(), tmp_path, directory / "train" / train.STUDENT)
    np.testing.assert_array_equal(kernel(train.start(file, net, data)[0]), kernel(params))

    missing = refusal(train.start, context_of(small(), tmp_path, tmp_path / "none"), net, data)
    assert "train.start=" in missing and str(tmp_path / "none") in missing
    deeper = refusal(train.start, context, dataclasses.replace(net, depth=16), data)
    assert "block1_1" in deeper
    wider = refusal(train.start, context, dataclasses.replace(net, growth=3), data)
    assert "(4,)" in wider and "(6,)" in wider
    bare = refusal(train.start, context, dataclasses.replace(net, affine_bn=False), data)
    assert "(4,)" in bare and "None" in bare
    # The shapes do not show the mean.
    other = refusal(train.start, context, dataclasses.replace(net, mean=(0.5,)), data)
    assert "mean is [0.33], not [0.5]" in other
    train.start(context, dataclasses.replace(net, dropout=0.3), data)
    names = ("boat", *data.class_names[1:])
    other = refusal(train.start, context, net, data._replace(class_names=names))
    assert "boat" in other
    fewer = data._replace(class_names=data.class_names[:7])
    assert "8" in refusal(train.start, context, dataclasses.replace(net, num_classes=7), fewer)


def test_a_start_without_a_card_is_judged_by_its_tensors(start, tmp_path):
    directory, data, net, _ = start
    tensors = artifacts.read_tensors(directory / "train" / train.STUDENT)
    artifacts.write_tensors(tmp_path / "bare.safetensors", tensors)
    context = context_of(small(), tmp_path, tmp_path / "bare.safetensors")
    train.start(context, net, data)
    assert "params.fc.bias" in refusal(
        train.start, context, dataclasses.replace(net, num_classes=7), data
    )
    del tensors["params.student.fc.kernel"]
    artifacts.write_tensors(tmp_path / "bare.safetensors", tensors)
    assert "params.fc.kernel" in refusal(train.start, context, net, data)


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
