"""Fine-tuning of a trained start: the estimate of its loss, the saved mask, unfit starts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import numpy_mask, refusal

from oal_jax.config import Config, Data, Method, Student, Train
from oal_jax.config.methods import UnleashingMask
from oal_jax.methods import ce, masking
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import at_step, named
from oal_jax.stages import estimate_loss, student, train
from oal_jax.stages.context import Context
from oal_jax.training.state import init_state


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
    net = student.network(context.config, len(data.class_names))
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


@pytest.mark.slow
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
    sizes = [k.size for k in masking.masked_tensors(variables["params"]).values()]
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


@pytest.mark.slow
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
