"""k-NN boundary sampling against NumPy transcriptions of the intended and the shipped algorithm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oal_jax.config import Config, Knn
from oal_jax.outliers import knn
from oal_jax.outliers import pools as pools_module
from oal_jax.runtime import artifacts, distributed, ops
from oal_jax.runtime.keys import at_step
from oal_jax.stages import outliers
from oal_jax.stages.context import Context

SIZES = {"k": 45, "count": 12, "anchors": 10, "sigma": 0.3, "noise_rows": 150, "keep": 2}
WIDTH, POINTS = 16, 80


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=WIDTH) + 0.7 * rng.normal(size=(POINTS, WIDTH))
    return unit(cloud).astype(np.float32)


def full_sort_distance(queries, bank, k):
    """Squared distance to the k-th nearest row, from all distances, sorted whole, in float64."""
    queries, bank = queries.astype(np.float64), bank.astype(np.float64)
    return np.sort(((queries[:, None] - bank[None]) ** 2).sum(-1), axis=1)[:, k - 1]


def draws(key, features, repeats):
    """The anchors and the noise of every repeat, as `sample_class` draws them."""
    edge = np.argsort(-full_sort_distance(features, features, SIZES["k"]), kind="stable")
    edge = features[edge[: SIZES["count"]]]
    for repeat in jax.random.split(key, repeats):
        of_anchor, of_noise = jax.random.split(repeat)
        order = jax.random.choice(of_anchor, len(edge), (SIZES["anchors"],), replace=False)
        noise = jax.random.normal(of_noise, (SIZES["noise_rows"], features.shape[1]))
        yield edge[np.asarray(order)], SIZES["sigma"] * np.asarray(noise)


def intended(anchors, noise, features):
    """For each anchor its own furthest candidates, best first."""
    kept = []
    for anchor in anchors:
        candidates = unit(anchor + noise)
        distance = full_sort_distance(candidates, features, SIZES["k"])
        kept.extend(candidates[np.argsort(-distance)[: SIZES["keep"]]])
    return np.array(kept)


def shipped(anchors, noise, features):
    """The official code: block after block of candidates, and a view with the wrong axis first."""
    blocks, rows = len(anchors), len(noise)
    candidates = unit(np.repeat(anchors, rows, axis=0) + np.tile(noise, (blocks, 1)))
    distance = full_sort_distance(candidates, features, SIZES["k"])
    viewed = distance.reshape(rows, blocks)
    best = np.argsort(-viewed, axis=0)[: SIZES["keep"]]
    return np.array([candidates[i * rows + r] for i in range(blocks) for r in best[:, i]])


def percentile(outliers, anchors, noise, features, k, keep):
    """Mean rank, in [0, 1], of what was kept among all candidates of the same anchor."""
    ranks = []
    for i, anchor in enumerate(anchors):
        every = full_sort_distance(unit(anchor + noise), features, k)
        kept = full_sort_distance(outliers[i * keep : (i + 1) * keep], features, k)
        ranks.extend((every[None] < kept[:, None] - 1e-6).mean(1))
    return np.mean(ranks)


kth = jax.jit(ops.kth_largest, static_argnums=1)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (9, 4), elements=st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0])),
    st.sampled_from([1, 5, 9]),
)
def test_kth_largest_is_the_entry_of_the_sorted_column(values, k):
    np.testing.assert_array_equal(kth(values, k), np.sort(values, axis=0)[-k])


def test_kth_largest_over_the_whole_range_of_floats():
    largest = np.finfo(np.float32).max
    values = np.array([[-np.inf, -largest, -1e-30, 0, 1e-30, 1, largest, np.inf]], np.float32).T
    for k in range(1, 9):
        assert kth(values, k) == values[-k]


@pytest.mark.parametrize("k", [1, 7, 40, 79, 80])
def test_kth_distance_equals_a_full_sort(features, k):
    queries = unit(np.random.default_rng(1).normal(size=(30, WIDTH))).astype(np.float32)
    np.testing.assert_allclose(
        knn.kth_distance(queries, features, k),
        full_sort_distance(queries, features, k),
        atol=2e-6,
    )


def test_a_bank_row_is_its_own_nearest(features):
    np.testing.assert_allclose(knn.kth_distance(features, features, 1), 0, atol=1e-6)
    assert (knn.kth_distance(features, features, 2) > 1e-3).all()


def test_boundary_is_the_points_with_the_furthest_kth_neighbour(features):
    expected = np.argsort(-full_sort_distance(features, features, 45))[:12]
    np.testing.assert_array_equal(knn.boundary(features, 45, 12), expected)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_candidate_distances_equal_those_of_the_candidates_themselves(features, rows):
    anchors = features[:3]
    noise = 0.3 * np.random.default_rng(2).normal(size=(rows, WIDTH)).astype(np.float32)
    expected = [full_sort_distance(unit(a + noise), features, 45) for a in anchors]
    actual = knn.candidate_distances(anchors, noise, features, 45)
    np.testing.assert_allclose(actual, expected, atol=5e-6)


@pytest.mark.parametrize(("selection", "algorithm"), [("top", intended), ("reference", shipped)])
def test_outliers_equal_the_transcription(features, selection, algorithm):
    key = jax.random.key(5)
    actual = knn.sample_class(key, features, **SIZES, repeats=2, selection=selection)
    expected = np.concatenate([algorithm(*d, features) for d in draws(key, features, 2)])
    assert actual.shape == (2 * 10 * 2, WIDTH)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("selection", sorted(knn.SELECTIONS))
def test_a_key_gives_the_same_unit_outliers_again_and_another_key_others(features, selection):
    sample = lambda seed: np.asarray(
        knn.sample_class(jax.random.key(seed), features, **SIZES, repeats=2, selection=selection)
    )
    first = sample(0)
    np.testing.assert_array_equal(first, sample(0))
    assert np.abs(first - sample(1)).max() > 0.1
    # Repeats draw their own noise.
    assert np.abs(first[:20] - first[20:]).min(axis=1).max() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)


def test_top_keeps_the_furthest_of_each_anchor_and_reference_keeps_arbitrary_ones(features):
    key = jax.random.key(7)
    ranks = {}
    for selection in knn.SELECTIONS:
        outliers = np.asarray(
            knn.sample_class(key, features, **SIZES, repeats=4, selection=selection)
        ).reshape(4, -1, WIDTH)
        ranks[selection] = np.mean(
            [
                percentile(o, *d, features, SIZES["k"], SIZES["keep"])
                for o, d in zip(outliers, draws(key, features, 4), strict=True)
            ]
        )
    # The first and second of 150 are at 149 / 150 and 148 / 150.
    np.testing.assert_allclose(ranks["top"], (149 + 148) / 300, atol=1e-3)
    assert 0.4 < ranks["reference"] < 0.6


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("selection", sorted(knn.SELECTIONS))
def test_memory_does_not_hold_all_candidates(selection):
    n, width, rows, anchors = 500, 128, 1500, 50
    sizes = {"k": 300, "count": 50, "anchors": anchors, "sigma": 0.17, "noise_rows": rows}
    closed = jax.make_jaxpr(
        lambda key, x: knn.sample_class(key, x, **sizes, keep=2, repeats=5, selection=selection)
    )(jax.random.key(0), jnp.zeros((n, width)))
    every = list(equations(closed.jaxpr))
    largest = max(v.aval.size for e in every for v in e.outvars)
    assert n * rows <= largest <= n * (rows + 128)
    # No candidate's distances are sorted: one top-k finds the boundary, one selects.
    ordered = [e for e in every if e.primitive.name in ("top_k", "sort")]
    assert max(v.aval.size for e in ordered for v in e.invars) == anchors * rows


def test_random_outliers_are_unit_and_point_nowhere():
    outliers = np.asarray(knn.sample_random(jax.random.key(0), 4000, 8))
    np.testing.assert_allclose(np.linalg.norm(outliers, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(outliers.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(outliers.T @ outliers / 4000, np.eye(8) / 8, atol=0.02)


def test_many_queries_are_taken_in_blocks(features, monkeypatch):
    expected = knn.kth_distance(features, features, 45)
    monkeypatch.setattr(knn, "_PRODUCTS", 7 * POINTS)  # 80 queries: eleven blocks of 7, and 3
    closed = jax.make_jaxpr(lambda x: knn.kth_distance(x, x, 45))(features)
    largest = max(v.aval.size for e in equations(closed.jaxpr) for v in e.outvars)
    assert largest < POINTS * POINTS
    np.testing.assert_allclose(knn.kth_distance(features, features, 45), expected, atol=1e-6)


def redrawn_noise(key, repeat, width):
    """All noise of a repeat of `select_class`, a key a row, row by row."""
    key = jax.random.fold_in(jax.random.split(key)[1], repeat)
    rows = [jax.random.normal(jax.random.fold_in(key, i), (width,)) for i in range(150)]
    return np.asarray(jax.lax.reduce_precision(jnp.stack(rows), 8, 22))


def test_lazy_outliers_equal_an_eager_recomputation(features):
    key, sigma = jax.random.key(5), np.float32(SIZES["sigma"])
    points, around, rows, factor = (
        np.asarray(part)
        for part in knn.select_class(key, features, **SIZES, repeats=2, selection="top")
    )
    edge = np.argsort(-full_sort_distance(features, features, SIZES["k"]), kind="stable")
    edge = features[edge[: SIZES["count"]]]
    np.testing.assert_allclose(points, edge / sigma, rtol=1e-6)
    assert around.dtype == rows.dtype == np.int32
    around, rows = around.reshape(2, 10, 2), rows.reshape(2, 10, 2)
    eager = []
    for repeat in range(2):
        of_anchor = around[repeat, :, 0]
        np.testing.assert_array_equal(of_anchor, around[repeat, :, 1])
        assert len(np.unique(of_anchor)) == 10  # without replacement
        noise = redrawn_noise(key, repeat, WIDTH)
        sums = (points[of_anchor][:, None] + noise[rows[repeat]]).reshape(20, WIDTH)
        np.testing.assert_allclose(
            unit(sums), intended(edge[of_anchor], sigma * noise, features), atol=1e-5
        )
        eager.append(sums)
    assert (around[0] != around[1]).any()
    eager = np.concatenate(eager) * factor[:, None]  # NumPy's, in float32
    np.testing.assert_allclose(np.linalg.norm(eager, axis=1), 1, atol=1e-6)
    redraw = jax.jit(jax.vmap(knn.redraw, (None, 0, 0, 0, 0)))
    for some in (np.arange(40), np.array([39, 3, 17])):  # in any company, to the bit
        lazy = redraw(
            key, points[around.ravel()[some]], some // 20, rows.ravel()[some], factor[some]
        )
        np.testing.assert_array_equal(lazy, eager[some])


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """The stage's pool, lazily and whole, from the same features of three classes."""
    found = {}
    for lazy in (True, False):
        config = Config(seed=3)
        config.outliers.lazy = lazy
        config.outliers.knn = Knn(
            features_per_class=30,
            neighbour=9,
            boundary=6,
            anchors=5,
            noise_rows=20,
            repeats=4,
            scale_by_token=False,
        )
        mesh = distributed.make_mesh()
        directory = tmp_path_factory.mktemp("pool")
        context = Context(config, directory, mesh, jax.random.key(config.seed))
        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(3, dtype=np.int32), 35)
        values = rng.normal(size=(105, 12)).astype(np.float32) + 3 * np.eye(12)[labels].astype("f4")
        artifacts.write_tensors(
            directory / "features" / "features.safetensors", {"features": values, "labels": labels}
        )
        found[lazy] = context, outliers.run(context)
    return found


def test_the_stage_s_lazy_pool_is_a_pool(pools):
    context, written = pools[True]
    pool = outliers.flat(context)
    whole = outliers.flat(pools[False][0])
    assert pool.shape == whole.shape == (3 * 40, 12) == np.shape(pool)
    every = np.asarray(outliers.take(pool, np.arange(120)))
    np.testing.assert_allclose(np.linalg.norm(every, axis=1), 1, atol=1e-6)
    # In a step, on the devices, in any order and company.
    rows = np.array([119, 0, 40, 79])
    inside = jax.jit(outliers.take)(distributed.replicate(pool, context.mesh), rows)
    np.testing.assert_array_equal(inside, every[rows])
    # As far from their class as those that are written whole, and each class's own.
    bank = 0.07 * np.asarray(pool.points)
    for c in range(3):
        ours, theirs = every[40 * c : 40 * c + 40], whole[40 * c : 40 * c + 40]
        assert abs((ours @ bank[c].T).mean() - (theirs @ bank[c].T).mean()) < 0.05
    assert len(np.unique(every.round(5), axis=0)) > 110
    labels, numbers = np.array([0, 2]), np.array([7, 1])
    drawn = outliers.of_classes(context, labels, numbers)
    np.testing.assert_array_equal(drawn, every[[7, 81]])
    assert outliers.spread(context, 10).shape == (10, 12)
    # What is written are the boundary points, and three numbers an outlier.
    assert written[0].stat().st_size < 3 * 6 * 12 * 4 + 3 * 40 * 12 + 1200


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 65, 4097, 2**20 + 1, 2**31 - 1])
def test_distinct_rows_are_distinct(size, seed=0):
    count = min(size, 64)
    rows = np.asarray(pools_module.distinct_rows(jax.random.key(seed), size, count))
    assert rows.min() >= 0 and rows.max() < size and len(set(rows.tolist())) == count


def test_distinct_rows_are_uniform_and_their_cost_does_not_grow():
    draw = jax.jit(pools_module.distinct_rows, static_argnums=(1, 2))
    size, count, trials = 1_000_003, 128, 300
    drawn = np.stack([draw(jax.random.key(i), size, count) for i in range(trials)])
    assert max(len(set(row)) for row in drawn) == count
    # 38,400 draws in 64 cells: chi-square has 63 degrees of freedom, mean 63, deviation 11.
    for column in (drawn, drawn[:, :1], drawn[:, -1:]):
        counts = np.bincount((column * 64 // size).ravel(), minlength=64)
        expected = column.size / 64
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * 11.3
    # Neighbours in a draw are not neighbours in the pool.
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.02
    closed = jax.make_jaxpr(lambda key: pools_module.distinct_rows(key, 10**9, count))
    sizes = [v.aval.size for e in equations(closed(jax.random.key(0)).jaxpr) for v in e.outvars]
    assert max(sizes) <= count


def test_small_pools_are_drawn_as_before():
    key = jax.random.key(4)
    np.testing.assert_array_equal(
        pools_module.draw_rows(key, 12_000, 128),
        jax.random.choice(key, 12_000, (128,), replace=False),
    )
    np.testing.assert_array_equal(
        pools_module.draw_rows(key, 5, 9), jax.random.choice(key, 5, (9,), replace=True)
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_devices_share_out_the_classes(pools, devices):
    """On one, two and (in the fixture) four of them: the classes one by one, three in all."""
    context, _ = pools[False]
    whole = outliers.flat(context).reshape(3, 40, 12)
    source = artifacts.read_tensors(context.directory("features") / "features.safetensors")
    for c in range(3):
        of_class = unit(source["features"][source["labels"] == c][:30])
        key = at_step(context.key, "outliers", c)
        alone = knn.sample_class(key, of_class, **outliers.sampling(context.config.outliers.knn))
        np.testing.assert_allclose(whole[c], alone, atol=1e-6)
    mesh = distributed.make_mesh(devices=jax.devices()[:devices])
    outliers.run(dataclasses.replace(context, mesh=mesh))
    again = outliers.flat(context).reshape(3, 40, 12)
    np.testing.assert_allclose(again, whole, atol=1e-6)
