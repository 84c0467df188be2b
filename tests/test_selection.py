"""The choice among sampled latents against brute force and against rules written out in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from oal_jax.config import Config
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.outliers import selection


def farthest(features, allowed, count):
    """Greedy, from all distances in float64."""
    rows = np.flatnonzero(allowed)
    chosen = [rows[0]]
    while len(chosen) < count:
        rest = [r for r in rows if r not in chosen]
        gaps = [
            min(np.sum((features[r].astype(np.float64) - features[c]) ** 2) for c in chosen)
            for r in rest
        ]
        chosen.append(rest[int(np.argmax(gaps))])
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_farthest_points_are_those_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    allowed = rng.random(40) < 0.6
    found = selection.farthest_points(features, allowed, 9)
    np.testing.assert_array_equal(found, farthest(features, allowed, 9))


def test_equal_points_are_taken_once_each():
    features = np.zeros((6, 3), np.float32)
    allowed = np.array([False, True, True, False, True, True])
    found = np.asarray(selection.farthest_points(jnp.asarray(features), allowed, 4))
    assert sorted(found.tolist()) == [1, 2, 4, 5]


def candidates(seed=0, classes=3, each=20):
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes), each)
    features = rng.normal(size=(len(labels), 5)).astype(np.float32)
    logits = 3 * rng.normal(size=(len(labels), classes)).astype(np.float32)
    return features, logits, labels


def numbers(logits):
    e = np.exp(logits.astype(np.float64))
    return (e / e.sum(1, keepdims=True)).max(1), np.log(e.sum(1))


def test_the_scores_are_the_formulas():
    _, logits, _ = candidates()
    msp, energy = numbers(logits)
    np.testing.assert_allclose(selection.max_softmax(logits), msp, rtol=1e-5)
    np.testing.assert_allclose(selection.log_partition(logits), energy, rtol=1e-5)


@pytest.mark.parametrize("diverse", [False, True])
@pytest.mark.parametrize(
    ("max_msp", "max_energy"), [(1.0, np.inf), (0.85, np.inf), (1.0, 3.0), (0.8, 3.0)]
)
def test_as_many_of_each_class_are_kept_as_asked(max_msp, max_energy, diverse):
    features, logits, labels = candidates()
    per_class = 8
    bounds = {"max_msp": max_msp, "max_energy": max_energy, "diverse": diverse}
    found = selection.choose(features, logits, labels, per_class, **bounds)
    assert found.rows.shape == (3, per_class)
    msp, energy = numbers(logits)
    within = (msp <= max_msp) & (energy <= max_energy)
    for c, rows in enumerate(found.rows):
        assert len(set(rows)) == per_class and (labels[rows] == c).all()
        good = np.flatnonzero((labels == c) & within)
        assert found.accepted[c] == len(good)
        assert found.filled[c] == max(0, per_class - len(good)) == (~within[rows]).sum()
        if len(good) <= per_class:
            assert set(good) <= set(rows)
            refused = np.flatnonzero((labels == c) & ~within)
            best = refused[np.argsort(energy[refused])][: per_class - len(good)]
            np.testing.assert_array_equal(rows[len(good) :], best)
        elif diverse:
            assert set(rows) == set(farthest(features, within & (labels == c), per_class))
        else:
            np.testing.assert_array_equal(rows, good[:per_class])


def test_the_cases_above_fill_up_some_and_choose_among_others():
    features, logits, labels = candidates()
    strict = selection.choose(features, logits, labels, 8, max_msp=0.8, max_energy=3.0)
    loose = selection.choose(features, logits, labels, 8, max_msp=0.85)
    assert strict.filled.sum() > 0 and (loose.accepted > 8).any()


def test_diverse_points_are_further_apart_than_the_first():
    features, logits, labels = candidates(each=60)

    def nearest(diverse):
        rows = selection.choose(features, logits, labels, 10, diverse=diverse).rows
        gaps = [np.linalg.norm(features[r][:, None] - features[r][None], axis=-1) for r in rows]
        return np.mean([g[~np.eye(10, dtype=bool)].min() for g in gaps])

    assert nearest(True) > 1.5 * nearest(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_msp": 0.5}, "set latents.select.oversample above 1"),
        ({"diverse": True}, "set latents.select.oversample above 1"),
        ({"oversample": 2.0}, "nothing chooses; set latents.select.max_msp"),
        ({"oversample": 0.5}, r"oversample=0\.5 must be 1 or greater"),
        ({"oversample": 2.0, "max_msp": 0.0}, r"max_msp=0\.0 must be greater than 0"),
        ({"oversample": 2.0, "max_energy_percentile": 101.0}, r"must lie in 0\.\.100"),
    ],
)
def test_choices_that_choose_nothing_are_told(changes, message):
    config = Config()
    for name, value in changes.items():
        setattr(config.latents.select, name, value)
    with pytest.raises(UserError, match=message):
        validate(config)
