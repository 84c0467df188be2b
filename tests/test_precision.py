"""bfloat16 arithmetic, rematerialised blocks and accumulated gradients: what they may change."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_methods
import test_models
import test_outlier_methods
from flax.traverse_util import flatten_dict
from jax.extend.core import ClosedJaxpr, Jaxpr
from oal_jax.config.ranges import CHOICES

import oal_jax
from oal_jax.config import Config
from oal_jax.config.rules import validate
from oal_jax.detection.exported import exported
from oal_jax.errors import UserError
from oal_jax.methods import ce, outlier_exposure, unleashing_mask, woods
from oal_jax.methods.base import Method, split_variables
from oal_jax.models.conv import batch_norm
from oal_jax.models.densenet import DenseNet
from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import POOLS, VisionTransformer, narrow_product
from oal_jax.models.wide_resnet import WideResNet
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import at_step
from oal_jax.stages import evaluate, teacher, train
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context
from oal_jax.training import state as training_state
from oal_jax.training.state import TrainState, check_split, compiler_options, make_train_step, split

QUICK = {"xla_backend_optimization_level": 0}  # the programs are tiny: compiling them is the cost
quick = functools.partial(jax.jit, compiler_options=QUICK)
IMAGE = (8, 8, 1)


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
HALF = jnp.bfloat16


def images(count=4):
    return np.random.default_rng(0).uniform(size=(count, *IMAGE)).astype(np.float32)


def call(model, train, variables, x):
    """(logits, features), and what the call leaves behind."""
    return model.apply(
        variables,
        x,
        train=train,
        rngs={"dropout": jax.random.key(1)},
        mutable=["batch_stats", "maps"],
    )


@functools.cache
def fixed(name):
    """Variables with no zeros and ones in them."""
    return test_models.random_variables(MODELS[name], images())


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), images())


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def equations(jaxpr):
    """Every primitive operation of a program, those of its inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, ClosedJaxpr):
                    yield from equations(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from equations(inner)


def program(model, train=True):
    traced = jax.make_jaxpr(functools.partial(call, model, train))(shapes(model), images())
    return list(equations(traced.jaxpr))


def kinds(eqns):
    return {v.aval.dtype for e in eqns for v in (*e.invars, *e.outvars) if hasattr(v.aval, "dtype")}


# bfloat16


def test_the_config_s_types_reach_every_architecture_and_nothing_else_of_it():
    config = Config()
    for name in CHOICES["student.architecture"]:
        config.student.architecture, config.student.depth = name, 18 if name == "resnet" else 10
        for dtype in CHOICES["student.dtype"]:
            config.student.dtype = dtype
            net = train.student(config, 3)
            assert net.dtype == jnp.dtype(dtype)
            assert type(net) in {type(model) for model in MODELS.values()}
            assert train._architecture(net)["dtype"] == dtype
            json.dumps(train._architecture(net))
    config.teacher.dtype = "bfloat16"
    assert teacher.model(config, 3).dtype == jnp.bfloat16
    for part in ("student", "teacher"):
        wrong = Config()
        getattr(wrong, part).dtype = "float16"
        with pytest.raises(UserError, match=rf"{part}.dtype='float16' is not one of .*nearest"):
            validate(wrong)


@pytest.mark.parametrize("name", TRACED)
def test_parameters_statistics_and_outputs_are_float32_and_maps_are_not(name):
    model = MODELS[name].clone(dtype=HALF)
    variables = shapes(model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes(MODELS[name])
    )
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


@pytest.mark.parametrize("name", TRACED)
def test_products_are_bfloat16_but_for_the_head_and_nothing_is_wider_than_float32(name):
    plain, half = program(MODELS[name]), program(MODELS[name].clone(dtype=HALF))
    assert jnp.dtype(HALF) not in kinds(plain)
    for eqns in (plain, half):
        assert not {jnp.dtype(jnp.float64), jnp.dtype(jnp.float16)} & kinds(eqns)
    products = [e for e in half if e.primitive.name in ("dot_general", "conv_general_dilated")]
    of = [{v.aval.dtype for v in e.invars} for e in products]
    assert of[-1] == {jnp.dtype(jnp.float32)}  # the head
    assert all(types == {jnp.dtype(HALF)} for types in of[:-1]) and len(of) > 5
    # The softmax of attention, and the roots of the variances.
    rooted = [e for e in half if e.primitive.name in ("rsqrt", "sqrt", "exp", "exp2", "reduce_max")]
    assert rooted and kinds(rooted) == {jnp.dtype(jnp.float32)}
    wide = [e for e in products if e.outvars[0].aval.dtype == jnp.float32]
    scores = [e for e in wide if e.params.get("dimension_numbers")[1] != ((), ())]
    # A block: queries by keys, and weights by values as a CPU sums them. The head, and what else a
    # CPU sums in float32: patches, four a block.
    assert len(scores) == (2 * 2 if "vit" in name else 0)
    assert len(wide) - len(scores) == 1 + (1 + 4 * 2 if "vit" in name else 0)


@pytest.mark.parametrize("second", [(6, 5), (2, 6, 5)])
def test_gradients_of_narrow_products_are_near_those_of_float32(second):
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 9, 6), second]))
    of = lambda product: jax.grad(lambda x, k: jnp.sum(jnp.sin(product(x, k))), (0, 1))
    narrow = of(lambda x, k: narrow_product(x.astype(HALF), k.astype(HALF)).astype(jnp.float32))
    for found, wanted in zip(narrow(x, kernel), of(jnp.matmul)(x, kernel), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())


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
    (logits, features), _ = quick(functools.partial(call, MODELS[name], False))(variables, images())
    near, _ = quick(functools.partial(call, half, False))(variables, images())
    # A rounding is off by at most 2^-9 of the value; there are some 40 in a row here, which add
    # up at random: 2^-9 sqrt(40) = 1.2 %. Three times that.
    error = np.linalg.norm(near[1] - features) / np.linalg.norm(features)
    assert 1e-5 < error < 0.04
    assert np.abs(near[0] - logits).max() < 0.04 * max(1, np.abs(logits).max())
    head = variables["params"]["head" if name.startswith("vit") else "fc"]
    by_hand = np.asarray(near[1]) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(near[0], by_hand, atol=1e-5)  # the head is float32


def batch_of(count=16, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    image = 0.3 * rng.uniform(size=(count, *IMAGE)) + labels[:, None, None, None] / 4
    return {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(labels, jnp.int32)}


def start(method: Method, optimizer=None) -> TrainState:
    optimizer = optimizer or optax.sgd(1.0)
    return training_state.init_state(method, optimizer, jax.random.key(0))


@pytest.mark.parametrize("name", ["vit token", slow("wide_resnet")])
def test_training_in_bfloat16_brings_the_loss_down_and_keeps_a_float32_state(name):
    dropout = {"dropout": 0.0} if name == "wide_resnet" else {}
    method = ce.cross_entropy(MODELS[name].clone(dtype=HALF, **dropout), IMAGE)
    optimizer = optax.adam(3e-3)
    state, batch = start(method, optimizer), batch_of()
    step = quick(make_train_step(method, optimizer, jax.random.key(1)))
    losses = []
    for _ in range(25):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert dtypes((state, metrics)) == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < 0.7 * losses[0]


# Rematerialisation


@pytest.mark.parametrize("name", COMPILED)
def test_rematerialised_blocks_compute_the_same(name):
    kept = MODELS[name]
    remat = kept.clone(remat=True)
    assert jax.tree.map(jnp.shape, shapes(kept)) == jax.tree.map(jnp.shape, shapes(remat))

    def outcome(model, variables):
        def loss(params):
            rest = {k: v for k, v in variables.items() if k != "params"}
            outputs, left = call(model, True, {"params": params, **rest}, images())
            return sum(jnp.sum(out**2) for out in outputs), (outputs, left)

        return jax.grad(loss, has_aux=True)(variables["params"])

    one, other = (quick(functools.partial(outcome, m))(fixed(name)) for m in (kept, remat))
    test_methods.assert_trees_close(one, other, rtol=1e-5, atol=1e-5)  # dropped units included


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
    return temporary_bytes(lowered)


def temporary_bytes(lowered):
    compiled = lowered.compile(compiler_options=compiler_options("cpu") | QUICK)
    return compiled.memory_analysis().temp_size_in_bytes


# Accumulation


class Plain(nn.Module):
    """A classifier without batch statistics: its loss is a mean over examples."""

    @nn.compact
    def __call__(self, images, train=False, statistics=None):
        features = nn.gelu(nn.Dense(5, name="hidden")(images.reshape(images.shape[0], -1)))
        return nn.Dense(3, name="fc")(features), features


PLAIN = ce.cross_entropy(Plain(), IMAGE)


@functools.cache
def whole_batch():
    return outcome(PLAIN, 1)


def outcome(method, count, unroll=True, batch=None, optimizer=None, compiled=True):
    """State and metrics after one step of `count` microbatches."""
    optimizer = optimizer or optax.sgd(1.0)
    step = make_train_step(method, optimizer, jax.random.key(1), count, unroll)
    return (quick(step) if compiled else step)(
        start(method, optimizer), batch_of() if batch is None else batch
    )


@pytest.mark.parametrize(("count", "unroll"), [(2, True), (4, True), (4, False)])
def test_microbatches_add_up_to_the_whole_batch(count, unroll):
    parts = outcome(PLAIN, count, unroll)
    test_methods.assert_trees_close(whole_batch(), parts, rtol=1e-5, atol=1e-6)
    assert int(parts[0].step) == 1


def test_jit_changes_nothing_about_microbatches():
    eager = outcome(PLAIN, 2, compiled=False)
    test_methods.assert_trees_close(whole_batch(), eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unroll", [True, False])
def test_statistics_move_once_a_microbatch_and_gradients_are_averaged(unroll):
    method, batch, key = ce.cross_entropy(test_methods.NET, IMAGE), batch_of(), jax.random.key(1)
    before = start(method)
    after, metrics = outcome(method, 2, unroll)

    @quick
    def by_hand():
        model_state, grads, losses = before.model_state, [], []
        for i in range(2):
            rows = {k: v[i::2] for k, v in batch.items()}
            part_key = at_step(at_step(key, "step", 0), "microbatch", i)
            (loss, (model_state, _)), grad = jax.value_and_grad(method.loss, has_aux=True)(
                before.params, model_state, rows, before.step, part_key
            )
            grads.append(grad)
            losses.append(loss)
        mean = jax.tree.map(lambda *g: sum(g) / 2, *grads)
        params = jax.tree.map(lambda p, g: p - g, before.params, mean)
        return params, model_state, sum(losses) / 2, optax.tree.norm(mean)

    params, model_state, loss, norm = by_hand()
    test_methods.assert_trees_close(after.params, params, rtol=1e-5, atol=1e-6)
    test_methods.assert_trees_close(after.model_state, model_state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)


def test_dropout_differs_between_microbatches():
    drawn = []

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, images, train=False, statistics=None):
            drawn.append(jax.random.key_data(self.make_rng("dropout")) if train else None)
            return Plain(name="net")(images)

    method = ce.cross_entropy(Spy(), IMAGE)
    state = start(method)
    drawn.clear()
    make_train_step(method, optax.sgd(1.0), jax.random.key(1), 2, True)(state, batch_of())
    first, second, again_first, again_second = (np.asarray(key) for key in drawn)
    assert (first != second).any()
    # The pass that only looks and the one that learns drop the same.
    np.testing.assert_array_equal(first, again_first)
    np.testing.assert_array_equal(second, again_second)


def ce_of_parts(method, count):
    state, batch = start(method), batch_of()
    return [
        float(method.loss(state.params, state.model_state, rows, 0, jax.random.key(0))[1][1]["ce"])
        for rows in ({k: v[i::count] for k, v in batch.items()} for i in range(count))
    ]


@pytest.mark.parametrize("unroll", [True, False])
def test_a_constraint_on_the_mean_is_on_that_of_the_whole_batch(unroll):
    values = ce_of_parts(PLAIN, 2)
    constraint = (min(values) + np.mean(values)) / 2
    assert min(values) < constraint < np.mean(values)  # the microbatches disagree about the sign
    transform = unleashing_mask.transform(constraint, 1.0)
    batch = batch_of() | {"outlier_image": 1 - batch_of()["image"]}
    method = outlier_exposure.exposure(Plain(), IMAGE, ce_transform=transform)
    whole, parts = (outcome(method, n, unroll, batch) for n in (1, 2))
    test_methods.assert_trees_close(whole, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("unroll", "transformed"), [(True, False), (False, True)])
def test_woods_constraints_and_multipliers_are_of_the_whole_batch(unroll, transformed):
    batch = batch_of() | {"wild_image": 1 - batch_of()["image"]}
    transform = unleashing_mask.transform(1.1, 1.0) if transformed else None
    method = woods.wild_mixture(
        Plain(), IMAGE, epoch_steps=2, ce_limit=0.5, id_limit=0.05, ce_transform=transform
    )

    def two_steps(count):
        optimizer = optax.sgd(0.1)
        step = quick(make_train_step(method, optimizer, jax.random.key(1), count, unroll))
        state = start(method, optimizer)
        first, _ = step(state, batch)
        return first, *step(first, batch)

    whole, parts = two_steps(1), two_steps(2)
    test_methods.assert_trees_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert int(parts[0].model_state["woods"]["count"]) == 1
    assert (parts[1].model_state["woods"]["multiplier"] > 0).any()  # it moved after two steps


def test_the_pass_that_looks_is_there_only_for_losses_that_ask():
    def flops(count, **options):
        method = ce.cross_entropy(Plain(), IMAGE, **options)
        step = make_train_step(method, optax.sgd(1.0), jax.random.key(1), count, True)
        return quick(step).lower(start(method), batch_of(64)).compile().cost_analysis()["flops"]

    one = flops(1)
    assert abs(flops(2) - one) < 0.02 * one
    assert flops(2, ce_transform=unleashing_mask.transform(1.0, 1.0)) > 1.05 * one


@pytest.mark.parametrize(("name", "count"), [("vit token", 2), slow("resnet", 2)])
def test_microbatches_need_less_memory(name, count):
    method, optimizer = ce.cross_entropy(MODELS[name], IMAGE), optax.sgd(1.0)
    make = functools.partial(training_state.fresh_state, method, optimizer)
    state = jax.eval_shape(make, jax.random.key(0))
    temporary = []
    for parts in (1, count):
        step = make_train_step(method, optimizer, jax.random.key(1), parts, True)
        temporary.append(temporary_bytes(jax.jit(step).lower(state, batch_of(256))))
    assert temporary[1] < 0.7 * temporary[0]


@pytest.mark.parametrize("unroll", [True, False])
def test_microbatches_stay_spread_over_the_devices(unroll):
    mesh = distributed.make_mesh()
    devices = mesh.shape["data"]
    assert devices == 4
    batch = {"image": jnp.arange(16.0).reshape(16, 1, 1, 1)}
    parts = jax.jit(lambda b: split(distributed.shard_batch(b, mesh), 2))(batch)["image"]
    assert parts.shape == (2, 8, 1, 1, 1)
    for shard in parts.addressable_shards:
        assert shard.data.shape == (2, 2, 1, 1, 1)
        first = shard.index[1].start * 2  # of the device's rows in the batch
        rows = np.asarray(shard.data).reshape(2, 2)
        np.testing.assert_array_equal(rows, first + np.array([[0, 2], [1, 3]]))

    method = ce.cross_entropy(test_methods.NET, IMAGE)
    step = make_train_step(method, optax.sgd(1.0), jax.random.key(1), 2, unroll)
    spread = quick(lambda s, b: step(s, distributed.shard_batch(b, mesh)))
    state = distributed.replicate(start(method), mesh)
    whole = distributed.replicate(batch_of(), mesh)
    text = spread.lower(state, whole).compile().as_text()
    assert "all-reduce" in text
    assert not [n for n in ("all-gather", "all-to-all", "collective-permute") if n in text]
    test_methods.assert_trees_close(
        spread(state, whole), outcome(method, 2, unroll), rtol=1e-4, atol=1e-5
    )


REFUSED = {"doe", "oal reference", "oal alternate"}


@pytest.mark.parametrize("name", sorted(set(test_methods.GOLDEN) - REFUSED))
def test_a_step_of_every_method_splits(name):
    state, _ = test_methods.start(name)
    method = test_methods.make_method(name, test_methods.WEIGHTS)
    assert_state_keeps_its_form(method, state, test_methods.make_batch(name))


@pytest.mark.parametrize("name", sorted(set(test_outlier_methods.BUILD) - REFUSED))
def test_a_step_of_every_outlier_method_splits(name):
    method = test_outlier_methods.make_method(name)
    state = jax.eval_shape(
        functools.partial(training_state.fresh_state, method, optax.sgd(0.1)), jax.random.key(0)
    )
    assert_state_keeps_its_form(method, state, test_outlier_methods.make_batch(name))


def assert_state_keeps_its_form(method, state, batch):
    # A scan takes nothing else as its carry.
    step = make_train_step(method, optax.sgd(0.1), jax.random.key(1), 2, unroll=False)
    state = state.replace(opt_state=optax.sgd(0.1).init(state.params))
    after, metrics = jax.eval_shape(step, state, batch)
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert form(after) == form(jax.eval_shape(lambda s: s, state))
    assert all(m.shape == () for m in metrics.values()) and "loss" in metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.accumulate": 0}, "train.accumulate=0 must be greater than 0"),
        ({"train.accumulate": 3}, "train.batch_size=128 is not divisible.*for example 126"),
        ({"method.outlier_batch": 6}, "method.outlier_batch=6 is not divisible.*for example 4"),
        ({"method.name": "doe"}, "method.name='doe' needs the whole batch"),
        ({"method.micl": "reference"}, "method.micl='reference' needs the whole batch"),
        (
            {"method.name": "npos", "method.virtual.contrastive": 0.1},
            "method.virtual.contrastive needs the whole batch",
        ),
    ],
)
def test_what_does_not_split_is_one_line(changes, message):
    config = Config()
    config.train.accumulate = 4
    for path, value in changes.items():
        *parents, name = path.split(".")
        node = functools.reduce(getattr, parents, config)
        setattr(node, name, value)
    with pytest.raises(UserError, match=message) as raised:
        validate(config)
    assert "\n" not in str(raised.value)


def test_a_batch_that_the_devices_can_t_share_is_one_line():
    check_split("train.batch_size", 128, 4, 8)
    with pytest.raises(UserError, match=r"batch_size=120 .*accumulate=4 times the 8 .*example 96"):
        check_split("train.batch_size", 120, 4, 8)


# Through the stages


def saved_start(tmp_path, net, **changes):
    """A context whose `train.start` is `net`, saved with `changes` to what its card says of it."""
    config = Config(smoke=True)
    config.train.start = str(tmp_path)
    context = Context(config, tmp_path / "run", distributed.make_mesh(), jax.random.key(0))
    data = context.images("validation", limit=1)
    x = jnp.zeros((1, *data.images.shape[1:]))
    params, rest = split_variables(jax.eval_shape(net.init, jax.random.key(0), x))
    tree = {"params": {"student": params}, "state": {"student": rest}}
    flat = {".".join(k): np.zeros(v.shape, v.dtype) for k, v in flatten_dict(tree).items()}
    artifacts.write_tensors(tmp_path / "train" / train.STUDENT, flat)
    architecture = train._architecture(net) | changes
    known = {k: v for k, v in architecture.items() if v is not None}
    card = {"image_shape": data.images.shape[1:], "architecture": known}
    artifacts.write_json(tmp_path / "train" / train.CLASSIFIER, card)
    return context, data


@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
def test_a_start_may_have_been_trained_in_another_type_or_before_there_was_one(tmp_path, said):
    config = Config()
    config.student.width = 2
    net = train.student(config, 8)
    context, data = saved_start(tmp_path, net, dtype=said)
    card = artifacts.read_json(tmp_path / "train" / train.CLASSIFIER)
    assert card["architecture"].get("dtype") == said and "remat" not in card["architecture"]
    params, _ = train.start(context, net.clone(dtype=HALF, remat=True), data)
    assert dtypes(params) == {np.dtype(np.float32)}
    with pytest.raises(UserError, match="another architecture.*stem"):
        train.start(context, net.clone(stem="cifar"), data)


def test_rematerialisation_reruns_no_stage_and_precision_does():
    changed = {"student.remat": True, "teacher.remat": True, "student.dtype": "bfloat16"}
    reads = {stage.name: stage.reads_config for stage in pipeline.STAGES}
    read = lambda name, key: (
        any(pipeline._below(key, prefix) for prefix in reads[name])
        and not any(
            pipeline._below(key, prefix[1:]) for prefix in reads[name] if prefix.startswith("-")
        )
    )
    stages = {key: {n for n in reads if n != "report" and read(n, key)} for key in changed}
    assert not stages["student.remat"] and not stages["teacher.remat"]
    assert stages["student.dtype"] == {"estimate_loss", "train"}


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
    sets = evaluate.inputs(context)
    assert dtypes(sets.id_test.outputs) == {np.dtype(np.float32)}
    x = sets.id_test.images()[:8]
    detector = oal_jax.load(workdir)
    found = detector(x)
    label, confidence, ood_score, _ = exported(detector, ["cpu"]).call(x)
    assert found.ood_score.dtype == ood_score.dtype == confidence.dtype == np.float32
    # One image at a time there, a batch here: bfloat16 sums in another order.
    np.testing.assert_allclose(found.ood_score, ood_score, rtol=0.02)
    assert np.mean(found.label == label) >= 7 / 8
    report = (workdir / "report" / "ood.csv").read_text()
    assert "odin" in report and "nan" not in report
