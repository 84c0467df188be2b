"""The suites that compare two frameworks: their JAX half on tiny sizes, their rows and flags."""

import io
import json
import sys
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from benchmarks import compilation, job, outliers, plots, run, step, timing
from benchmarks.timing import Job
from oal_jax import main
from oal_jax.config import flatten
from oal_jax.errors import UserError

FIELDS = {
    *("suite", "case", "framework", "median_s", "min_s", "max_s", "runs", "device", "versions"),
    "warm_up_s",
}
TINY = {
    "outliers": [
        *("--classes=2", "--features=40", "--width=16", "--neighbour=20", "--anchors=8"),
        "--noise-rows=16",
    ],
    "features": ["--side=32", "--depth=1", "--batch=2"],
}


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def rows_of(suite, flags, tmp_path) -> list[dict]:
    output = tmp_path / "results.json"
    assert main.guard(run.main, ["run", f"--suite={suite}", f"--output={output}", *flags]) == 0
    rows = json.loads(output.read_text())
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["suite"] == suite
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    return rows


@pytest.mark.parametrize("suite", TINY)
def test_our_half_runs_alone_without_torch(suite, without_torch, tmp_path, capsys):
    rows = rows_of(suite, [*TINY[suite], "--runs=2", "--frameworks=jax,torch"], tmp_path)
    assert {row["framework"] for row in rows} == {"jax"}
    assert all(row["runs"] == 2 and row["per_s"] > 0 and row["versions"]["jax"] for row in rows)
    said = capsys.readouterr().out.splitlines()
    assert sum("missing" in line for line in said) == 1
    assert "torch" in said[0] and said[0].endswith("our half runs alone")
    if suite == "outliers":
        assert 0 <= rows[0]["peak_bytes"] < 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "flags", "cases"),
    [
        ("latents", ["--latents=8", "--steps=2"], ["step", "default", "reference"]),
        ("step", ["--cases=oal-teacher"], ["oal-teacher"]),
    ],
)
def test_our_half_of_larger_suites(suite, flags, cases, tmp_path):
    rows = rows_of(suite, [*flags, "--frameworks=jax", "--runs=1"], tmp_path)
    assert [row["case"] for row in rows] == cases
    assert all(row["compile_s"] > 0 for row in rows)


@pytest.mark.slow
def test_our_side_of_the_job(tmp_path):
    args = timing.parser("job").parse_args([])
    args.warm_cache = False
    results = {}
    config = job.configs(smoke=True)["default"]
    job._ours("default", config, tmp_path, args, results).run()
    found = job.summary(results["jax", "default"])
    assert list(found["stages"]) == [
        *("teacher", "generator", "features", "outliers", "latents", "train", "evaluate", "score")
    ]
    assert found["compile_s"] > 0
    assert found["quality"].keys() == {"near", "far", "ID acc"}
    assert all(0 < value <= 100 for (value,) in found["quality"].values())


@pytest.mark.parametrize(
    ("suite", "flags", "words"),
    [
        (
            "job",
            ["--recipes=quick", "--frameworks=jax"],
            "recipe 'quick' is unknown; known: default",
        ),
        ("outliers", ["--frameworks=jaxx"], "framework 'jaxx' is unknown; known: jax, torch"),
        ("features", ["--forms=fast"], "form 'fast' is unknown; known: reference, tuned"),
        ("latents", ["--runs=0"], "--runs 0 must be 1 or more"),
        ("step", ["--cases=oall"], "case 'oall' is unknown; known: ce"),
        ("features", ["--cases=vgg", "--frameworks=jax"], "case 'vgg' is unknown"),
    ],
)
def test_a_mistake_is_one_line(suite, flags, words, tmp_path, capsys):
    argv = ["run", "--suite", suite, "--output", str(tmp_path / "r.json"), *flags]
    assert main.guard(run.main, argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when `clock(seconds)` says so."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_jobs_take_turns_and_ratios_are_of_the_same_turn(clock, monkeypatch, capsys):
    monkeypatch.setattr(timing, "where", lambda *_: {"device": "d", "versions": {}})
    order, slower = [], {"ours": iter([9, 1, 2, 4]), "theirs": iter([50, 3, 2, 8])}

    def job(name):
        def take():
            order.append(name)
            clock(next(slower[name]))

        return take

    args = timing.parser("s").parse_args(["--runs=3"])
    jobs = [
        Job("case", "jax", job("ours"), items=10),
        Job("case", "torch", job("theirs"), more={"form": "tuned"}),
    ]
    ours, theirs = timing.measure("s", jobs, args)
    assert order == ["ours", "theirs"] * 4
    assert (ours["median_s"], ours["min_s"], ours["max_s"], ours["runs"]) == (2, 1, 4, 3)
    assert (ours["warm_up_s"], ours["compile_s"], ours["per_s"]) == (9, 7, 5)
    assert (theirs["warm_up_s"], theirs["compile_s"], theirs["form"]) == (50, 47, "tuned")
    # 3 / 1, 2 / 2, 8 / 4: not the ratio of the medians, 3 / 2.
    assert theirs["ratios"] == {"case": [2.0, 1.0, 3.0]}
    assert "ratios" not in ours
    assert "2.00 x ours (1.00 to 3.00)" in capsys.readouterr().out


def test_time_spans_within_others_count_once():
    spent = compilation.CompilationTime()
    for start, end in ((5, 9), (6, 7), (1, 2), (8, 10)):
        spent.add("/jax/core/compile/backend_compile_duration", start, end, fun_name="f")
    spent.add("/jax/checkpoint/write", 0, 100)
    assert spent.seconds == 1 + 5


def test_a_process_that_fails_is_said_in_one_line():
    with pytest.raises(UserError, match=r"python -c .* failed \(1\): ValueError: of this$"):
        timing.python(["-c", "raise ValueError('of this')"])


def test_the_job_is_summed_up_by_medians():
    def metrics(sandal, bag, far, accuracy):
        aurocs = {"sandal": sandal, "bag": bag} | dict.fromkeys(("mnist", "letters", "photos"), far)
        sets = {name: {"auroc": value} for name, value in aurocs.items()}
        return sets | {"id": {"accuracy": accuracy}}

    found = [
        {"stages": {"train": t}, "compile_s": c, "metrics": m}
        for t, c, m in (
            (1.0, 4.0, metrics(0.5, 0.7, 0.9, 0.8)),
            (5.0, 2.0, metrics(0.6, 0.9, 1.0, 0.7)),
            (2.0, 3.0, metrics(0.2, 0.4, 0.8, 0.9)),
        )
    ]
    assert job.summary(found) == {
        "stages": {"train": 2.0},
        "compile_s": 3.0,
        "quality": {"near": [60, 75, 30], "far": [90, 100, 80], "ID acc": [80, 70, 90]},
    }


def test_every_turn_of_the_job_has_a_seed_of_its_own():
    """The tiny turn, which does not count, has the first one's."""
    assert [job._seed([None] * turn)["seed"] for turn in range(4)] == [0, 0, 1, 2]


def test_the_short_job_is_the_default_in_fewer_epochs():
    found = job.configs(smoke=False)
    flat = {name: flatten(config) for name, config in found.items()}
    changed = {k for k in flat["default"] if flat["default"][k] != flat["short"][k]}
    assert changed == {"train.epochs", "teacher.views"}
    assert flat["short"]["train.epochs"] < flat["default"]["train.epochs"]


def test_every_form_has_a_recipe_that_caches_views_as_it_expects():
    recipes = job.configs(smoke=False)
    assert set(job.RECIPE) == set(timing.FORMS)
    for form, recipe in job.RECIPE.items():
        assert bool(recipes[recipe].teacher.views) == (form == "shortcuts")
        assert recipes[recipe].evaluation.scores == ("energy",)
        assert recipes[recipe].data.csid == ("none",)


def test_features_of_the_outlier_suite_are_unit_vectors_in_classes():
    features = outliers.make_features({"classes": 3, "features": 20, "width": 32})
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-6)
    means = features.mean(1)
    within = np.einsum("cnd,cd->cn", features, means).mean()
    across = np.einsum("cnd,kd->cnk", features, means)[
        ~np.eye(3, dtype=bool)[:, None].repeat(20, 1)
    ]
    assert within > 3 * abs(across.mean())


def test_a_step_of_full_size_has_batches_of_its_networks():
    args = timing.parser("step").parse_args([])
    args.batch, args.side, args.teacher_depth, args.teacher_dtype = 3, 64, 2, "float32"
    for name, (recipe, large) in step.OAL_CASES.items():
        config, classes, batch = step.make_problem(recipe, large, args)
        size = config.train.batch_size
        assert all(len(array) == size for array in batch.values()), name
        assert batch["image"].shape[1:] == ((64, 64, 3) if large else (28, 28, 1))
        assert batch["outlier"].shape[1] == config.teacher.width == (768 if large else 128)
        assert batch["label"].max() < classes
        assert ("teacher_logits" in batch) == bool(config.teacher.views)


def drawn_row(case, framework, seconds, **more):
    times = {"median_s": seconds, "min_s": 0.9 * seconds, "max_s": 1.2 * seconds, "runs": 5}
    return {"suite": "s", "case": case, "framework": framework, "device": "d", **times, **more}


def compared():
    """Ours and three forms of the twin; a library without ratios; a case that is ours alone."""
    to_reference = {"reference": [2.5, 2.0, 3.0], "default": [9.0, 8.0, 10.0]}
    return [
        drawn_row("default", "jax", 1.0),
        drawn_row("reference", "jax", 4.0),
        drawn_row("reference-official", "torch", 10.0, form="reference", ratios=to_reference),
        drawn_row("reference", "torch", 5.0, form="tuned", ratios={"reference": [1.25, 1.2, 1.3]}),
        drawn_row("default", "torch", 0.9, form="shortcuts", ratios={"default": [0.9, 0.8, 1.0]}),
        drawn_row("knn", "jax", 0.002),
        drawn_row("knn", "torch", 0.003),
        drawn_row("first", "jax", 30.0),
        drawn_row("again", "jax", 3.0),
    ]


def test_bars_stand_beside_those_they_are_compared_with():
    found = plots.groups(compared())
    cases = {case: [(r["case"], r["framework"]) for r in rows] for case, rows in found.items()}
    assert cases == {
        "default": [("default", "jax"), ("default", "torch")],
        "reference": [
            ("reference", "jax"),
            ("reference-official", "torch"),
            ("reference", "torch"),
        ],
        "knn": [("knn", "jax"), ("knn", "torch")],
        "": [("first", "jax"), ("again", "jax")],
    }
    assert list(found)[-1] == ""
    _, official, tuned = found["reference"]
    assert plots.ratio(official, found["reference"]) == (2.5, 2.0, 3.0)
    ours, theirs = found["knn"]
    assert plots.ratio(ours, found["knn"]) is None
    np.testing.assert_allclose(plots.ratio(theirs, found["knn"]), (1.5, 1.125, 2.0))


def test_no_text_of_the_picture_covers_another_or_leaves_it():
    figure = plots.figure(compared())
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [text for axes in figure.axes for text in axes.texts]
    assert [text.get_text() for text in texts][:4] == [
        *("1 s", "900 ms: 0.90 × ours (0.80 to 1.00)"),
        *("4 s", "10 s: 2.50 × ours (2.00 to 3.00)"),
    ]
    for axes in figure.axes:
        texts += [*axes.get_yticklabels(), axes._left_title]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert all(figure.bbox.count_contains([b.min, b.max]) == 2 for b in boxes)
    overlapping = [(i, j) for i, a in enumerate(boxes) for j in range(i) if a.overlaps(boxes[j])]
    assert overlapping == []


def test_suites_that_compare_frameworks_draw_their_rows(tmp_path):
    for name in ("features", "job", "latents", "outliers", "scores", "step"):
        assert import_module(f"benchmarks.{name}").draw is plots.draw
    paths = plots.draw(compared(), tmp_path / "results.json")
    assert [path.name for path in paths] == ["results.png", "results.svg"]
    assert Image.open(io.BytesIO(paths[0].read_bytes())).size[0] > 800
    assert (
        "as the official code" in plots.figure(compared()).axes[1].get_yticklabels()[1].get_text()
    )
