"""`--profile`: what is counted as what, the window that is traced, the files, and its absence."""

import csv
import gc
import gzip
import io
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import oal_jax
from oal_jax import main
from oal_jax.config import Config
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts, processes, profiling
from oal_jax.stages import run as pipeline

CONFIG = Path(__file__).parent.parent / "configs" / "fashion.py"
COMPILE = "/jax/core/compile/backend_compile_duration"


def test_spans_count_once_and_only_within_the_time_asked_for():
    spent = profiling.Spent()
    for start, end in ((5, 9), (6, 7), (1, 2), (8, 10)):
        spent(COMPILE, start, end, fun_name="f")
    spent("/jax/checkpoint/write", 0, 100)
    assert spent.seconds == 1 + 5
    assert spent.within(1.5, 6) == 0.5 + 1
    assert spent.within(10, 20) == 0


def test_what_is_under_way_counts_up_to_now():
    spent, now = profiling.Spent(), time.time()
    spent.begin("/jax/checkpoint/write", now - 50)
    assert not spent.making
    spent.begin(COMPILE, now - 3)
    spent.begin(COMPILE, now - 2)  # of a function that it calls
    spent(COMPILE, now - 2, now - 1)
    assert spent.making
    assert spent.within(now - 100, now) == pytest.approx(3)
    assert spent.seconds == pytest.approx(3, abs=1)
    spent(COMPILE, now - 3, now)
    assert not spent.making and spent.seconds == pytest.approx(3)


def stack(*places):
    """The innermost frame of calls, each of a function in a file of the package."""
    frame = "sys._getframe()"
    scope = {"sys": sys}
    for file, name in reversed(places):
        code = f"def {name}():\n    return {frame}"
        exec(compile(code, str(Path(oal_jax.__file__).parent / file), "exec"), scope)
        frame = f"{name}()"
    return eval(frame, scope)


@pytest.mark.parametrize(
    ("places", "part"),
    [
        ([("training/loop.py", "fit")], ""),
        ([("training/loop.py", "fit"), ("stages/train.py", "evaluate")], "evaluation"),
        (
            [("stages/train.py", "evaluate"), ("data/sources.py", "chunks"), ("keys.py", "f")],
            "data",
        ),
        ([("stages/report.py", "run"), ("evaluation/protocol.py", "score")], "evaluation"),
        ([("stages/train.py", "run"), ("training/checkpoints.py", "save")], "files"),
        ([("stages/latents.py", "run"), ("artifacts.py", "write_tensors")], "files"),
        ([("stages/database.py", "run")], ""),
    ],
)
def test_the_innermost_frame_that_tells_says_what_a_stage_is_at(places, part):
    assert profiling.part_of(stack(*places)) == part


def test_a_stack_outside_of_the_package_says_nothing():
    assert profiling.part_of(sys._getframe()) == ""
    assert profiling.part_of(None) == ""


def test_looking_at_a_stack_collects_no_garbage(monkeypatch):
    # In a collection there the other thread goes on, and what is read of its stack is gone.
    looked, amid = [], []

    def collected(phase, info):
        frame = sys._getframe()
        while frame is not None:
            if phase == "start" and frame.f_code is profiling.part_of.__code__:
                amid.append(info)
            frame = frame.f_back

    def part_of(frame):
        looked.append(frame is not None)
        return walk(frame)

    def deep(levels):
        return deep(levels - 1) if levels else time.sleep(0.002)

    walk = profiling.part_of
    monkeypatch.setattr(profiling, "part_of", part_of)
    monkeypatch.setattr(profiling, "_EVERY", 1e-4)
    thresholds, row = gc.get_threshold(), {}
    gc.callbacks.append(collected)
    gc.set_threshold(1)  # at each object, so at each frame that is first looked at
    try:
        with profiling._sampled(profiling.Spent(), row):
            for _ in range(50):
                deep(50)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)
    assert looked
    assert all(looked)
    assert not amid
    assert gc.isenabled()


def test_shares_and_what_is_left_add_up():
    row = {"stage": "train", "status": "ran", "seconds": 6.0, "compile_s": 2.0, "data_s": 1.0}
    found = profiling.summary([row, {"stage": "report", "status": "done already, skipped"}], 8.0)
    train, report, whole = found
    assert (train["share"], train["other_s"], train["evaluation_s"]) == (0.75, 3.0, 0.0)
    assert report == {"stage": "report", "status": "done already, skipped"}
    assert (whole["seconds"], whole["compile_s"], whole["between_s"]) == (8.0, 2.0, 2.0)
    text = profiling.table(found).splitlines()
    assert text[1].split() == [
        *("train", "6.00", "75.0", "%", "2.00", "1.00", "0.00", "0.00", "3.00"),
    ]
    assert text[2].split(maxsplit=1) == ["report", "done already, skipped"]
    assert text[3].endswith("2.00 s between the stages")


@jax.jit
def spectrum_of_the_steady_part(x):
    return jnp.linalg.eigvalsh(x)


def work(seconds: float) -> None:
    """Compile something new, then compute for so long."""
    constant = time.time()  # another program every time
    jax.jit(lambda x: jnp.linalg.svd(x * constant)[1])(jnp.eye(30)).block_until_ready()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 40)))
    spectrum_of_the_steady_part(x).block_until_ready()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        spectrum_of_the_steady_part(x).block_until_ready()


def events(path: Path) -> list[dict]:
    with gzip.open(path, "rb") as file:
        trace = json.load(file)
    assert "metadata" not in trace
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


@pytest.fixture
def profiled(tmp_path):
    """Rows and folder of a profile of a stage that ran and one that was skipped."""
    folder = tmp_path / "profile"
    with profiling.profile(folder, window=0.3) as watch:
        with watch("first", ""):
            work(1.2)
        with watch("second", "done already, skipped"):
            pass
    return json.loads((folder / "stages.json").read_text()), folder


def test_a_stage_has_its_seconds_a_steady_trace_and_files(profiled, capsys):
    (first, second, whole), folder = profiled
    assert (first["status"], second) == (
        "ran",
        {"stage": "second", "status": "done already, skipped"},
    )
    assert 0 < first["compile_s"] <= first["seconds"] - 1.2
    assert first["seconds"] < whole["seconds"]
    parts = sum(first[f"{part}_s"] for part in profiling.PARTS)
    assert parts == pytest.approx(first["seconds"], abs=1e-3)
    # The window is of about the length asked for, and what it shows is the computation.
    found = events(folder / first["trace"])
    names = {event["name"] for event in found}
    assert any("spectrum_of_the_steady_part" in name for name in names)
    span = max(e["ts"] + e["dur"] for e in found) - min(e["ts"] for e in found)
    assert 0.1 < span / 1e6 < 1 and 0.1 < first["trace_s"] < 1
    (recorded,) = (folder / "first").glob("plugins/profile/*/*.xplane.pb")
    planes = {plane.name for plane in jax.profiler.ProfileData.from_file(str(recorded)).planes}
    assert any("CPU" in name for name in planes)
    assert not (folder / ".window").exists()
    kept = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "first" in str(p))
    assert first["trace_bytes"] == kept


def test_the_rows_are_csv_and_pictures_too(profiled):
    rows, folder = profiled
    read = list(csv.DictReader((folder / "stages.csv").read_text().splitlines()))
    assert [row["stage"] for row in read] == ["first", "second", "whole"]
    assert float(read[0]["compile_s"]) == rows[0]["compile_s"]
    assert read[1]["seconds"] == ""
    picture = Image.open(io.BytesIO((folder / "stages.png").read_bytes()))
    assert min(picture.size) > 200 and np.asarray(picture).std() > 1
    svg = (folder / "stages.svg").read_text()
    assert svg.lstrip().startswith("<?xml") and "</svg>" in svg
    assert profiling.pictures(rows)["stages.svg"].decode() == svg


def test_a_run_that_fails_is_told_of_up_to_there(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with profiling.profile(tmp_path, window=0.1) as watch:
            with watch("train", ""):
                _ = 1 / 0
    (row, _) = json.loads((tmp_path / "stages.json").read_text())
    assert (row["stage"], row["status"]) == ("train", "failed")
    assert "failed" in capsys.readouterr().out
    # Nothing listens any more: the next profile counts its own alone.
    assert not any(
        isinstance(listener, profiling.Spent)
        for listener in jax._src.monitoring.get_event_time_span_listeners()
    )


def test_where_no_trace_can_be_taken_the_run_goes_on(tmp_path, capsys):
    with jax.profiler.trace(tmp_path / "other"):  # noqa: SIM117
        with profiling.profile(tmp_path / "profile", window=0.1) as watch:
            with watch("train", ""):
                time.sleep(0.05)
    (row, _) = json.loads((tmp_path / "profile" / "stages.json").read_text())
    assert row["status"] == "ran" and "trace" not in row
    assert "Only one profile may be run at a time" in row["trace_problem"]
    assert row["trace_problem"] in capsys.readouterr().out


def test_a_trace_that_is_too_large_is_taken_again_shorter(tmp_path, monkeypatch):
    lengths, sizes = [], iter([profiling._LARGEST * 2, 10])
    start = jax.profiler.start_trace
    monkeypatch.setattr(profiling, "_size", lambda folder: next(sizes, 10))
    monkeypatch.setattr(
        jax.profiler,
        "start_trace",
        lambda *args, **options: (lengths.append(time.time()), start(*args, **options)),
    )
    with profiling.profile(tmp_path, window=0.6) as watch, watch("train", ""):
        deadline = time.monotonic() + 60
        while len(lengths) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(1.5)
    (row, _) = json.loads((tmp_path / "stages.json").read_text())
    assert len(lengths) == 2
    assert 0.6 * 0.8 / 2 <= row["trace_s"] < 0.6


def test_the_window_is_the_one_after_the_last_large_compilation(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "_NEWS", 0.02)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 40)))

    @jax.jit
    def later_part(x):
        return jnp.linalg.svd(x)[1]

    with profiling.profile(tmp_path, window=0.2) as watch, watch("train", ""):
        work(0.7)
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            later_part(x).block_until_ready()
    names = {event["name"] for event in events(tmp_path / "train.perfetto.json.gz")}
    assert any("later_part" in name for name in names)
    assert not any("spectrum_of_the_steady_part" in name for name in names)


def test_a_window_before_anything_is_made_gives_way_to_a_short_one_after(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "_NEWS", 0.02)
    with profiling.profile(tmp_path, window=0.4) as watch, watch("train", ""):
        time.sleep(1.5)  # as imports and reading do; the window is long over and written
        work(0.3)
    names = {event["name"] for event in events(tmp_path / "train.perfetto.json.gz")}
    assert any("spectrum_of_the_steady_part" in name for name in names)


@pytest.fixture
def stages(monkeypatch):
    """Stages of the pipeline that write one small file each."""

    def stage(name):
        def run(context):
            path = context.directory(name) / "out.safetensors"
            artifacts.write_tensors(path, {"n": np.zeros(1)})
            return [path]

        return SimpleNamespace(run=run)

    monkeypatch.setattr(pipeline, "import_module", lambda path: stage(path.rpartition(".")[2]))


def command(workdir, *flags) -> int:
    method = ["--config.method.name=ce", "--stage=evaluate"]
    argv = ["oal_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *method, *flags]
    return main.guard(main.run, argv)


def test_the_command_profiles_what_runs_and_says_what_is_skipped(stages, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert command(workdir, "--profile") == 0
    rows = json.loads((workdir / "profile" / "stages.json").read_text())
    assert [(r["stage"], r["status"]) for r in rows] == [
        ("train", "ran"),
        ("evaluate", "ran"),
        ("whole", ""),
    ]
    assert all((workdir / "profile" / row["trace"]).exists() for row in rows[:2])
    assert "ui.perfetto.dev" in capsys.readouterr().out
    assert command(workdir, "--profile") == 0
    rows = json.loads((workdir / "profile" / "stages.json").read_text())
    assert [row["status"] for row in rows] == ["done already, skipped"] * 2 + [""]
    assert capsys.readouterr().out.count("done already, skipped") == 4


def test_without_the_flag_nothing_is_imported_or_written(stages, tmp_path, monkeypatch):
    monkeypatch.delattr(oal_jax, "profiling")
    monkeypatch.setitem(sys.modules, "oal_jax.runtime.profiling", None)  # an import would fail
    assert command(tmp_path / "run") == 0
    assert not (tmp_path / "run" / "profile").exists()


def test_of_several_processes_the_first_alone_profiles(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_main", lambda: False)
    assert command(tmp_path / "run", "--profile") == 0
    assert not (tmp_path / "run" / "profile").exists()


def test_a_file_in_the_way_is_one_line(stages, tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "profile").write_text("")
    assert command(workdir, "--profile") == 2
    err = capsys.readouterr().err
    assert "profile is not a writable directory" in err and err.count("\n") == 1


def test_a_watch_is_entered_around_every_stage(stages, tmp_path):
    seen, file = [], tmp_path / "train" / "manifest.json"

    @contextmanager
    def watch(stage, said):
        seen.append((stage, said, file.exists()))
        yield
        seen.append((stage, "left", file.exists()))

    config = Config()
    config.method.name = "ce"
    for _ in range(2):
        pipeline.run(config, tmp_path, only="train", watch=watch)
    assert seen == [
        ("train", "", False),
        ("train", "left", True),
        ("train", "done already, skipped", True),
        ("train", "left", True),
    ]


def test_a_mistaken_value_is_one_line(tmp_path):
    with pytest.raises(UserError, match="profile"):
        main.parse(["oal_jax.main", f"--config={CONFIG}", "--profile=5"])
