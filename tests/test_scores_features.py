"""Scores from statistics of features, each against a float64 formula of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from oal_jax import scores
from oal_jax.errors import UserError
from oal_jax.runtime import distributed
from oal_jax.runtime.ops import unit
from oal_jax.scores import Head, Outputs
from oal_jax.scores.statistics import class_means, moments

C, D = 4, 10
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(D, C)).astype(np.float32)
BIAS = RNG.normal(size=C).astype(np.float32)
HEAD = Head(KERNEL, BIAS)
MEANS = 3 * RNG.normal(size=(C, D))
MESH = distributed.make_mesh()
SPREAD = RNG.normal(size=(D, D)) / 2  # correlated units of many scales


def _outputs(features, seed=0):
    features = features.astype(np.float32)
    rng = np.random.default_rng(seed)
    maps = [
        (features[:, None, None, :w] * rng.uniform(0.5, 1.5, (len(features), 4, 4, 1))).astype(
            np.float32
        )
        for w in (6, D)
    ]
    outputs = scores.summarise(features @ KERNEL + BIAS[None, :], features, maps, scores.FIELDS)
    return jax.tree.map(np.array, outputs)


def _id(n=150, seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, n)
    return _outputs(MEANS[labels] + rng.normal(size=(n, D)) @ SPREAD, seed), labels


def _queries(n=23):
    return _outputs(4 * np.random.default_rng(7).normal(size=(n, D)), seed=7)


def _values(name, train, labels, queries, head=HEAD, **params):
    score = scores.make(name, **params)
    return scores.apply(score, scores.fit(score, train, labels, head), queries)


def _mahalanobis(x, means, covariance):
    precision = np.linalg.inv(covariance)
    apart = x.astype(np.float64)[:, None, :] - means[None]
    return np.einsum("ncd,de,nce->nc", apart, precision, apart)


def _class_gaussians(x, labels):
    x = x.astype(np.float64)
    means = np.array([x[labels == c].mean(axis=0) for c in np.unique(labels)])
    centred = x - means[np.unique(labels, return_inverse=True)[1]]
    return means, centred.T @ centred / len(x)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("n", [3, 5000])  # one batch; a full batch and a part
def test_moments_are_those_of_float64(n, offset):
    train, labels = _id(n)
    x = train.features + np.float32(offset)
    statistics = moments(x, labels, MESH)
    means, within = _class_gaussians(x, labels)
    np.testing.assert_allclose(statistics.means, means, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics.within, within, atol=1e-5 * np.abs(within).max() + 1e-12)
    total = np.cov(x.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(statistics.total, total, atol=1e-5 * np.abs(total).max())
    np.testing.assert_allclose(
        statistics.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-5
    )


def test_moments_of_prepared_features():
    train, labels = _id()
    statistics = moments(train.features, labels, MESH, unit)
    ready = train.features / np.linalg.norm(train.features, axis=1, keepdims=True)
    means, within = _class_gaussians(ready, labels)
    np.testing.assert_allclose(statistics.means, means, atol=1e-6)
    np.testing.assert_allclose(statistics.within, within, atol=1e-6)


def test_class_means_of_absent_classes_are_zero():
    means, counts = class_means(np.ones((5, 2), np.float32), np.array([1, 1, 3, 3, 3]), 5, MESH)
    np.testing.assert_array_equal(counts, [0, 2, 0, 3, 0])
    np.testing.assert_allclose(means, [[0, 0], [1, 1], [0, 0], [1, 1], [0, 0]])


def test_relative_mahalanobis_is_the_formula():
    train, labels = _id()
    queries = _queries()
    x = train.features.astype(np.float64)
    near = _mahalanobis(queries.features, *_class_gaussians(x, labels)).min(axis=1)
    mean = x.mean(axis=0)[None]
    background = _mahalanobis(queries.features, mean, np.cov(x.T, bias=True))[:, 0]
    values = _values("relative_mahalanobis", train, labels, queries)
    np.testing.assert_allclose(values, near - background, rtol=1e-4)


@pytest.mark.parametrize("weights", [None, (0.5, -2.0)])
def test_mahalanobis_ensemble_is_the_formula(weights):
    train, labels = _id()
    queries = _queries()
    expected = sum(
        weight * _mahalanobis(x, *_class_gaussians(y, labels)).min(axis=1)
        for weight, x, y in zip(weights or (1, 1), queries.layers, train.layers, strict=True)
    )
    values = _values("mahalanobis_ensemble", train, labels, queries, weights=weights)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("by_class", [False, True])
def test_mood_is_the_formula_and_blind_to_length(by_class):
    train, labels = _id()
    queries = _queries()
    a, b = (
        x.features / np.linalg.norm(x.features.astype(np.float64), axis=1, keepdims=True)
        for x in (queries, train)
    )
    gaussians = _class_gaussians(b, labels if by_class else np.zeros_like(labels))
    values = _values("mood", train, labels, queries, by_class=by_class)
    np.testing.assert_allclose(values, _mahalanobis(a, *gaussians).min(axis=1), rtol=1e-3)
    longer = queries._replace(features=100 * queries.features)
    again = _values("mood", train, labels, longer, by_class=by_class)
    np.testing.assert_allclose(again, values, rtol=1e-4)


def test_mahalanobis_is_blind_to_linear_maps():
    train, labels = _id()
    queries = _queries()
    turn = np.random.default_rng(3).normal(size=(D, D)).astype(np.float32)
    moved = [x._replace(features=x.features @ turn + 5) for x in (train, queries)]
    for name in ("mahalanobis", "relative_mahalanobis"):
        values = _values(name, train, labels, queries, floor=1e-9)
        np.testing.assert_allclose(
            _values(name, moved[0], labels, moved[1], floor=1e-9), values, rtol=1e-2
        )


@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis_ensemble"])
def test_noise_lowers_distances_row_by_row(name):
    mix = np.random.default_rng(5).normal(size=(2 * 2 * 3, D)).astype(np.float32)

    def forward(images):
        flat = images.reshape(images.shape[0], -1)
        features = jnp.tanh(flat @ mix)
        maps = [images, jnp.stack([features, features**2], axis=1)[:, None]]
        return scores.summarise(features @ KERNEL, features, maps, ("features", "layers"))

    images = np.random.default_rng(6).normal(size=(80, 2, 2, 3)).astype(np.float32)
    labels = np.arange(80) % C
    score = scores.make(name, noise=1e-3)
    state = scores.fit(score, scores.compute(forward, images), labels, HEAD)
    plain = scores.apply(score, state, scores.compute(forward, images))
    moved = scores.apply_to_images(score, state, forward, images, batch_size=32)
    assert (moved < plain).all()
    alone = scores.apply_to_images(score, state, forward, images[7:8])
    np.testing.assert_allclose(alone, moved[7:8], rtol=1e-4)
    assert scores.make(name).perturb is None


def _residual(train, queries, dim):
    """Lengths outside the principal subspace, from a singular value decomposition."""
    origin = -np.linalg.lstsq(KERNEL.T.astype(np.float64), BIAS.astype(np.float64))[0]
    np.testing.assert_allclose(origin @ KERNEL + BIAS, 0, atol=1e-5)
    _, _, directions = np.linalg.svd(train.features - origin[None, :], full_matrices=True)
    outside = directions[dim:]
    return [np.linalg.norm((x.features - origin) @ outside.T, axis=1) for x in (train, queries)]


@pytest.mark.parametrize("dim", [None, 0, 3])
def test_vim_and_residual_are_the_formula(dim):
    train, labels = _id()
    queries = _queries()
    of_train, of_queries = _residual(train, queries, D // 2 if dim is None else dim)
    np.testing.assert_allclose(
        _values("residual", train, labels, queries, dim=dim), of_queries, rtol=1e-4, atol=1e-5
    )
    alpha = train.logits.max(axis=1).mean() / of_train.mean()
    expected = alpha * of_queries - logsumexp(queries.logits, axis=1)
    values = _values("vim", train, labels, queries, dim=dim)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)


def test_vim_takes_no_notice_of_a_class_sum_of_rounding_size():
    train, labels = _id()
    centred = KERNEL - KERNEL.mean(axis=1, keepdims=True)
    singular = [centred + eps * KERNEL[:, :1] for eps in (0.0, 1e-8)]
    for kernel in singular:
        state = scores.fit(scores.make("vim"), train, labels, Head(np.float32(kernel), BIAS))
        exact = np.linalg.lstsq(centred.T.astype(np.float64), BIAS, rcond=1e-5)[0]
        np.testing.assert_allclose(state["origin"], -exact, rtol=1e-4, atol=1e-4)


def test_vim_where_nothing_is_left_outside():
    train, labels = _id()
    queries = _queries()
    for name in ("vim", "residual"):
        with pytest.raises(UserError, match=f"{name}: dim=10 leaves nothing .* at most 9"):
            _values(name, train, labels, queries, dim=D)
    # Three inputs span three dimensions at most: alpha is large and finite.
    few = jax.tree.map(lambda x: x[:3], train)
    assert np.isfinite(_values("vim", few, labels[:3], queries)).all()
    # Negative logits leave the residual's sign alone.
    down = train._replace(logits=train.logits - 100)
    assert scores.fit(scores.make("vim"), down, labels, HEAD)["alpha"] > 0


@pytest.mark.parametrize("max_logit", [False, True])
@pytest.mark.parametrize("params", [{"dim": 3}, {"variance": 0.8}, {}])
def test_neco_is_the_formula(params, max_logit):
    train, labels = _id()
    queries = _queries()
    x = train.features.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    _, sizes, directions = np.linalg.svd((x - mean) / deviation, full_matrices=False)
    share = np.cumsum(sizes**2) / np.sum(sizes**2)
    dim = params.get("dim") or 1 + np.sum(share < params.get("variance", 0.9))
    f = (queries.features - mean) / deviation
    ratio = np.linalg.norm(f @ directions[:dim].T, axis=1) / np.linalg.norm(f, axis=1)
    expected = -ratio * (queries.logits.max(axis=1) if max_logit else 1)
    values = _values("neco", train, labels, queries, max_logit=max_logit, **params)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_she_is_the_formula_with_patterns_for_absent_classes():
    train, labels = _id()
    queries = _queries(60)
    predicted = train.logits.argmax(axis=1)
    missing = np.bincount(predicted[predicted == labels], minlength=C).argmax()
    labels = np.where(labels == missing, (missing + 1) % C, labels)
    right = predicted == labels
    x = train.features.astype(np.float64)
    patterns = np.stack(
        [x[right & (labels == c)].mean(axis=0) if (right & (labels == c)).any() else x.mean(axis=0)
         for c in range(C)]
    )  # fmt: skip
    tops = queries.logits.argmax(axis=1)
    assert missing in tops
    expected = -np.sum(queries.features * patterns[tops], axis=1)
    np.testing.assert_allclose(
        _values("she", train, labels, queries), expected, rtol=1e-4, atol=1e-4
    )


def test_fdbd_is_the_formula():
    train, labels = _id()
    queries = _queries()
    kernel = KERNEL.copy()
    kernel[:, 2] = kernel[:, 1]  # no boundary between the two
    mean = train.features.mean(axis=0, dtype=np.float64)
    expected = []
    for z, f in zip(queries.logits, queries.features, strict=True):
        top = z.argmax()
        norms = [np.linalg.norm(kernel[:, top] - kernel[:, c]) for c in range(C)]
        distances = [(z[top] - z[c]) / norms[c] for c in range(C) if norms[c] > 0]
        expected.append(-np.sum(distances) / (C - 1) / np.linalg.norm(f - mean))
    values = _values("fdbd", train, labels, queries, head=Head(kernel, BIAS))
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    with pytest.raises(UserError, match="two classes"):
        one = Outputs(train.logits[:, :1], train.features)
        _values("fdbd", one, 0 * labels, one, head=Head(KERNEL[:, :1], BIAS[:1]))


def _unit(x):
    return x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)


@pytest.mark.parametrize("bank_chunk", [1000, 40])
def test_nnguide_is_the_formula(bank_chunk):
    train, labels = _id()
    queries = _queries()
    bank = _unit(train.features) * logsumexp(train.logits, axis=1)[:, None]
    guidance = -np.sort(-_unit(queries.features) @ bank.T, axis=1)[:, :6].mean(axis=1)
    expected = -guidance * logsumexp(queries.logits, axis=1)
    values = _values("nnguide", train, labels, queries, k=6, bank_chunk=bank_chunk)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


def test_mode_is_the_formula_and_blind_to_length():
    train, labels = _id()
    queries = _queries()
    bank = _unit(train.regions).reshape(-1, D)
    each = 2 - 2 * _unit(queries.regions) @ bank.T
    expected = np.sort(each, axis=2)[:, :, 4].min(axis=1)
    values = _values("mode", train, labels, queries, k=5, bank_chunk=200)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    longer = queries._replace(regions=100 * queries.regions)
    np.testing.assert_allclose(_values("mode", train, labels, longer, k=5), values, atol=1e-5)


def _gram(train, queries):
    """Plain loops over inputs, layers, powers and channels."""
    top, tops = train.logits.argmax(axis=1), queries.logits.argmax(axis=1)
    rank = np.array([np.sum(top[:i] == c) for i, c in enumerate(top)])
    held_out = rank % 10 == 9
    result = np.zeros(len(tops))
    for x, y in zip(train.grams, queries.grams, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)

        def deviation(v, c, x=x):
            seen = x[(top == c) & ~held_out] if c in top else x[~held_out]
            low, high = seen.min(axis=0), seen.max(axis=0)
            below = np.where(v < low, (low - v) / np.abs(low), 0)
            above = np.where(v > high, (v - high) / np.abs(high), 0)
            return np.sum(below + above)

        expected = np.mean(
            [deviation(v, c) for v, c in zip(x[held_out], top[held_out], strict=True)]
        )
        result += np.array([deviation(v, c) for v, c in zip(y, tops, strict=True)]) / expected
    return result


def _shift(outputs):
    """No statistic near 0, where the quotient of float32 would be noise."""
    return outputs._replace(grams=tuple(np.abs(x) + 0.1 for x in outputs.grams))


def test_gram_is_the_formula_also_for_absent_classes():
    train, labels = _id(4200)  # a full batch and a part
    queries = _queries(60)
    train, queries = _shift(train), _shift(queries)
    np.testing.assert_allclose(
        _values("gram", train, labels, queries), _gram(train, queries), rtol=1e-4, atol=1e-5
    )
    missing = queries.logits.argmax(axis=1)[0]
    rest = np.flatnonzero(train.logits.argmax(axis=1) != missing)[:150]
    train, labels = jax.tree.map(lambda x: x[rest], train), labels[rest]
    np.testing.assert_allclose(
        _values("gram", train, labels, queries), _gram(train, queries), rtol=1e-4, atol=1e-5
    )


def test_gram_does_not_read_units_and_survives_dead_channels():
    train, labels = _id()
    queries = _queries()
    train, queries = _shift(train), _shift(queries)
    values = _values("gram", train, labels, queries)
    larger = [x._replace(grams=tuple(512 * g for g in x.grams)) for x in (train, queries)]
    np.testing.assert_allclose(_values("gram", larger[0], labels, larger[1]), values, rtol=1e-4)
    for grams in train.grams:
        grams[:, :, 0] = 0
    loud = _values("gram", train, labels, queries)
    assert np.isfinite(loud).all() and (loud > 100 * np.maximum(values, 1)).all()


def test_gram_with_too_few_inputs_to_hold_out():
    train, labels = _id(12)
    top = train.logits.argmax(axis=1)
    assert np.bincount(top).max() < 10
    state = scores.fit(scores.make("gram"), train, labels, HEAD)
    assert state["layer0_expected"] == state["layer1_expected"] == 1


@pytest.mark.parametrize("name", ["mahalanobis", "relative_mahalanobis", "mood", "vim", "neco"])
def test_fewer_inputs_than_dimensions(name):
    train, labels = _id(6)
    values = _values(name, train, labels, _queries())
    assert np.isfinite(values).all()


FEATURE_SCORES = sorted(
    {
        *("knn", "mahalanobis", "relative_mahalanobis", "mahalanobis_ensemble", "vim", "residual"),
        *("she", "gram", "nnguide", "fdbd", "neco", "mode", "mood"),
    }
)


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_zero_features_and_absent_classes(name):
    params = {"k": 3} if name in ("knn", "nnguide", "mode") else {}
    train, labels = _id()
    labels = np.where(labels == 1, 2, labels)
    blank = jax.tree.map(np.zeros_like, _queries(3))
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), train, blank)
    values = _values(name, joined, np.append(labels, [0, 0, 0]), blank, **params)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", ["mahalanobis", "mood", "vim", "she"])
def test_a_fit_in_two_batches_is_that_in_one(name):
    train, labels = _id(2100)
    queries = _queries()
    # Every input twice has the same means; 4,200 rows are a batch and a part of the next.
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), train)
    values = _values(name, twice, np.concatenate([labels, labels]), queries)
    expected = _values(name, train, labels, queries)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("mode", {"k": 0}, "mode: k must be 1 or more"),
        ("nnguide", {"bank_chunk": 0}, "nnguide: bank_chunk must be 1 or more"),
        ("vim", {"dim": -1}, "vim: dim must be 0 or more"),
        ("residual", {"dim": -1}, "residual: dim must be 0 or more"),
        ("neco", {"dim": 0}, "neco: dim must be 1 or more"),
        ("neco", {"variance": 0.0}, "above 0 and at most 1"),
        ("mood", {"floor": 2.0}, "mood: floor"),
        ("relative_mahalanobis", {"floor": 0.0}, "relative_mahalanobis: floor"),
        ("mahalanobis_ensemble", {"noise": -1.0}, "noise must be 0 or more"),
    ],
)
def test_parameters_out_of_range(name, params, message):
    with pytest.raises(UserError, match=message):
        scores.make(name, **params)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("mode", {"k": 1000}, "mode: k=1000 needs at least 1000 training regions, got 900"),
        ("nnguide", {"k": 151}, "nnguide: k=151 needs at least 151 training features, got 150"),
        ("neco", {"dim": 11}, "above the features' width 10"),
        ("mahalanobis_ensemble", {"weights": (1.0,)}, "1 weights for 2 layers"),
    ],
)
def test_parameters_that_do_not_fit_the_data(name, params, message):
    train, labels = _id()
    with pytest.raises(UserError, match=message):
        _values(name, train, labels, train, **params)


@pytest.mark.parametrize(
    "name", ["mahalanobis", "relative_mahalanobis", "mahalanobis_ensemble", "mood", "neco"]
)
def test_inputs_that_do_not_vary(name):
    row = jax.tree.map(lambda x: np.repeat(x[:1], 20, axis=0), _id()[0])
    with pytest.raises(UserError, match=f"{name}: .*not vary"):
        _values(name, row, np.arange(20) % 2, row)


def test_grids_name_parameters_and_their_values_are_legal():
    for name in FEATURE_SCORES:
        for param, values in scores.GRIDS.get(name, {}).items():
            assert all(scores.make(name, **{param: value}).name == name for value in values)
