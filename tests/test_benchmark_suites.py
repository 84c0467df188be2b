"""The suites that compare two frameworks: their JAX half at tiny sizes, their rows and flags."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import compilation, job, outliers, plots, run, step, timing
from benchmarks.timing import Job
from oal_jax.config import flatten
from oal_jax.errors import UserError
from oal_jax.runtime.command import guard

FIELDS = {
    *("suite", "case", "framework", "median_s", "min_s", "max_s", "runs", "device", "versions"),
    "warm_up_s",
}
TINY = {
    "outliers": [
        *("--classes=2", "--features=40", "--width=16", "--neighbour=20", "--anchors=8"),
        "--noise-rows=16",
    ],
    "features": ["--cases=shipped", "--batch=1"],
    "scores": ["--cases=vim,metrics", "--train=200", "--test=100", "--width=16"],
}


def rows_of(suite, flags, tmp_path) -> list[dict]:
    output = tmp_path / "results.json"
    assert guard(run.run, ["run", f"--suite={suite}", f"--output={output}", *flags]) == 0
    assert output.with_suffix(".png").exists()
    rows = json.loads(output.read_text())
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["suite"] == suite
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    return rows


@pytest.mark.parametrize(
    "suite",
    ["scores", *(pytest.param(s, marks=pytest.mark.slow) for s in ("outliers", "features"))],
)
def test_jax_runs_alone_without_torch(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = rows_of(suite, [*TINY[suite], "--runs=2", "--frameworks=jax,torch"], tmp_path)
    assert {row["framework"] for row in rows} == {"jax"}
    assert all(row["runs"] == 2 and row["versions"]["jax"] for row in rows)
    first, *_ = capsys.readouterr().out.splitlines()
    assert "torch" in first and "missing" in first
    if suite == "outliers":
        assert 0 <= rows[0]["peak_bytes"] < 2**30 and rows[0]["per_s"] > 0
    if suite == "scores":
        assert [row["case"] for row in rows] == ["vim", "metrics"]
        assert rows[0]["peak_over_inputs"] >= 1


@pytest.mark.slow
def test_the_jax_half_of_the_latents_suite(tmp_path):
    rows = rows_of(
        "latents", ["--latents=4", "--steps=2", "--frameworks=jax", "--runs=1"], tmp_path
    )
    assert [row["case"] for row in rows] == ["step", "default", "reference"]


@pytest.mark.slow
def test_the_jax_half_of_the_step_suite(tmp_path, monkeypatch):
    """On tiny networks: a method against the baseline, and OAL with the teacher in the step."""
    lines = [
        "from oal_jax.config import Config",
        "def get_config():",
        "    config = Config()",
        "    config.student.width, config.train.batch_size = 4, 16",
        "    npos = config.method.npos",
        "    npos.queue_size, npos.neighbour, npos.boundary_points = 8, 4, 4",
        "    return config",
    ]
    (tmp_path / "tiny.py").write_text("\n".join(lines))

    def tiny_recipes(*, smoke):
        recipes = job.configs(smoke=smoke)
        for config in recipes.values():
            config.student.width, config.train.batch_size, config.teacher.depth = 4, 16, 1
        return recipes

    monkeypatch.setattr(step, "configs", tiny_recipes)
    names = ["npos", "oal-teacher"]
    flags = [f"--config={tmp_path / 'tiny.py'}", f"--cases={','.join(names)}"]
    rows = rows_of("step", [*flags, "--frameworks=jax", "--runs=1"], tmp_path)
    assert [row["case"] for row in rows] == [step.BASELINE, *names]
    assert all(row["ratios"].keys() == {step.BASELINE} for row in rows[1:2])


@pytest.mark.slow
def test_the_jax_side_of_the_job(tmp_path):
    args, outputs = timing.make_parser("job", "").parse_args([]), {}
    args.warm_cache = False
    job.our_job("default", job.configs(smoke=True)["default"], tmp_path, args, outputs).run()
    summary = job.summary(outputs["jax", "default"])
    assert summary["stages"].keys() >= {"features", "latents", "train", "evaluate", "score"}
    assert 0 < summary["compile_s"] < sum(summary["stages"].values())
    assert summary["quality"].keys() == {"near", "far", "ID acc"}
    assert all(0 < value <= 100 for (value,) in summary["quality"].values())


@pytest.mark.parametrize(
    ("suite", "flags", "words"),
    [
        ("job", ["--recipes=quick"], ["recipe 'quick'", "default"]),
        ("outliers", ["--frameworks=jaxx"], ["framework 'jaxx'", "jax, torch"]),
        ("features", ["--forms=fast"], ["form 'fast'", "reference, tuned"]),
        ("latents", ["--runs=0"], ["--runs 0"]),
        ("step", ["--cases=oall"], ["case 'oall'", "ce"]),
        ("scores", ["--cases=knm"], ["case 'knm'", "knn"]),
        ("features", ["--cases=vgg"], ["case 'vgg'", "shipped"]),
        ("features", ["--sides=3"], ["--sides=3"]),
    ],
)
def test_a_mistake_is_one_line(suite, flags, words, tmp_path, capsys):
    argv = ["run", "--suite", suite, "--output", str(tmp_path / "r.json"), *flags]
    assert guard(run.run, argv) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words) and err.count("\n") == 1


@pytest.mark.parametrize("suite", run.SUITES)
def test_help_lists_the_flags_of_a_suite(suite, capsys):
    with pytest.raises(SystemExit) as stop:
        run.run(["run", f"--suite={suite}", "--help"])
    assert stop.value.code == 0
    assert f"--suite {suite}" in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock(seconds)` moves."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_jobs_take_turns_and_ratios_are_of_the_same_turn(clock, monkeypatch, capsys):
    monkeypatch.setattr(timing, "where", lambda *_: {"device": "d", "versions": {"a": "1"}})
    order, slower = [], {"ours": iter([9, 1, 2, 4]), "theirs": iter([50, 3, 2, 8])}

    def work(name):
        def take():
            order.append(name)
            clock(next(slower[name]))

        return take

    args = timing.make_parser("s", "").parse_args(["--runs=3"])
    jobs = [
        Job("case", "jax", work("ours"), items=10),
        Job("case", "torch", work("theirs"), fields={"form": "tuned"}),
    ]
    ours, theirs = timing.measure("s", jobs, args)
    assert order == ["ours", "theirs"] * 4
    assert (ours["median_s"], ours["min_s"], ours["max_s"], ours["runs"]) == (2, 1, 4, 3)
    assert (ours["warm_up_s"], ours["compile_s"], ours["per_s"]) == (9, 7, 5)
    assert (theirs["warm_up_s"], theirs["compile_s"], theirs["form"]) == (50, 47, "tuned")
    assert (theirs["device"], theirs["versions"]) == ("d", {"a": "1"})
    # 3 / 1, 2 / 2, 8 / 4: not the ratio of the medians, 3 / 2.
    assert theirs["ratios"] == {"case": [2.0, 1.0, 3.0]}
    assert "ratios" not in ours
    assert "2.00 x case in JAX (1.00 to 3.00)" in capsys.readouterr().out


def test_time_spans_within_others_count_once():
    spent = compilation.CompilationTime()
    for start, end in ((5, 9), (6, 7), (1, 2), (8, 10)):
        spent.add("/jax/core/compile/backend_compile_duration", start, end, fun_name="f")
    spent.add("/jax/checkpoint/write", 0, 100)
    assert spent.seconds == 1 + 5


def test_a_process_that_fails_names_its_last_line():
    with pytest.raises(UserError, match="ValueError: of this$"):
        timing.python(["-c", "raise ValueError('of this')"])


def test_the_job_is_summed_up_by_medians():
    def metrics(sandal, bag, far, accuracy):
        aurocs = {"sandal": sandal, "bag": bag} | dict.fromkeys(("mnist", "letters", "photos"), far)
        sets = {name: {"auroc": value} for name, value in aurocs.items()}
        return sets | {"id": {"accuracy": accuracy}}

    runs = [
        {"stages": {"train": t}, "compile_s": c, "metrics": m}
        for t, c, m in (
            (1.0, 4.0, metrics(0.5, 0.7, 0.9, 0.8)),
            (5.0, 2.0, metrics(0.6, 0.9, 1.0, 0.7)),
            (2.0, 3.0, metrics(0.2, 0.4, 0.8, 0.9)),
        )
    ]
    assert job.summary(runs) == {
        "stages": {"train": 2.0},
        "compile_s": 3.0,
        "quality": {"near": [60, 75, 30], "far": [90, 100, 80], "ID acc": [80, 70, 90]},
    }


def test_every_turn_of_the_job_has_its_own_seed(monkeypatch, tmp_path):
    """But the tiny turn, which is not counted, has the seed of the first counted one."""
    requests = []

    def process(arguments, **_):
        _, _, request, output = arguments
        requests.append(json.loads(Path(request).read_text())["config"])
        Path(output).write_text("{}")

    monkeypatch.setattr(timing, "python", process)
    args = timing.make_parser("job", "").parse_args([])
    args.warm_cache = False
    config = job.configs(smoke=False)["default"]
    work = job.our_job("default", config, tmp_path, args, {})
    for _ in range(4):
        work.run()
    assert [request["seed"] for request in requests] == [0, 0, 1, 2]
    assert [request["smoke"] for request in requests] == [True, False, False, False]


def test_the_short_job_is_the_default_in_fewer_epochs():
    recipes = {name: flatten(config) for name, config in job.configs(smoke=False).items()}
    default, short = recipes["default"], recipes["short"]
    assert {k for k in default if default[k] != short[k]} == {"train.epochs", "teacher.views"}
    assert short["train.epochs"] < default["train.epochs"]


def test_every_form_has_a_recipe_that_caches_views_as_it_expects():
    recipes = job.configs(smoke=False)
    assert job.RECIPE.keys() == job.CASE.keys() == set(timing.FORMS)
    for form, recipe in job.RECIPE.items():
        assert bool(recipes[recipe].teacher.views) == (form == "shortcuts")


def test_features_of_the_outlier_suite_are_unit_vectors_in_classes():
    features = outliers.make_features({"classes": 3, "features": 20, "width": 256})
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-6)
    cosines = np.einsum("cnd,kd->ckn", features, features.mean(1)).mean(-1)
    within = np.diag(cosines)
    assert within.min() > 3 * np.abs(cosines - np.diag(within)).max()


def test_a_step_of_full_size_has_batches_of_its_networks():
    args = timing.make_parser("step", "").parse_args([])
    args.batch, args.side, args.teacher_depth, args.teacher_dtype = 3, 64, 2, "float32"
    for name, (recipe, large) in step.OAL.items():
        config, classes, batch = step.oal_problem(recipe, large, args)
        size = config.train.batch_size
        assert all(len(array) == size for array in batch.values()), name
        assert batch["image"].shape[1:] == ((64, 64, 3) if large else (28, 28, 1))
        assert batch["outlier"].shape[1] == config.teacher.width == (768 if large else 128)
        assert batch["label"].max() < classes
        assert ("teacher_logits" in batch) == bool(config.teacher.views)


def example_row(case, framework, seconds, **fields):
    times = {"median_s": seconds, "min_s": 0.9 * seconds, "max_s": 1.2 * seconds, "runs": 5}
    return {"suite": "s", "case": case, "framework": framework, "device": "d", **times, **fields}


def example_rows():
    """Ours and three forms of the twin, another library, and two cases that are ours alone."""
    to_reference = {"reference": [2.5, 2.0, 3.0], "default": [9.0, 8.0, 10.0]}
    to_knn = {"library": "pytorch-ood", "ratios": {"knn": [1.5, 1.1, 2.0]}}
    return [
        example_row("default", "jax", 1.0),
        example_row("reference", "jax", 4.0),
        example_row("reference-official", "torch", 10.0, form="reference", ratios=to_reference),
        example_row("reference", "torch", 5.0, form="tuned", ratios={"reference": [1.2, 1.1, 1.3]}),
        example_row("default", "torch", 0.9, form="shortcuts", ratios={"default": [0.9, 0.8, 1]}),
        example_row("knn", "jax", 0.002),
        example_row("knn", "torch", 0.003, **to_knn),
        example_row("first", "jax", 30.0),
        example_row("again", "jax", 3.0),
    ]


def test_bars_stand_beside_those_they_are_compared_with():
    groups = plots.groups(example_rows())
    cases = {case: [(r["case"], r["framework"]) for r in rows] for case, rows in groups.items()}
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
    assert list(groups)[-1] == ""


def test_no_text_of_the_picture_covers_another_or_leaves_it():
    figure = plots.figure(example_rows())
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


def test_a_picture_is_drawn_beside_the_rows(tmp_path):
    paths = plots.draw(example_rows(), tmp_path / "results.json")
    assert [path.name for path in paths] == ["results.png", "results.svg"]
    assert Image.open(io.BytesIO(paths[0].read_bytes())).size[0] > 800
    assert plots.draw(example_rows(), tmp_path / "again.json")[1].read_bytes() == (
        paths[1].read_bytes()
    )
