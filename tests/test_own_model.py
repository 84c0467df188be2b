"""Detectors and benchmarks of models, and of images, that this package knows nothing of."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from scipy.special import logsumexp

import oal_jax
from oal_jax.data import sources
from oal_jax.errors import UserError
from oal_jax.evaluation import format_table
from oal_jax.evaluation.metrics import auroc
from oal_jax.scores import GRIDS, SCORES

WIDTH, CLASSES = 48, 8


def features_of(images, matrix):
    """A fixed random layer: enough for a classifier that is fitted in closed form."""
    x = images.reshape(images.shape[0], -1) - 0.3
    return jax.nn.relu(x @ matrix)


class Linen(nn.Module):
    """Gives (logits, features)."""

    @nn.compact
    def __call__(self, images):
        features = features_of(images, self.param("matrix", nn.initializers.zeros, (784, WIDTH)))
        return nn.Dense(CLASSES, name="head")(features), features


class Nnx(nnx.Module):
    """Gives a dict, a feature map in it."""

    def __init__(self, own):
        self.matrix = nnx.Param(jnp.asarray(own.matrix))
        self.kernel = nnx.Param(jnp.asarray(own.head[0]))
        self.bias = nnx.Param(jnp.asarray(own.head[1]))

    def __call__(self, images):
        features = features_of(images, self.matrix[...])
        logits = features @ self.kernel[...] + self.bias[...][None, :]
        return {"logits": logits, "features": features, "maps": [images]}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["matrix", "kernel", "bias", "activation"],
    meta_fields=[],
)
@dataclass
class Module:
    """A pytree that is called, a function among its leaves: as Equinox's modules are."""

    matrix: Any
    kernel: Any
    bias: Any
    activation: Callable = jax.nn.relu

    def __call__(self, images):
        x = images.reshape(images.shape[0], -1) - 0.3
        features = self.activation(x @ self.matrix)
        return features @ self.kernel + self.bias[None, :], features


class Weights(NamedTuple):
    """The same of arrays alone."""

    matrix: Any
    kernel: Any
    bias: Any

    def __call__(self, images):
        return Module(*self)(images)


@pytest.fixture(scope="module")
def own():
    """Images, and a classifier with one random and one ridge-regressed layer."""
    train = sources.load("bundled", "fashion", "train", limit=1500)
    validation = sources.load("bundled", "fashion", "validation", limit=400)
    digits = sources.load("bundled", "mnist", "test", limit=200)
    matrix = np.random.default_rng(0).normal(size=(784, WIDTH)).astype(np.float32) / 10
    features = np.asarray(features_of(train.images / np.float32(255), matrix))
    design = np.c_[features, np.ones(len(features))]
    targets = 6 * np.eye(CLASSES)[train.labels]
    solved = np.linalg.solve(design.T @ design + np.eye(WIDTH + 1), design.T @ targets)
    head = solved[:-1].astype(np.float32), solved[-1].astype(np.float32)
    return SimpleNamespace(
        matrix=matrix,
        head=head,
        train=(train.images, train.labels),
        validation=(validation.images, validation.labels),
        digits=digits.images,
        names=train.class_names,
    )


def function_of(own):
    def forward(images):
        features = features_of(images, own.matrix)
        return features @ own.head[0] + own.head[1][None, :], features

    return jax.jit(forward)


def linen_of(own):
    kernel, bias = own.head
    variables = {"params": {"matrix": own.matrix, "head": {"kernel": kernel, "bias": bias}}}
    return Partial(Linen().apply, variables)


def numpy_of(own):
    def forward(images):
        x = np.asarray(images).reshape(len(images), -1) - np.float32(0.3)
        features = np.maximum(x @ own.matrix, 0)
        return features @ own.head[0] + own.head[1], features

    return forward


MODELS = {
    "function": function_of,
    "numpy": numpy_of,
    "linen": linen_of,
    "functools": lambda own: partial(Linen().apply, linen_of(own).args[0], mutable=False),
    "nnx": Nnx,
    "module": lambda own: Module(own.matrix, *own.head),
    "named tuple": lambda own: Weights(own.matrix, *own.head),
}


@pytest.mark.parametrize(
    ("kind", "score"),
    # Gradients by the image go through a model that is closed over, and through one that is not.
    [*((kind, "knn") for kind in MODELS), ("function", "odin"), ("named tuple", "odin")],
)
def test_every_kind_of_model(own, kind, score):
    detector = oal_jax.calibrate(
        MODELS[kind](own),
        train=own.train,
        validation=own.validation,
        score=score,
        keep_id=0.9,
        class_names=own.names,
        batch_size=512,
    )
    result = detector(own.validation[0])
    assert abs(result.is_ood.mean() - 0.1) < 1.01 / 400  # as was asked for
    assert (result.label == own.validation[1]).mean() > 0.7  # guessing has 0.125
    assert result.class_names[0] == own.names[result.label[0]]
    assert auroc(result.ood_score, detector(own.digits).ood_score) > 0.7


def test_the_energy_is_that_of_the_logits(own):
    detector = oal_jax.calibrate(function_of(own), own.train, own.validation, keep_id=0.8)
    images = own.digits[:50]
    logits, _ = function_of(own)(images / np.float32(255))
    energy = -logsumexp(np.float64(logits), axis=1)
    np.testing.assert_allclose(detector(images).ood_score, energy, rtol=1e-5)
    np.testing.assert_array_equal(
        detector(images).is_ood, detector(images).ood_score > detector.threshold
    )
    floats = [(x / np.float32(255), y) for x, y in (own.train, own.validation)]
    same = oal_jax.calibrate(function_of(own), *floats, keep_id=0.8)
    np.testing.assert_allclose(same.threshold, detector.threshold, rtol=1e-5)


def test_class_names_and_labels_in_other_forms(own):
    names = {i: f"class {i}" for i in range(CLASSES)}
    forms = (names, {str(i): name for i, name in names.items()}, {v: k for k, v in names.items()})
    images, labels = own.train
    for form, integers in zip(forms, (list, jnp.asarray, np.int64), strict=True):
        detector = oal_jax.calibrate(
            function_of(own), (images, integers(labels)), own.validation, class_names=form
        )
        assert detector.class_names == tuple(names.values())


def test_parameters_reach_the_score(own):
    calibrate = partial(oal_jax.calibrate, function_of(own), own.train, own.validation, "knn")
    near, far = calibrate(params={"k": 1}), calibrate(params={"k": 100})
    assert near.params == {"k": 1} and near.threshold < far.threshold
    with pytest.raises(UserError, match="'knn'.*'kk'.*'k'"):
        calibrate(params={"kk": 1})


def test_a_score_that_needs_the_head(own):
    calibrate = partial(oal_jax.calibrate, function_of(own), own.train, own.validation, "vim")
    expected = calibrate(head=own.head).threshold
    kernel, bias = own.head
    for head in (list(own.head), {"kernel": jnp.asarray(kernel), "bias": bias}):
        assert calibrate(head=head).threshold == expected
    for head in ({"weight": kernel}, (kernel, bias, bias), "fc", bias, (bias, kernel), {}):
        with pytest.raises(UserError, match=r"head .*give \(kernel, bias\)"):
            calibrate(head=head)
    with pytest.raises(UserError, match=r"shapes \(48, 7\).*\(48, 8\)"):
        calibrate(head=(kernel[:, :7],))


@pytest.mark.parametrize("kind", ["function", "functools", "module", "nnx", "transposed"])
def test_the_head_is_found_among_the_model_s_arrays(own, kind):
    def transposed(matrix, kernel, bias, images):
        features = features_of(images, matrix)
        return jnp.einsum("nd,cd->nc", features, kernel) + bias[None], features

    arrays = own.matrix, own.head[0].T, own.head[1]
    model = Partial(transposed, *arrays) if kind == "transposed" else MODELS[kind](own)
    calibrate = partial(oal_jax.calibrate, train=own.train, validation=own.validation, score="vim")
    given = calibrate(function_of(own), head=own.head)
    np.testing.assert_allclose(calibrate(model).threshold, given.threshold, rtol=1e-4)


def test_a_head_that_is_no_array_of_the_model_is_asked_for(own):
    with pytest.raises(UserError, match=r"vim needs the last linear layer.*head=\(kernel, bias\)"):
        oal_jax.calibrate(numpy_of(own), own.train, own.validation, "vim")


def test_a_numpy_model_is_called_on_the_host_which_is_said(own, capsys):
    detector = oal_jax.calibrate(numpy_of(own), own.train, own.validation)
    assert capsys.readouterr().err.count("pure_callback") == 1
    traced = oal_jax.calibrate(function_of(own), own.train, own.validation)
    np.testing.assert_allclose(
        detector(own.digits).ood_score, traced(own.digits).ood_score, rtol=1e-4
    )
    with pytest.raises(UserError, match="odin takes gradients"):
        oal_jax.calibrate(numpy_of(own), own.train, own.validation, "odin")


def test_a_model_in_training_mode_is_refused(own):
    def normalised_by_the_batch(images):
        features = features_of(images, own.matrix)
        return (features - features.mean(0, keepdims=True)) @ own.head[0]

    def with_dropout(images):
        features = features_of(images, own.matrix)
        mask = jax.random.bernoulli(jax.random.key(0), 0.5, features.shape)
        return (features * mask) @ own.head[0]

    for model in (normalised_by_the_batch, with_dropout):
        with pytest.raises(UserError, match="evaluation mode"):
            oal_jax.calibrate(model, own.train, own.validation)


RETURNS = {
    "no array": (lambda x: "cat", "logits are a str"),
    "none": (lambda x: None, "no logits"),
    "four": (lambda x: (x, x, x, x), "4 values"),
    "images": (lambda x: x, r"logits have shape \(.*\)"),
    "a sum": (lambda x: x.sum(), r"logits have shape \(\)"),
    "a name": (lambda x: {"logit": x}, "'logit'.*'logits'"),
    "features": (lambda x: (x[:, 0, :, 0], x), r"features have shape"),
    "maps": (lambda x: (x[:, 0, :, 0], None, [x[0]]), r"maps\[0\] have shape"),
    "nan": (lambda x: x[:, 0, :8, 0] + jnp.nan, "ID train.*NaN"),
    "few classes": (lambda x: x[:, 0, :3, 0], "0 to 7.* 3 logits: labels start at 0 and end at 2"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_else_a_model_returns_is_told(own, name):
    model, message = RETURNS[name]
    small = own.train[0][:40], own.train[1][:40]
    with pytest.raises(UserError, match=message):
        oal_jax.calibrate(model, small, own.validation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model must be .*int"),
        ({"train": 3}, r"train .*\(images, labels\)"),
        ({"train": (np.zeros((28, 28, 3), np.uint8), [0] * 28)}, r"single image.*images\[None\]"),
        ({"train": (np.zeros((4, 28, 28, 1), np.uint8), [0] * 3)}, "labels of train"),
        ({"train": (np.zeros((0, 28, 28, 1), np.uint8), [])}, "train .*no images"),
        ({"validation": (np.zeros((4, 9, 9, 1), np.uint8), [0] * 4)}, "not .n, 28, 28, 1."),
        ({"score": "enrgy"}, "'energy'"),
        ({"score": "mahalanobis", "model": lambda x: x[:, 0, :8, 0]}, "features"),
        ({"keep_id": 2}, "keep_id"),
        ({"keep_id": "0.9"}, "keep_id"),
        ({"class_names": ["a", "b"]}, "2 class_names.*8 logits"),
        ({"class_names": {0: "a", 1: "b"}}, "dict of 2 names.*8 logits"),
        ({"class_names": "abcdefgh"}, "list of names"),
        ({"class_names": set("abcdefgh")}, "list of names"),
        ({"mesh": "cpu"}, "mesh must be .*str"),
        ({"params": "msp"}, "params must be a dict.*'msp'"),
        ({"params": {5: 5}}, "params must be a dict"),
        ({"score": ["msp"]}, "did you mean 'msp'"),
        ({"batch_size": 0}, "batch_size .*1 or more"),
        ({"batch_size": "all"}, "batch_size .*1 or more"),
        ({"model": Linen()}, "linen module.*Partial"),
        ({"model": lambda x: x @ np.zeros((5, 5))}, "model fails.*TypeError"),
        ({"model": lambda x: x[:, 0, :1, 0]}, "1 logit;"),
        ({"model": lambda x: jax.nn.softmax(x[:, 0, :8, 0])}, "gives probabilities"),
        ({"model": "absent.safetensors"}, "absent.safetensors.*No such file"),
    ],
)
def test_wrong_arguments_are_told(own, changes, message):
    usual = {"model": function_of(own), "train": own.train, "validation": own.validation}
    with pytest.raises(UserError, match=message):
        oal_jax.calibrate(**(usual | changes))


class Normalised(nn.Module):
    """A linen module with batch norm and dropout."""

    @nn.compact
    def __call__(self, images, train=True):
        images = nn.BatchNorm(use_running_average=not train)(images)
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(images.mean((1, 2))))


@pytest.mark.parametrize("what", ["training", "no batch_stats", "no params"])
def test_a_linen_model_in_training_mode_or_without_variables_has_a_hint(own, what):
    net, images = Normalised(), own.train[0][:2] / np.float32(255)
    variables = net.init(jax.random.key(0), images, train=False)
    missing = {"training": "", "no batch_stats": "batch_stats", "no params": "params"}[what]
    some = {name: value for name, value in variables.items() if name != missing}
    model = Partial(partial(net.apply, train=what == "training"), some)
    with pytest.raises(UserError, match=r"variables, train=False\), with all its variables$") as e:
        oal_jax.calibrate(model, own.train, own.validation)
    urls = [word.strip("().;") for word in str(e.value).split() if "http" in word]
    assert all(".html#" in url for url in urls) and "\n" not in str(e.value)


def test_few_validation_images_are_a_warning(own, capsys):
    few = own.validation[0][:5], own.validation[1][:5]
    oal_jax.calibrate(function_of(own), own.train, few)
    assert capsys.readouterr().err.count("5 validation images") == 1


def test_a_pytree_carries_its_weights_as_arguments(own):
    held = jax.tree.leaves(oal_jax.as_forward(Weights(own.matrix, *own.head)))
    assert [leaf.shape for leaf in held] == [(784, WIDTH), (WIDTH, CLASSES), (CLASSES,)]
    same = [oal_jax.as_forward(Weights(own.matrix, *own.head)) for _ in range(2)]
    assert jax.tree.structure(same[0]) == jax.tree.structure(same[1])  # one program for both
    # A function among the leaves cannot be an argument, and stays part of the program.
    of_module = jax.tree.leaves(oal_jax.as_forward(Module(own.matrix, *own.head)))
    assert [leaf.shape for leaf in of_module] == [leaf.shape for leaf in held]


# The benchmark


def small(data, count):
    """The first images of a set, and their labels where it has some."""
    return tuple(x[:count] for x in data) if isinstance(data, tuple) else data[:count]


@pytest.fixture(scope="module")
def bundled():
    """A little of every set of the bundled benchmark."""
    sets = oal_jax.load_sets("fashion", train_images=500)
    assert len(sets.train[0]) == len(sets.train[1]) == 500
    assert list(sets.near) == ["sandal", "bag"] and next(iter(sets.far)) == "mnist"
    assert len(sets.validation_ood) == len(sets.csid) == 5
    return oal_jax.Sets(
        *(small(data, 300) for data in sets[:3]),
        *({name: small(x, 100) for name, x in list(group.items())[:2]} for group in sets[3:]),
    )


def test_the_benchmark_of_the_bundled_sets(own, bundled):
    result = oal_jax.benchmark(
        Weights(own.matrix, *own.head),
        bundled,
        scores=("energy", "react"),
        head=own.head,
        search=True,
        keep_id=0.9,
    )
    rows = {(row.score, row.dataset): row for row in result.rows}
    names = [*bundled.near, "nearood", *bundled.far, "farood"]
    assert sorted(rows) == sorted((score, name) for score in ("energy", "react") for name in names)
    logits, _ = Weights(own.matrix, *own.head)(bundled.test[0] / np.float32(255))
    energy = -logsumexp(np.float64(logits), axis=1)
    np.testing.assert_allclose(result.id_scores["energy"], energy, rtol=1e-5)
    right = 100 * np.mean(np.argmax(logits, axis=1) == bundled.test[1])
    mnist = result.ood_scores["energy"]["mnist"]
    assert rows["energy", "mnist"].auroc == pytest.approx(100 * auroc(energy, mnist), abs=1e-3)
    assert all(row.id_accuracy == pytest.approx(right) for row in result.rows)
    assert result.params["energy"] == {}  # it has no grid
    assert result.params["react"]["percentile"] in GRIDS["react"]["percentile"]
    assert [row.dataset for row in result.csid_rows[:2]] == list(bundled.csid)
    full = {(row.score, row.dataset) for row in result.full_spectrum_rows}
    assert full == set(rows)
    assert {row.group for row in result.validation_rows} == {"validation"}
    rejected = np.mean(result.id_val_scores["energy"] > result.thresholds["energy"])
    assert rejected == pytest.approx(0.1, abs=1 / 300)
    assert "farood" in format_table(result.rows)


@pytest.fixture(scope="module")
def colours():
    """Images of 12 x 12 pixels in colour, three classes; and a classifier in closed form."""
    rng = np.random.default_rng(0)
    means = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])

    def images(colour, count=60):
        noisy = colour + rng.normal(scale=30, size=(count, 12, 12, 3))
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)

    def labelled(brighter=0):
        labels = np.tile(np.arange(3), 20)
        return np.concatenate([images(means[c] + brighter, 1) for c in labels]), labels

    train = labelled()
    pixels = train[0].reshape(60, -1) / 255
    centres = np.stack([pixels[train[1] == c].mean(0) for c in range(3)])
    # Linear discriminants of Gaussians of one variance.
    head = jnp.float32(centres.T), jnp.float32(-0.5 * (centres**2).sum(1))
    sets = oal_jax.Sets(
        train=train,
        validation=labelled(),
        test=labelled(),
        near={"yellow": images([150, 150, 40])},
        far={"black": images([10, 10, 10]), "gray": images([128, 128, 128])},
        validation_ood={"cyan": images([40, 150, 150])},
        csid={"brighter": labelled(20)},
    )

    def forward(images):
        x = images.reshape(images.shape[0], -1)
        return {"logits": x @ head[0] + head[1][None, :], "features": x}

    return SimpleNamespace(sets=sets, head=head, forward=forward)


def as_floats(data):
    if isinstance(data, tuple):
        return data[0] / np.float32(255), data[1]
    return data / np.float32(255)


def test_the_benchmark_of_images_of_ones_own(colours):
    scores = ("odin", "knn")  # one reads the images, the other the outputs
    params = {"knn": {"k": 3}}
    run = partial(oal_jax.benchmark, colours.forward, scores=scores, params=params, batch_size=32)
    bytes_, floats = (
        run(sets, head=colours.head)
        for sets in (
            colours.sets,
            oal_jax.Sets(
                *map(as_floats, colours.sets[:3]),
                *({name: as_floats(x) for name, x in group.items()} for group in colours.sets[3:]),
            ),
        )
    )
    for score in scores:
        np.testing.assert_allclose(bytes_.id_scores[score], floats.id_scores[score], rtol=1e-4)
        for name, values in bytes_.ood_scores[score].items():
            again = floats.ood_scores[score][name]
            np.testing.assert_allclose(values, again, rtol=1e-4, err_msg=f"{score} {name}")
    assert [row[:3] for row in bytes_.rows] == [row[:3] for row in floats.rows]
    assert {row.id_accuracy for row in bytes_.rows} == {100.0}
    assert bytes_.params["knn"] == {"k": 3}
    # Classes that are far from each other in 432 dimensions: nothing else lies near any.
    assert all(row.auroc == 100 for row in bytes_.rows if row.score == "knn")
    # The classes, brighter, keep their labels.
    assert [row.id_accuracy for row in bytes_.csid_rows] == [100.0] * len(scores)
    assert {row.dataset for row in bytes_.validation_rows} == {"cyan", "valood"}


@pytest.mark.parametrize("kind", ["logits", pytest.param("features", marks=pytest.mark.slow)])
def test_all_scores_and_one(colours, capsys, kind):
    few = colours.sets._replace(near={"yellow": (colours.sets.near["yellow"], np.zeros(60, int))})
    model = colours.forward if kind == "features" else without_features
    result = oal_jax.benchmark(model, few, "all", batch_size=60)
    left_out = capsys.readouterr().err
    if kind == "features":  # the head is what the function closes over
        assert {"vim", "react", "knn"} <= set(result.thresholds)
    else:
        assert "vim is left out: the model gives no features" in left_out
    assert "gram is left out: the model gives no grams" in left_out
    assert {"msp", "odin"} <= set(result.thresholds)
    assert len(result.thresholds) + left_out.count("left out") == len(SCORES)
    one = oal_jax.benchmark(model, few, "msp", batch_size=60)
    assert [row for row in result.rows if row.score == "msp"] == one.rows


def without_features(images):
    return images.reshape(images.shape[0], -1)[:, :3]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"far": {"yellow": None}}, {}, "yellow.*near.*far"),
        ({"train": (np.zeros((4, 12, 12, 3), np.uint8), [0] * 3)}, {}, "labels of set ID train"),
        ({"test": (np.zeros((4, 12, 12, 3), np.uint8), [9] * 4)}, {}, "9 to 9"),
        ({"validation": np.zeros((4, 12, 12, 3))}, {}, r"validation .*\(images, labels\)"),
        ({"near": [np.zeros((4, 12, 12, 3))]}, {}, "near must be a dict"),
        ({}, {"params": "msp"}, "params must be a dict"),
        ({}, {"params": {"knn": 5}}, "params must be a dict"),
        ({}, {"scores": 5}, "scores must be names"),
        ({}, {"batch_size": 0}, "batch_size"),
        ({"csid": {"fog": np.zeros((4, 12, 12, 3))}}, {}, r"fog .*\(images, labels\)"),
        ({"near": {"small": np.zeros((4, 9, 9, 3))}}, {}, r"small: .*\(n, 12, 12, 3\)"),
        ({"near": {"bright": np.full((4, 12, 12, 3), 9.0)}}, {}, r"bright: .*\[0, 1\]"),
        ({"near": {"none": np.zeros((0, 12, 12, 3))}}, {}, "none: no images"),
        ({"near": {"nearood": np.zeros((4, 12, 12, 3))}}, {}, "nearood"),
        ({}, {"scores": ("enrgy",)}, "'enrgy'.*'energy'"),
        ({}, {"scores": ("energy", "energy")}, "energy"),
        ({}, {"scores": ("react",), "head": (np.zeros((3, 3)),)}, "react: the head has shapes"),
        ({}, {"params": {"knn": {"k": 3}}}, "parameters .*'knn'"),
        ({}, {"model": without_features, "scores": ("knn",)}, "features of ID train"),
        ({}, {"model": lambda x: x[:, 0, :3, 0] - x.mean()}, "batch"),
        ({}, {"model": lambda x: x[:, 0, :3, 0] / 0}, "ID train: .*NaN"),
        ({"validation_ood": {}}, {"search": True}, "search=True"),
        ({}, {"keep_id": 1.0}, "keep_id"),
        ({}, {"batch_size": 0}, "batch_size.* 0"),
    ],
)
def test_a_benchmark_that_cannot_be_is_told_in_one_line(colours, changes, arguments, message):
    usual = {"model": colours.forward, "scores": ("energy",)}
    with pytest.raises(UserError, match=message) as caught:
        oal_jax.benchmark(sets=colours.sets._replace(**changes), **(usual | arguments))
    assert "\n" not in str(caught.value)


def test_sets_that_are_not_there_are_told():
    with pytest.raises(UserError, match="fashon"):
        oal_jax.load_sets("fashon")
    with pytest.raises(UserError, match="/none"):
        oal_jax.load_sets("cifar10", source="imglist", root="/none")


_IMPORTS = """
import sys, pkgutil, oal_jax

def loaded(*names):
    return [n for n in names if any(m == n or m.startswith(n + ".") for m in sys.modules)]

assert not loaded("jax", "numpy", "flax"), "importing the package must be instant"
oal_jax.calibrate, oal_jax.Detector
heavy = loaded("oal_jax.stages", "oal_jax.training", "orbax", "optax", "matplotlib")
assert not heavy, heavy
import oal_jax.detection.benchmark
from oal_jax import benchmark, Sets
assert callable(benchmark) and Sets._fields[0] == "train"
assert not {m.name for m in pkgutil.iter_modules(oal_jax.__path__)} & set(oal_jax.__all__)
"""


def test_public_names_are_imported_on_first_use_and_bring_no_training():
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
    assert all(getattr(oal_jax, name) is not None for name in oal_jax.__all__)
    with pytest.raises(AttributeError, match="laod"):
        oal_jax.laod  # noqa: B018
