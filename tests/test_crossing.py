"""Boundary crossing against the walk done by NumPy in float64, point by point; and its stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from oal_jax.config import Config
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.outliers import crossing
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.ops import unit
from oal_jax.scores import compute
from oal_jax.stages import generator, outliers, teacher, teacher_head
from oal_jax.stages.context import Context

WIDTH, CLASSES, POINTS, COUNT = 12, 5, 60, 25
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(WIDTH, CLASSES)).astype(np.float32)
BIAS = RNG.normal(size=CLASSES).astype(np.float32)
LABEL = 2
FEATURES = (0.3 * KERNEL[:, LABEL] + RNG.normal(size=(POINTS, WIDTH))).astype(np.float32)
WALK = {"count": COUNT, "step": 0.02, "steps_after": 2, "exact": False}


def logits_of(x):
    return x.astype(np.float64) @ KERNEL + BIAS


def cross(**changes):
    found = crossing.cross_class(FEATURES, KERNEL, BIAS, LABEL, **WALK | changes)
    return tuple(np.asarray(x) for x in found)


def walk(start, step, steps_after):
    """(the points of the walk from the start to its end, the steps until the prediction changed)"""
    own, length = logits_of(start).argmax(), np.linalg.norm(start)
    path, crossed = [start.astype(np.float64)], None
    while crossed is None or len(path) - 1 < crossed + steps_after:
        others = logits_of(path[-1])
        others[own] = -np.inf
        gradient = (KERNEL[:, own] - KERNEL[:, others.argmax()]).astype(np.float64)
        path.append(path[-1] - step * length * gradient / np.linalg.norm(gradient))
        if crossed is None and logits_of(path[-1]).argmax() != own:
            crossed = len(path) - 1
    return np.array(path), crossed


def test_the_rows_are_those_of_smallest_margin_the_right_ones_first():
    logits = logits_of(FEATURES)
    ordered = np.sort(logits, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    right = logits.argmax(1) == LABEL
    assert COUNT < right.sum() < POINTS  # both kinds are there
    _, rows, _ = cross()
    expected = sorted(np.flatnonzero(right), key=lambda i: margin[i])[:COUNT]
    np.testing.assert_array_equal(rows, expected)
    everything = crossing.nearest_boundary(logits.astype(np.float32), LABEL, POINTS)
    wrong = sorted(np.flatnonzero(~right), key=lambda i: margin[i])
    np.testing.assert_array_equal(everything[right.sum() :], wrong)


@pytest.mark.parametrize("steps_after", [0, 2])
def test_the_prediction_changes_at_the_last_step_and_not_before(steps_after):
    points, rows, steps = cross(steps_after=steps_after)
    assert points.shape == (COUNT, WIDTH) and len(set(steps)) > 3
    assert np.isfinite(points).all()
    for point, row, taken in zip(points, rows, steps, strict=True):
        path, crossed = walk(FEATURES[row], WALK["step"], steps_after)
        own = logits_of(FEATURES[row]).argmax()
        assert taken == crossed
        np.testing.assert_allclose(point, path[-1], atol=1e-4)
        predictions = logits_of(path).argmax(1)
        assert (predictions[:crossed] == own).all() and predictions[crossed] != own
        assert logits_of(point).argmax() != own


def test_an_exact_step_ends_just_beyond_the_nearest_boundary():
    points, rows, steps = cross(exact=True, steps_after=0)
    assert (steps == 1).all()
    for point, row in zip(points, rows, strict=True):
        start = FEATURES[row].astype(np.float64)
        logits = logits_of(start)
        own = logits.argmax()
        distance = min(
            (logits[own] - logits[j]) / np.linalg.norm(KERNEL[:, own] - KERNEL[:, j])
            for j in range(CLASSES)
            if j != own
        )
        moved = point - start
        beyond = 1e-3 * np.linalg.norm(start)
        assert np.linalg.norm(moved) == pytest.approx(distance + beyond, rel=1e-3)
        assert logits_of(point).argmax() != own
        inside = start + moved / np.linalg.norm(moved) * (distance - beyond)
        assert logits_of(inside).argmax() == own
    further, _, _ = cross(exact=True, steps_after=3)
    length = np.linalg.norm(FEATURES[rows], axis=1)
    extra = np.linalg.norm(further - points, axis=1)
    np.testing.assert_allclose(extra, (3 * WALK["step"] - 1e-3) * length, rtol=1e-3)


def test_it_is_the_same_every_time_and_on_any_number_of_devices():
    one, again = cross(), cross()
    mesh = distributed.make_mesh()
    assert mesh.size == 4
    split = jax.device_put(jnp.asarray(FEATURES), distributed.over_data(mesh))
    kernel, bias = distributed.replicate((KERNEL, BIAS), mesh)
    four = crossing.cross_class(split, kernel, bias, LABEL, **WALK)
    for a, b, c in zip(one, again, four, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-6)


def context_on(devices, tmp_path, **changes):
    """The shipped teacher and generator, and features of four a class near its own head."""
    config = Config(smoke=True)
    config.outliers.boundary = "crossing"
    config.outliers.knn.features_per_class = 6
    config.outliers.crossing.points = 4
    for name, value in changes.items():
        setattr(config.outliers.crossing, name, value)
    mesh = distributed.make_mesh(devices=jax.devices()[:devices])
    context = Context(config, tmp_path, mesh, jax.random.key(0))
    teacher.run(context)
    kernel, _ = teacher_head.load(context)
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(8), 6)
    features = 9 * np.asarray(unit(kernel.T))[labels] + 0.3 * rng.normal(size=(48, len(kernel)))
    tensors = {"features": features.astype(np.float32), "labels": labels.astype(np.int32)}
    artifacts.write_tensors(context.directory("features") / "features.safetensors", tensors)
    return context, tensors["features"]


def test_the_stage_writes_a_pool_in_place_of_the_k_nn_one(tmp_path):
    found = []
    for devices in (1, 4):
        context, features = context_on(devices, tmp_path / str(devices))
        (path,) = outliers.run(context)
        found.append(path.read_bytes())
    assert found[0] == found[1]
    written = load_file(path)
    kernel, bias = teacher_head.load(context)
    norms = generator.token_norms(context)
    pool = written["outliers"]
    assert pool.shape == (8, 4, 128) == (8, outliers.per_class(context.config), 128)
    assert (written["steps"] > 0).all()
    np.testing.assert_allclose(
        np.linalg.norm(pool, axis=-1), norms[:, None] * np.ones(4), rtol=1e-5
    )
    context.config.outliers.knn.scale_by_token = False
    outliers.run(context)
    plain = load_file(path)["outliers"]
    np.testing.assert_allclose(plain * norms[:, None, None], pool, rtol=1e-5, atol=1e-7)
    for c in range(8):
        own = features[6 * c : 6 * c + 6]
        assert ((own @ kernel + bias).argmax(1) == c).all()
        crossed, rows, _ = crossing.cross_class(
            own, kernel, bias, c, **outliers.walk(context.config.outliers.crossing)
        )
        assert ((np.asarray(crossed) @ kernel + bias).argmax(1) != c).all()
        np.testing.assert_allclose(plain[c], unit(crossed), atol=1e-6)
    assert outliers.flat(context).shape == outliers.shapes(context.config, 8, 128).shape


def test_the_head_is_the_teachers(tmp_path):
    context, _ = context_on(4, tmp_path)
    images = context.images("test", limit=16).images
    logits, features, *_ = compute(teacher.load(context), images)
    kernel, bias = teacher_head.load(context)
    np.testing.assert_allclose(np.asarray(features) @ kernel + bias, logits, rtol=1e-4, atol=1e-4)


def test_steps_that_are_too_short_are_told(tmp_path):
    context, _ = context_on(4, tmp_path, step=1e-6)
    with pytest.raises(UserError, match=r"32 features are still .*crossing\.step=1e-06; raise"):
        outliers.run(context)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lazy", True, r"lazy=True is of outliers\.boundary='knn'"),
        ("points", 501, r"points=501 must be at most outliers\.knn\.features_per_class=500"),
        ("points", 0, r"outliers\.crossing\.points=0 must be greater than 0"),
        ("step", 0.0, r"outliers\.crossing\.step=0\.0 must be greater than 0"),
        ("boundary", "crosing", "nearest: 'crossing'"),
    ],
)
def test_impossible_values_are_told(name, value, message):
    config = Config()
    config.outliers.boundary = "crossing"
    where = config.outliers if hasattr(config.outliers, name) else config.outliers.crossing
    setattr(where, name, value)
    with pytest.raises(UserError, match=message):
        validate(config)
