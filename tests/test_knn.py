"""k-NN boundary sampling against NumPy transcriptions of the intended and the shipped algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refusal, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oal_jax.config import Config, Knn
from oal_jax.outliers import knn, rows
from oal_jax.runtime import artifacts, distributed, ops
from oal_jax.runtime.keys import at_step
from oal_jax.stages import generator, outliers
from oal_jax.stages.context import Context

SIZES = {"k": 45, "count": 12, "anchors": 10, "sigma": 0.3, "noise_rows": 150, "per_anchor": 2}
WIDTH, POINTS = 16, 80


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
    furthest = []
    for anchor in anchors:
        candidates = unit(anchor + noise)
        distance = full_sort_distance(candidates, features, SIZES["k"])
        furthest.extend(candidates[np.argsort(-distance)[: SIZES["per_anchor"]]])
    return np.array(furthest)


def shipped(anchors, noise, features):
    """The official code: block after block of candidates, and a view with the wrong axis first."""
    blocks, rows = len(anchors), len(noise)
    candidates = unit(np.repeat(anchors, rows, axis=0) + np.tile(noise, (blocks, 1)))
    distance = full_sort_distance(candidates, features, SIZES["k"])
    viewed = distance.reshape(rows, blocks)
    best = np.argsort(-viewed, axis=0)[: SIZES["per_anchor"]]
    return np.array([candidates[i * rows + r] for i in range(blocks) for r in best[:, i]])


def percentile(outliers, anchors, noise, features, k, per_anchor):
    """Mean rank, in [0, 1], of the outliers among all candidates of the same anchor."""
    ranks = []
    for i, anchor in enumerate(anchors):
        every = full_sort_distance(unit(anchor + noise), features, k)
        own = full_sort_distance(outliers[i * per_anchor : (i + 1) * per_anchor], features, k)
        ranks.extend((every[None] < own[:, None] - 1e-6).mean(1))
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


@pytest.mark.parametrize("k", [1, 40, 80])
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


@pytest.mark.parametrize("rows", [1, 128, 129])
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
                percentile(o, *d, features, SIZES["k"], SIZES["per_anchor"])
                for o, d in zip(outliers, draws(key, features, 4), strict=True)
            ]
        )
    # The first and second of 150 are at 149 / 150 and 148 / 150.
    np.testing.assert_allclose(ranks["top"], (149 + 148) / 300, atol=1e-3)
    assert 0.4 < ranks["reference"] < 0.6


def test_memory_does_not_grow_with_the_number_of_candidates():
    n, width, rows, anchors = 500, 128, 1500, 50
    sizes = {"k": 300, "count": 50, "anchors": anchors, "sigma": 0.17, "noise_rows": rows}
    lowered = knn.sample_class.lower(
        jax.random.key(0),
        jax.ShapeDtypeStruct((n, width), jnp.float32),
        **sizes,
        per_anchor=2,
        repeats=5,
        selection="top",
    )
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    # A tenth of all candidates: 50 * 1500 of width 128.
    assert n * rows * 4 <= memory < 4 * n * rows * 4 < anchors * rows * width * 4 / 3


def test_random_outliers_are_unit_and_point_nowhere():
    outliers = np.asarray(knn.sample_random(jax.random.key(0), 4000, 8))
    np.testing.assert_allclose(np.linalg.norm(outliers, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(outliers.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(outliers.T @ outliers / 4000, np.eye(8) / 8, atol=0.02)


def test_many_queries_are_taken_in_blocks():
    rng = np.random.default_rng(3)
    queries, bank = (unit(rng.normal(size=(n, 3))).astype(np.float32) for n in (5000, 4096))

    def compiled(count):
        more = jax.ShapeDtypeStruct((count, 3), jnp.float32)
        return jax.jit(knn.kth_distance, static_argnums=2).lower(more, bank, 45).compile()

    one, four = (compiled(count) for count in (5000, 20_000))
    memory = [c.memory_analysis().temp_size_in_bytes for c in (one, four)]
    assert memory[1] < 2 * memory[0]
    some = np.r_[:5, 4090:4100, 4995:5000]  # in both blocks
    expected = full_sort_distance(queries[some], bank, 45)
    np.testing.assert_allclose(one(queries, bank)[some], expected, atol=2e-6)


@pytest.mark.parametrize("size", [1, 3, 65, 2**20 + 1, 2**31 - 1])
def test_distinct_rows_are_distinct(size, seed=0):
    count = min(size, 64)
    numbers = np.asarray(rows.distinct_rows(jax.random.key(seed), size, count))
    assert numbers.min() >= 0 and numbers.max() < size and len(set(numbers.tolist())) == count


def test_distinct_rows_are_uniform_and_their_cost_does_not_grow():
    draw = jax.jit(rows.distinct_rows, static_argnums=(1, 2))
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
    largest = draw.lower(jax.random.key(0), 10**9, count).compile()
    assert largest.memory_analysis().temp_size_in_bytes < 100 * count * 4


def test_small_pools_are_drawn_as_before():
    key = jax.random.key(4)
    np.testing.assert_array_equal(
        rows.draw_rows(key, 12_000, 128),
        jax.random.choice(key, 12_000, (128,), replace=False),
    )
    np.testing.assert_array_equal(
        rows.draw_rows(key, 5, 9), jax.random.choice(key, 5, (9,), replace=True)
    )


def context_of(tmp_path, **changes):
    """A context with the teacher's features of three classes of 35 images."""
    config = Config(seed=3)
    config.outliers.knn = Knn(
        features_per_class=30,
        neighbour=9,
        boundary_points=6,
        anchors=5,
        noise_rows=20,
        repeats=4,
    )
    for name, value in changes.items():
        setattr(config.outliers, name, value)
    context = Context(config, tmp_path, distributed.make_mesh(), jax.random.key(config.seed))
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3, dtype=np.int32), 35)
    values = rng.normal(size=(105, 12)).astype(np.float32) + 3 * np.eye(12)[labels].astype("f4")
    path = context.directory("features") / "features.safetensors"
    artifacts.write_tensors(path, {"features": values, "labels": labels})
    return context, values, labels


@pytest.mark.parametrize("official_code", [False, True])
def test_the_stage_samples_each_class_by_its_own_key(tmp_path, monkeypatch, official_code):
    monkeypatch.setattr(generator, "token_norms", lambda context: np.float32([1, 2, 4]))
    context, features, labels = context_of(
        tmp_path, official_code=official_code, source="diffusion"
    )
    (path,) = outliers.run(context)
    written = artifacts.read_tensors(path)
    np.testing.assert_array_equal(written["labels"], [0, 1, 2])
    assert written["outliers"].shape == (3, 4 * 5 * 2, 12)
    sizes = {"k": 9, "count": 6, "anchors": 5, "sigma": 0.07, "noise_rows": 20, "per_anchor": 2}
    for c, length in enumerate((1, 2, 4)):
        alone = knn.sample_class(
            at_step(context.key, "outliers", c),
            unit(features[labels == c][:30]),
            **sizes,
            repeats=4,
            selection="reference" if official_code else "top",
        )
        np.testing.assert_allclose(written["outliers"][c], length * alone, atol=1e-5)


def test_a_class_with_too_few_images_is_one_line(tmp_path):
    context, _, _ = context_of(tmp_path)
    context.config.outliers.knn.features_per_class = 36
    message = refusal(outliers.run, context)
    assert "35 training images" in message and "features_per_class=36" in message
