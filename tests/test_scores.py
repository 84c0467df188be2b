"""Every registered score against the promises of the registry, and each one against NumPy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import cdist
from scipy.special import log_softmax

from oal_jax import scores
from oal_jax.errors import UserError
from oal_jax.evaluation.metrics import auroc
from oal_jax.scores import Head, Outputs
from oal_jax.scores.knn import top_similarities

CLASSES, WIDTH = 5, 12
SMALL = {  # parameters for the tiny data here
    "knn": {"k": 7, "bank_chunk": 64},
    # A class has 18 inputs, and the far ones have long features.
    "openmax": {"tail": 3},
    "gradnorm": {"temperature": 10.0},
    "react": {"percentile": 95.0},  # below it lies the one active feature of every ID input
}
# To openmax every ID input is unknown that lies beyond the 18 training inputs of its class.
LEAST_AUROC = {"openmax": 0.85}


def _means():
    return 4 * np.eye(CLASSES, WIDTH)


def _head():
    return Head(_means().T.astype(np.float32), np.linspace(-0.1, 0.1, CLASSES, dtype=np.float32))


def _outputs(features):
    features = features.astype(np.float32)
    head = _head()
    # Two maps whose means are the features, so that every score has what it needs.
    ripple = np.float32([1.5, 0.5, 0.5, 1.5]).reshape(1, 2, 2, 1)
    maps = [ripple * features[:, None, None, :width] for width in (6, WIDTH)]
    logits = features @ head.kernel + head.bias[None, :]
    return jax.tree.map(np.array, scores.summarise(logits, features, maps, scores.FIELDS))


def _id(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    return _outputs(_means()[labels] + 0.5 * rng.normal(size=(n, WIDTH))), labels


def _far(n, seed):
    """Around a point that the axes of the classes do not reach, with small logits."""
    rng = np.random.default_rng(seed)
    center = np.zeros(WIDTH)
    center[-3:] = 3
    return _outputs(center[None, :] + 0.5 * rng.normal(size=(n, WIDTH)))


@cache
def _fitted(name):
    score = scores.make(name, **SMALL.get(name, {}))
    return score, scores.fit(score, *_id(90, seed=0), _head())


def _assert_close(values, expected):
    # Some scores are a difference of terms as large as the largest score.
    atol = 1e-6 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=atol)


@pytest.mark.parametrize("name", sorted(scores.SCORES))
def test_every_score_keeps_the_promises(name, tmp_path):
    score, state = _fitted(name)
    apply = partial(scores.apply, score, state, batch_size=16)  # one program for all sets
    outputs = _id(33, seed=1)[0]
    values = apply(outputs)
    assert values.shape == (33,) and values.dtype == np.float32 and np.isfinite(values).all()
    assert apply(jax.tree.map(lambda x: x[:0], outputs)).shape == (0,)
    # Neither the other rows of a batch nor its filling matter.
    order = np.random.default_rng(0).permutation(33)
    _assert_close(apply(jax.tree.map(lambda x: x[order], outputs)), values[order])
    _assert_close(apply(jax.tree.map(lambda x: x[30:31], outputs)), values[30:31])
    assert auroc(values, apply(_far(60, seed=2))) > LEAST_AUROC.get(name, 0.95)
    # The state is arrays, the same every time, and survives a file.
    assert isinstance(state, dict) and all(isinstance(x, jax.Array) for x in state.values())
    again = scores.fit(score, *_id(90, seed=0), _head())
    jax.tree.map(np.testing.assert_array_equal, state, again)
    # The format has no arrays without memory order, so views are copied.
    save_file({k: np.array(x, order="C") for k, x in state.items()}, tmp_path / "state")
    from_file = load_file(tmp_path / "state")
    assert set(from_file) == set(state)
    loaded = scores.apply(score, from_file, outputs, batch_size=16)
    np.testing.assert_array_equal(loaded, values)


@pytest.mark.parametrize("name", sorted(scores.SCORES))
def test_bad_values_are_refused_with_score_set_and_row(name):
    score, state = _fitted(name)
    outputs = _id(20, seed=1)[0]
    outputs.logits[3, 1] = np.nan
    with pytest.raises(UserError, match=f"{name}: .*logits of letters .* row 3"):
        scores.apply(score, state, outputs, set_name="letters")
    with pytest.raises(UserError, match=f"{name}: .*logits of ID train"):
        scores.fit(score, outputs, np.zeros(20, int), _head())
    outputs = _id(20, seed=1)[0]
    outputs.features[5] = np.inf
    if "features" in score.needs:
        with pytest.raises(UserError, match=f"{name}: .*features of letters .* row 5"):
            scores.apply(score, state, outputs, set_name="letters")


def test_jit_changes_nothing():
    score, state = _fitted("mahalanobis")
    outputs = _id(33, seed=1)[0]
    with jax.disable_jit():
        eager = score.score(state, outputs)
    _assert_close(scores.apply(score, state, outputs), eager)


def test_lengths_must_agree():
    score = scores.make("mahalanobis")
    outputs, labels = _id(20, seed=0)
    with pytest.raises(UserError, match="labels of shape"):
        scores.fit(score, outputs, labels[:-1], _head())
    with pytest.raises(UserError, match="features of ID train"):
        scores.fit(score, outputs._replace(features=outputs.features[:-1]), labels, _head())


def test_one_compilation_for_sets_of_any_size():
    traces = []

    def count(state, outputs):
        traces.append(outputs.logits.shape)
        return outputs.logits[:, 0]

    score = scores.Score(lambda outputs, labels, head, mesh: {}, count)
    for n in (3, 16, 33):
        scores.apply(score, {}, _id(n, seed=0)[0], batch_size=16)
    assert traces == [(16, CLASSES)]


def test_make_is_cached_so_that_jit_is_too():
    assert scores.make("knn", k=3) is scores.make("knn", k=3)
    assert scores.make("knn", k=3) is not scores.make("knn", k=4)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("enrgy", {}, "did you mean 'energy'"),
        ("zzz", {}, "known: .*knn"),
        ("energy", {"temprature": 2.0}, "did you mean 'temperature'"),
        ("msp", {"k": 2}, "known: none"),
        ("energy", {"temperature": 0.0}, "above 0"),
        ("knn", {"k": 0}, "1 or more"),
        ("mahalanobis", {"floor": 0.0}, "above 0"),
        (["msp"], {}, "did you mean 'msp'"),
        ("knn", {"k": "7"}, "k must be a whole number, 1 or more, got '7'"),
        ("knn", {"k": 5.5}, "whole number"),
        ("knn", {"k": True}, "whole number"),
        ("knn", {"bank_chunk": None}, "whole number"),
        ("energy", {"temperature": np.nan}, "a number"),
        ("neco", {"max_logit": 1}, "True or False"),
        ("mahalanobis_ensemble", {"weights": 1.0}, "list of numbers"),
        ("mahalanobis_ensemble", {"weights": ["a"]}, "number"),
    ],
)
def test_mistakes_in_names_and_parameters(name, params, message):
    with pytest.raises(UserError, match=message):
        scores.make(name, **params)


def test_equal_parameters_of_any_type_are_one_score():
    """Whichever comes first: 5.0 must not take the place of 5."""
    forms = (5.0, 5, np.int64(5), np.float32(5), jnp.int32(5))
    made = [scores.make("knn", k=k) for k in forms]
    assert all(score is made[0] for score in made)
    lists = [scores.make("mahalanobis_ensemble", weights=w) for w in ([1, 2], (1.0, 2.0))]
    assert lists[0] is lists[1]
    outputs, labels = _id(20, seed=0)
    state = scores.fit(made[0], outputs, labels, _head())
    assert np.isfinite(scores.apply(made[0], state, outputs)).all()


@pytest.mark.parametrize("temperature", [0.5, 10.0])
def test_energy_is_the_formula(temperature):
    outputs, labels = _id(20, seed=0)
    score = scores.make("energy", temperature=temperature)
    values = scores.apply(score, scores.fit(score, outputs, labels, _head()), outputs)
    z = outputs.logits.astype(np.float64) / temperature
    np.testing.assert_allclose(values, -temperature * np.log(np.exp(z).sum(axis=1)), rtol=1e-5)


def test_energy_becomes_max_logit_when_cold():
    outputs, labels = _id(20, seed=0)
    cold = scores.make("energy", temperature=1e-3)
    values = scores.apply(cold, scores.fit(cold, outputs, labels, _head()), outputs)
    np.testing.assert_allclose(values, -outputs.logits.max(axis=1), rtol=1e-5)


def test_msp_is_the_formula_and_does_not_saturate():
    score = scores.make("msp")
    outputs = _id(20, seed=0)[0]
    p = np.exp(log_softmax(outputs.logits.astype(np.float64), axis=1)).max(axis=1)
    np.testing.assert_allclose(scores.apply(score, {}, outputs), 1 - p, rtol=1e-4)
    # Both have a top probability of 1 in float32; the order must survive.
    sure, surer = scores.apply(score, {}, Outputs(np.array([[30.0, 0.0], [40.0, 0.0]]), None))
    assert sure > surer > 0
    # Two logits equal at the top are two classes, not one.
    assert scores.apply(score, {}, Outputs(np.array([[5.0, 5.0]]), None)) == pytest.approx([0.5])


@pytest.mark.parametrize(("k", "bank_chunk"), [(1, 1000), (7, 32), (90, 7), (90, 90), (1, 1)])
def test_knn_is_brute_force(k, bank_chunk):
    train, labels = _id(90, seed=0)
    queries = _far(30, seed=1)
    score = scores.make("knn", k=k, bank_chunk=bank_chunk)
    values = scores.apply(score, scores.fit(score, train, labels, _head()), queries)
    a, b = (
        x.features.astype(np.float64) / np.linalg.norm(x.features, axis=1)[:, None]
        for x in (queries, train)
    )
    np.testing.assert_allclose(values, np.sort(cdist(a, b), axis=1)[:, k - 1], atol=1e-5)


@pytest.mark.parametrize(("k", "bank_chunk"), [(1, 5000), (60, 1000), (5, 333)])
def test_top_similarities_are_exact_also_with_ties(k, bank_chunk):
    rng = np.random.default_rng(0)
    # Small integers: products are exact, and most of them occur many times.
    queries, bank = (rng.integers(-3, 4, (n, 4)).astype(np.float32) for n in (20, 3001))
    scale = rng.choice(np.float32([0.5, 1, 2]), 3001)
    largest = jax.jit(lambda *x: top_similarities(*x, k, bank_chunk))(queries, bank, scale)
    np.testing.assert_array_equal(
        largest, -np.sort(-queries @ (scale[:, None] * bank).T, axis=1)[:, :k]
    )


def test_knn_never_holds_the_whole_matrix():
    n, m = 512, 50_000
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((n, WIDTH), (m, WIDTH), (m,))]
    compiled = jax.jit(lambda *x: top_similarities(*x, 10, 1000)).lower(*shapes).compile()
    # Nor a copy of the bank beside one block of it.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * n * m / 20


def test_knn_survives_zero_features_and_asks_for_enough():
    outputs, labels = _id(20, seed=0)
    outputs.features[0] = 0
    score = scores.make("knn", k=5)
    state = scores.fit(score, outputs, labels, _head())
    assert np.isfinite(scores.apply(score, state, outputs)).all()
    with pytest.raises(UserError, match="k=50 needs at least 50 training features, got 20"):
        scores.fit(scores.make("knn", k=50), outputs, labels, _head())


def test_neighbours_are_at_most_a_tenth_of_the_training_images_by_default():
    for name, usual in (("knn", 50), ("nnguide", 10), ("mode", 10)):
        for images in (5, 40, 600):
            outputs, labels = _id(images, seed=0)
            bank = images * (6 if name == "mode" else 1)
            k = max(1, min(usual, bank // 10))
            by_default, by_hand = (scores.make(name, **p) for p in ({}, {"k": k}))
            expected, actual = (
                scores.apply(s, scores.fit(s, outputs, labels, _head()), outputs)
                for s in (by_hand, by_default)
            )
            np.testing.assert_array_equal(actual, expected)


def test_mahalanobis_is_the_formula():
    train, labels = _id(200, seed=0)
    queries = _far(30, seed=1)
    score = scores.make("mahalanobis")
    values = scores.apply(score, scores.fit(score, train, labels, _head()), queries)
    x = train.features.astype(np.float64)
    means = np.array([x[labels == c].mean(axis=0) for c in range(CLASSES)])
    centred = x - means[labels]
    covariance = centred.T @ centred / len(x)
    each = cdist(queries.features, means, "mahalanobis", VI=np.linalg.inv(covariance)) ** 2
    np.testing.assert_allclose(values, each.min(axis=1), rtol=1e-4)


def test_mahalanobis_with_dead_units_and_absent_classes():
    train, labels = _id(200, seed=0)
    train.features[:, -1] = 0  # never active on ID: a singular covariance
    labels = np.where(labels == 0, 1, labels)  # class 0 has no input
    score = scores.make("mahalanobis")
    state = scores.fit(score, train, labels, _head())
    assert len(state["means"]) == CLASSES - 1
    first = jax.tree.map(lambda x: x[:1].copy(), train)
    quiet = scores.apply(score, state, first)[0]
    first.features[0, -1] = 1
    loud = scores.apply(score, state, first)[0]
    assert np.isfinite(loud) and loud > 1000 * quiet


def test_mahalanobis_needs_variation():
    outputs = Outputs(np.zeros((4, CLASSES)), np.ones((4, WIDTH)))
    with pytest.raises(UserError, match="do not vary"):
        scores.fit(scores.make("mahalanobis"), outputs, np.zeros(4, int), _head())
