"""bfloat16 arithmetic and rematerialised blocks: what they change, and what they must not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers import assert_trees_close, form, random_variables, refusal

import oal_jax
from oal_jax.config import Config
from oal_jax.config.rules import validate
from oal_jax.detection.exported import exported
from oal_jax.methods import ce
from oal_jax.methods.base import split_variables
from oal_jax.models.conv import batch_norm
from oal_jax.models.densenet import DenseNet
from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import POOLS, VisionTransformer, narrow_product
from oal_jax.models.wide_resnet import WideResNet
from oal_jax.runtime import artifacts, distributed
from oal_jax.stages import evaluate as evaluation
from oal_jax.stages import plan, student, teacher, train
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context
from oal_jax.training.state import compiler_options, init_state, make_train_step

IMAGE = (8, 8, 1)
HALF = jnp.bfloat16


def vit(pool="token", **more):
    return VisionTransformer(3, 4, 16, 2, 2, 2.0, class_token=pool == "token", pool=pool, **more)


MODELS = {
    "resnet": ResNet(3, width=2, stem="small"),
    "resnet50": ResNet(3, depth=50, width=2, stem="cifar", affine_bn=False),
    "densenet": DenseNet(3, depth=10, growth=2, dropout=0.3),
    "wide_resnet": WideResNet(3, depth=10, widen=1, dropout=0.3),
    **{f"vit {pool}": vit(pool) for pool in POOLS},
    "vit layer scale": vit(layer_scale=True),
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TRACED = [slow(name) if name == "resnet50" else name for name in MODELS]
COMPILED = ("wide_resnet", "vit token", slow("resnet"), slow("densenet"))


def images(count=4):
    return np.random.default_rng(0).uniform(size=(count, *IMAGE)).astype(np.float32)


def call(model, train, variables, x):
    """(logits, features), and the collections that the call writes."""
    rngs = {"dropout": jax.random.key(1)}
    return model.apply(variables, x, train=train, rngs=rngs, mutable=["batch_stats", "maps"])


@functools.cache
def fixed(name):
    """Variables with no zeros and ones in them."""
    return random_variables(MODELS[name], images())


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), images())


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


# bfloat16


def test_the_config_s_types_reach_every_architecture_and_nothing_else_of_it():
    config = Config()
    for name in ("resnet", "densenet", "wide_resnet"):
        config.student.architecture, config.student.depth = name, 18 if name == "resnet" else 10
        for dtype in ("float32", "bfloat16"):
            config.student.dtype = dtype
            net = student.network(config, 3)
            assert net.dtype == jnp.dtype(dtype)
            assert type(net) in {type(model) for model in MODELS.values()}
    config.teacher.dtype = "bfloat16"
    assert teacher.model(config, 3).dtype == jnp.bfloat16
    for part in ("student", "teacher"):
        wrong = Config()
        getattr(wrong, part).dtype = "float16"
        assert f"{part}.dtype='float16'" in refusal(validate, wrong)


@pytest.mark.parametrize("name", TRACED)
def test_parameters_statistics_and_outputs_are_float32_and_maps_are_not(name):
    model = MODELS[name].clone(dtype=HALF)
    variables = shapes(model)
    assert form(variables) == form(shapes(MODELS[name]))
    assert dtypes(variables) == {jnp.dtype(jnp.float32)}
    for training in (True, False):
        outputs, left = jax.eval_shape(
            functools.partial(call, model, training), variables, images()
        )
        assert dtypes(outputs) == {jnp.dtype(jnp.float32)}
        assert dtypes(left.get("batch_stats", {})) <= {jnp.dtype(jnp.float32)}
        assert dtypes(left["maps"]) == {jnp.dtype(HALF)}
    loss = lambda v: sum(jnp.sum(out**2) for out in call(model, True, v, images())[0])
    assert dtypes(jax.eval_shape(jax.grad(loss), variables)) == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("second", [(6, 5), (2, 6, 5)])
def test_gradients_of_narrow_products_are_near_those_of_float32(second):
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 9, 6), second]))
    of = lambda product: jax.grad(lambda x, k: jnp.sum(jnp.sin(product(x, k))), (0, 1))
    narrow = of(lambda x, k: narrow_product(x.astype(HALF), k.astype(HALF)).astype(jnp.float32))
    for one, other in zip(narrow(x, kernel), of(jnp.matmul)(x, kernel), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=0.03 * np.abs(other).max())


def test_moments_of_a_batch_are_taken_in_float32():
    # Values near 100 whose spread bfloat16 shows in steps of 0.5: its own sums would lose it.
    values = 100 + np.random.default_rng(0).normal(size=(64, 3, 3, 2))
    x = jnp.asarray(values, HALF)
    norm = batch_norm(True, True, HALF)()
    variables = jax.tree.map(jnp.zeros_like, norm.init(jax.random.key(0), x))
    y, state = norm.apply(variables, x, mutable=["batch_stats"])
    seen = np.asarray(x, np.float64)
    stats = state["batch_stats"]
    np.testing.assert_allclose(10 * stats["mean"], seen.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(10 * stats["var"], seen.var((0, 1, 2)), rtol=1e-2)
    assert y.dtype == HALF


@pytest.mark.parametrize("name", COMPILED)
def test_bfloat16_outputs_are_near_those_of_float32(name):
    variables, half = fixed(name), MODELS[name].clone(dtype=HALF)
    (logits, features), _ = jax.jit(functools.partial(call, MODELS[name], False))(
        variables, images()
    )
    near, _ = jax.jit(functools.partial(call, half, False))(variables, images())
    # A rounding is off by at most 2^-9 of the value; there are some 40 in a row here, which add
    # up at random: 2^-9 sqrt(40) = 1.2 %. Three times that.
    error = np.linalg.norm(near[1] - features) / np.linalg.norm(features)
    assert 1e-5 < error < 0.04
    assert np.abs(near[0] - logits).max() < 0.04 * max(1, np.abs(logits).max())
    head = variables["params"]["head" if name.startswith("vit") else "fc"]
    by_hand = np.asarray(near[1]) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(near[0], by_hand, atol=1e-5)  # the head is float32


def batch_of(count=16):
    labels = np.arange(count) % 3
    image = 0.3 * images(count) + labels[:, None, None, None] / 4
    return {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(labels, jnp.int32)}


@pytest.mark.parametrize("name", ["vit token", slow("wide_resnet")])
def test_training_in_bfloat16_lowers_the_loss_and_keeps_a_float32_state(name):
    dropout = {"dropout": 0.0} if name == "wide_resnet" else {}
    method = ce.cross_entropy(MODELS[name].clone(dtype=HALF, **dropout), IMAGE)
    optimizer = optax.adam(3e-3)
    state, batch = init_state(method, optimizer, jax.random.key(0)), batch_of()
    step = jax.jit(make_train_step(method, optimizer, jax.random.key(1)))
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert dtypes((state, metrics)) == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


# Rematerialisation


@pytest.mark.parametrize("name", COMPILED)
def test_rematerialised_blocks_compute_the_same(name):
    plain = MODELS[name]
    remat = plain.clone(remat=True)
    assert jax.tree.map(jnp.shape, shapes(plain)) == jax.tree.map(jnp.shape, shapes(remat))

    def outcome(model, variables):
        def loss(params):
            rest = {k: v for k, v in variables.items() if k != "params"}
            outputs, left = call(model, True, {"params": params, **rest}, images())
            return sum(jnp.sum(out**2) for out in outputs), (outputs, left)

        return jax.grad(loss, has_aux=True)(variables["params"])

    one, other = (jax.jit(functools.partial(outcome, m))(fixed(name)) for m in (plain, remat))
    assert_trees_close(one, other, rtol=1e-5, atol=1e-5)  # dropped units included


@pytest.mark.parametrize("name", ["vit token", slow("resnet")])
def test_rematerialised_blocks_need_less_memory(name):
    temporary = [gradient_bytes(MODELS[name].clone(remat=remat)) for remat in (False, True)]
    assert temporary[1] < 0.7 * temporary[0]


def gradient_bytes(model):
    """Temporary bytes of the gradient at a batch of 128."""
    loss = lambda params, rest, x: jnp.sum(call(model, True, {"params": params, **rest}, x)[0][0])
    variables = shapes(model)
    rest = {k: v for k, v in variables.items() if k != "params"}
    x = jax.ShapeDtypeStruct((128, *IMAGE), jnp.float32)
    lowered = jax.jit(jax.grad(loss)).lower(variables["params"], rest, x)
    compiled = lowered.compile(compiler_options=compiler_options("cpu"))
    return compiled.memory_analysis().temp_size_in_bytes


# Through the stages


def saved_start(tmp_path, net, **changes):
    """A context whose `train.start` is `net`, saved with `changes` to what its card says of it."""
    config = Config(smoke=True)
    config.train.start = str(tmp_path)
    context = Context(config, tmp_path / "run", distributed.make_mesh(), jax.random.key(0))
    data = context.images("validation", limit=1)
    x = jnp.zeros((1, *data.image_shape))
    params, rest = split_variables(jax.eval_shape(net.init, jax.random.key(0), x))
    tree = {"params": {"student": params}, "state": {"student": rest}}
    flat = {".".join(k): np.zeros(v.shape, v.dtype) for k, v in flatten_dict(tree).items()}
    artifacts.write_tensors(tmp_path / "train" / train.STUDENT, flat)
    fields = ("depth", "width", "stem", "affine_bn", "mean", "std")
    architecture = {"name": "resnet", "dtype": "float32"} | {f: getattr(net, f) for f in fields}
    known = {k: v for k, v in (architecture | changes).items() if v is not None}
    card = {"image_shape": data.image_shape, "architecture": known}
    artifacts.write_json(tmp_path / "train" / train.CLASSIFIER, card)
    return context, data


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_a_start_may_have_been_trained_in_another_type_or_before_there_was_one(tmp_path, dtype):
    config = Config()
    config.student.width = 2
    net = student.network(config, 8)
    context, data = saved_start(tmp_path, net, dtype=dtype)
    params, _ = train.start(context, net.clone(dtype=HALF, remat=True), data)
    assert dtypes(params) == {np.dtype(np.float32)}
    assert "stem" in refusal(train.start, context, net.clone(stem="cifar"), data)


def test_rematerialisation_reruns_no_stage_and_precision_does():
    def reading(section, field, value):
        """The stages before the report that read a field."""
        other = Config()
        setattr(getattr(other, section), field, value)
        return {s.name for s in plan.STAGES[:-1] if s.reads(Config()) != s.reads(other)}

    assert not reading("student", "remat", True) and not reading("teacher", "remat", True)
    assert reading("student", "dtype", "bfloat16") == {"estimate_loss", "train"}


@pytest.mark.slow
def test_a_bfloat16_student_is_trained_saved_loaded_scored_and_exported(tmp_path):
    config = Config(smoke=True)
    config.method.name, config.evaluation.scores = "ce", ("energy", "mahalanobis", "odin")
    config.student.dtype, config.student.remat, config.train.accumulate = "bfloat16", True, 2
    workdir = pipeline.run(config, tmp_path / "run")
    saved = artifacts.read_tensors(workdir / "train" / train.STUDENT)
    assert {tensor.dtype for tensor in saved.values()} == {np.dtype(np.float32)}
    card = artifacts.read_json(workdir / "train" / train.CLASSIFIER)
    assert card["architecture"]["dtype"] == "bfloat16"
    context = pipeline.resolve(workdir)
    sets = evaluation.inputs(context)
    assert dtypes(sets.id_test.outputs) == {np.dtype(np.float32)}
    x = sets.id_test.images()[:8]
    detector = oal_jax.load(workdir, "energy")
    prediction = detector(x)
    label, confidence, ood_score, _ = exported(detector, ["cpu"]).call(x)
    assert prediction.ood_score.dtype == ood_score.dtype == confidence.dtype == np.float32
    # One image at a time there, a batch here: bfloat16 sums in another order.
    np.testing.assert_allclose(prediction.ood_score, ood_score, rtol=0.02)
    assert np.mean(prediction.label == label) >= 7 / 8
    report = (workdir / "report" / "ood.csv").read_text()
    assert "odin" in report and "nan" not in report
