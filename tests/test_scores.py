"""Every registered score against the promises of the registry, and each one against NumPy."""

import jax
import jax.export
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


def _fitted(name):
    score = scores.make(name, **SMALL.get(name, {}))
    return score, scores.fit(score, *_id(90, seed=0), _head())


@pytest.fixture(params=sorted(scores.SCORES))
def fitted(request):
    return _fitted(request.param)


def test_shape_dtype_and_finite(fitted):
    score, state = fitted
    values = scores.apply(score, state, _id(40, seed=1)[0])
    assert values.shape == (40,) and values.dtype == np.float32
    assert np.isfinite(values).all()
    none = jax.tree.map(lambda x: x[:0], _id(1, seed=1)[0])
    assert scores.apply(score, state, none).shape == (0,)


def test_far_inputs_score_higher(fitted):
    score, state = fitted
    values = [scores.apply(score, state, x) for x in (_id(60, seed=1)[0], _far(60, seed=2))]
    assert auroc(*values) > LEAST_AUROC.get(score.name, 0.95)


def _assert_close(values, expected):
    # Some scores are a difference of terms as large as the largest score.
    atol = 1e-6 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=atol)


def test_jit_changes_nothing(fitted):
    score, state = fitted
    outputs = _id(33, seed=1)[0]
    with jax.disable_jit():
        eager = score.score(state, outputs)
    _assert_close(jax.jit(score.score)(state, outputs), eager)


@pytest.mark.parametrize("batch_size", [1, 7, 33, 64])
def test_batch_size_and_padding_change_nothing(fitted, batch_size):
    score, state = fitted
    outputs = _id(33, seed=1)[0]
    whole = np.asarray(score.score(state, outputs))
    values = scores.apply(score, state, outputs, batch_size=batch_size)
    _assert_close(values, whole)


def test_rows_are_independent(fitted):
    score, state = fitted
    outputs = _id(30, seed=1)[0]
    order = np.random.default_rng(0).permutation(30)
    values = scores.apply(score, state, outputs)
    shuffled = scores.apply(score, state, jax.tree.map(lambda x: x[order], outputs))
    _assert_close(shuffled, values[order])


def test_state_is_arrays_and_fit_is_deterministic(fitted):
    score, state = fitted
    assert isinstance(state, dict)
    assert all(isinstance(x, jax.Array) for x in state.values())
    again = scores.fit(score, *_id(90, seed=0), _head())
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_state_survives_a_safetensors_file(fitted, tmp_path):
    score, state = fitted
    path = tmp_path / "state.safetensors"
    # The format has no arrays without memory order, so views are copied.
    save_file({key: np.array(value, order="C") for key, value in state.items()}, path)
    again = load_file(path)
    assert set(again) == set(state)
    outputs = _id(20, seed=1)[0]
    np.testing.assert_array_equal(
        scores.apply(score, again, outputs), scores.apply(score, state, outputs)
    )


def test_export_with_any_batch_size(fitted):
    score, state = fitted
    outputs = scores.outputs.check(_id(9, seed=1)[0], score.needs, "{}")
    (batch,) = jax.export.symbolic_shape("batch")
    symbolic = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), outputs)
    leaves, tree = jax.tree.flatten(outputs)
    function = jax.jit(lambda *leaves: score.score(state, jax.tree.unflatten(tree, leaves)))
    exported = jax.export.export(function, platforms=["cpu"])(*jax.tree.leaves(symbolic))
    exported = jax.export.deserialize(exported.serialize())
    for n in (1, 9):
        values = exported.call(*(x[:n] for x in leaves))
        expected = scores.apply(score, state, jax.tree.map(lambda x, n=n: x[:n], outputs))
        _assert_close(values, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_name_score_and_set(fitted, bad):
    score, state = fitted
    outputs = _id(20, seed=1)[0]
    outputs.logits[3, 1] = bad
    with pytest.raises(UserError, match=f"{score.name}: the logits of letters .* 1 of 20 .* row 3"):
        scores.apply(score, state, outputs, set_name="letters")
    with pytest.raises(UserError, match=f"{score.name}: the logits of ID train"):
        scores.fit(score, outputs, np.zeros(20, int), _head())
    outputs = _id(20, seed=1)[0]
    outputs.features[5] = bad
    if "features" in score.needs:
        with pytest.raises(UserError, match=f"{score.name}: the features of letters"):
            scores.apply(score, state, outputs, set_name="letters")
    else:
        assert np.isfinite(scores.apply(score, state, outputs)).all()


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
    ],
)
def test_mistakes_in_names_and_parameters(name, params, message):
    with pytest.raises(UserError, match=message):
        scores.make(name, **params)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
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


@pytest.mark.parametrize("k", [1, 7, 90])
@pytest.mark.parametrize("bank_chunk", [1000, 90, 32, 7, 1])
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


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("bank_chunk", [5000, 1000, 333])
def test_top_similarities_are_exact_also_with_ties(k, bank_chunk):
    rng = np.random.default_rng(0)
    # Small integers: products are exact, and most of them occur many times.
    queries, bank = (rng.integers(-3, 4, (n, 4)).astype(np.float32) for n in (20, 3001))
    scale = rng.choice(np.float32([0.5, 1, 2]), 3001)
    found = jax.jit(lambda *x: top_similarities(*x, k, bank_chunk))(queries, bank, scale)
    np.testing.assert_array_equal(
        found, -np.sort(-queries @ (scale[:, None] * bank).T, axis=1)[:, :k]
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
        scores.fit(scores.make("knn"), outputs, labels, _head())


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
