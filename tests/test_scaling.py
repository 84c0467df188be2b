"""Suite `scaling`: the exponents, the rows, the picture; the parts at tiny sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import run, scaling
from oal_jax import main


def rows_of(axis, program, values, seconds):
    rows = [
        {"axis": axis, "value": v, "program": program, "median_s": s, "min_s": s, "max_s": 2 * s}
        for v, s in zip(values, seconds, strict=True)
    ]
    found = scaling.fit(values, seconds)
    exponents = {"exponent": found.exponent, "exponent_error": found.error}
    return [row | {"runs": 5, "device": "two cores"} | exponents for row in rows]


def test_the_exponent_of_a_power_law_is_exact():
    values = [2, 4, 8, 32]
    found = scaling.fit(values, [3 * v**1.7 for v in values])
    assert found.exponent == pytest.approx(1.7)
    assert found.error == pytest.approx(0, abs=1e-7)
    assert np.exp(found.constant) == pytest.approx(3)


def test_the_standard_error_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    values = np.array([1, 2, 4, 8, 16])
    seconds = values**0.8 * np.exp(rng.normal(0, 0.2, 5))
    found = scaling.fit(values, seconds)
    (slope, _), covariance = np.polyfit(np.log(values), np.log(seconds), 1, cov=True)
    assert found.exponent == pytest.approx(slope)
    assert found.error == pytest.approx(np.sqrt(covariance[0, 0]))


def test_too_few_points_have_no_error_and_one_no_exponent():
    two, one = scaling.fit([1, 2], [1, 4]), scaling.fit([3], [1])
    assert two.exponent == pytest.approx(2) and np.isnan(two.error)
    assert np.isnan(one.exponent) and np.isnan(one.error)


def test_series_are_ordered_by_value_and_the_table_has_a_line_each():
    rows = rows_of("images", "features", [4, 1, 2], [8.0, 2.0, 4.0])
    rows += rows_of("images", "evaluation", [1, 2], [1.0, 4.0])
    found = scaling.series(rows)
    assert list(found) == [("images", "features"), ("images", "evaluation")]
    assert [row["value"] for row in found["images", "features"]] == [1, 2, 4]
    rows[-1]["exponent_error"] = rows[-2]["exponent_error"] = None
    lines = scaling.table(rows).splitlines()
    assert lines[1].split()[:5] == ["images", "features", "1.00", "±", "0.00"]
    assert lines[1].endswith("1: 2.0000 s, 4: 8.0000 s")
    assert lines[2].split()[:3] == ["images", "evaluation", "2.00"] and "±" not in lines[2]


def test_a_panel_an_axis_on_logarithmic_axes(tmp_path):
    rows = rows_of("images", "features", [1, 2, 4], [2.0, 4.0, 8.0])
    rows += rows_of("images", "evaluation", [1, 2, 4], [1.0, 4.0, 15.0])
    rows += rows_of("devices", "step", [1, 2, 4, 8], [1.0, 0.8, 0.9, 1.0])
    paths = scaling.draw(rows, tmp_path / "results.json")
    assert [path.name for path in paths] == ["results.png", "results.svg"]
    assert np.asarray(Image.open(paths[0])).std() > 1
    figure = scaling.figure(rows)
    images, devices = [axes for axes in figure.axes if axes.axison]
    assert (images.get_xscale(), images.get_yscale()) == ("log", "log")
    legends = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in (images, devices)]
    assert legends[0] == ["features: 1.00 ± 0.00", "evaluation: 1.95 ± 0.03"]
    assert len(legends[1]) == 1
    assert [label.get_text() for label in devices.get_xticklabels()] == ["1", "2", "4", "8"]


def test_shapes_are_filled_with_numbers_that_a_program_takes():
    of = jax.ShapeDtypeStruct
    shapes = {
        "weights": of((4, 3), jnp.bfloat16),
        "step": of((), jnp.int32),
        "order": of((5, 2), jnp.int32),
        "images": of((64, 8), jnp.uint8),
        "where": of((7,), jnp.bool_),
    }
    arrays = scaling.filled(shapes)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), arrays) == jax.tree.map(
        lambda s: (s.shape, s.dtype), shapes
    )
    assert (arrays["weights"] > 0).all() and arrays["step"] == 0
    assert set(np.unique(arrays["order"])) <= {0, 1}
    assert np.unique(arrays["images"]).size > 50


def timed(tmp_path, *flags) -> list[dict]:
    output = tmp_path / "results.json"
    argv = ["run", "--suite=scaling", "--smoke", f"--output={output}", *flags]
    assert main.guard(run.main, argv) == 0
    assert output.with_suffix(".png").exists() and output.with_suffix(".svg").exists()
    rows = json.loads(output.read_text())
    for row in rows:
        assert row["suite"] == "scaling" and row["case"].startswith(row["axis"])
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["warm_up_s"] > 0 and row["versions"]["jax"]
    return rows


def test_rows_say_axis_value_program_and_exponent(tmp_path, capsys):
    rows = timed(tmp_path, "--axes=classes", "--runs=2")
    assert [(r["axis"], r["value"], r["program"], r["runs"]) for r in rows] == [
        ("classes", count, "knn", 2) for count in scaling.AXES["classes"][1]
    ]
    found = scaling.fit([r["value"] for r in rows], [r["median_s"] for r in rows])
    assert {r["exponent"] for r in rows} == {round(found.exponent, 4)}
    assert {r["exponent_error"] for r in rows} == {round(found.error, 4)}
    said = capsys.readouterr().out
    assert f"{found.exponent:.2f} ± {found.error:.2f}" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "programs"),
    [
        ("images", {"features", "evaluation"}),
        ("outliers", {"latents"}),
        ("side", {"features", "step"}),
        ("devices", {"step"}),
    ],
)
def test_every_axis_runs_at_tiny_sizes(axes, programs, tmp_path):
    rows = timed(tmp_path, f"--axes={axes}", "--runs=1")
    assert {row["program"] for row in rows} == programs
    assert {row["value"] for row in rows} == set(scaling.AXES[axes][1])
    points = len(scaling.AXES[axes][1])
    assert all((row["exponent_error"] is None) == (points < 3) for row in rows)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--axes=image", "axis 'image' is unknown; known: images, classes"),
        ("--runs=0", "--runs 0 must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line(flag, words, tmp_path, capsys):
    argv = ["run", "--suite=scaling", f"--output={tmp_path / 'r.json'}", flag]
    assert main.guard(run.main, argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
