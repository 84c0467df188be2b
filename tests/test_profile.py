"""`--profile`: which stages leave a trace, what is in it, and a folder that cannot be written."""

import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from oal_jax import main
from oal_jax.runtime import artifacts, profile
from oal_jax.stages import run as pipeline

CONFIG = Path(__file__).parent.parent / "configs" / "fashion.py"


@jax.jit
def steady_part(x):
    return jnp.linalg.eigvalsh(x)


@jax.jit
def first_part(x):
    return jnp.linalg.svd(x)[1]


def compute(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        steady_part(jnp.eye(40)).block_until_ready()


def file_in(folder: Path) -> Path:
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    return file


def names_in(folder: Path) -> set[str]:
    """Names of the events in the one trace of a folder."""
    planes = jax.profiler.ProfileData.from_file(str(file_in(folder))).planes
    return {event.name for plane in planes for line in plane.lines for event in line.events}


@pytest.fixture
def stages(monkeypatch):
    """Stages of the pipeline that compute briefly and write one small file each."""

    def stage(name):
        def run(context):
            compute(0.05)
            path = context.directory(name) / "out.safetensors"
            artifacts.write_tensors(path, {"n": jnp.zeros(1)})
            return [path]

        return SimpleNamespace(run=run)

    monkeypatch.setattr(pipeline, "import_module", lambda path: stage(path.rpartition(".")[2]))


def command(workdir: Path, *flags: str) -> int:
    flags = ("--config.method.name=ce", *flags)
    argv = ["oal_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    return main.guard(main.run, argv)


def test_each_stage_that_runs_leaves_a_trace(stages, tmp_path):
    folder = tmp_path / "profile"
    assert command(tmp_path, "--stage=train") == 0
    assert not folder.exists()
    assert command(tmp_path, "--stage=evaluate", "--profile") == 0
    assert [path.name for path in folder.iterdir()] == ["evaluate"]
    assert any("steady_part" in name for name in names_in(folder / "evaluate"))
    first = file_in(folder / "evaluate").stat().st_mtime_ns
    # A second run replaces the traces of the stages that it runs and no others.
    assert command(tmp_path, "--stage=evaluate", "--profile") == 0
    assert file_in(folder / "evaluate").stat().st_mtime_ns == first
    options = ("--config.evaluation.scores=energy", "--config.evaluation.batch_size=7")
    assert command(tmp_path, "--stage=evaluate", "--profile", "--force", *options) == 0
    assert file_in(folder / "evaluate").stat().st_mtime_ns > first
    assert [path.name for path in folder.iterdir()] == ["evaluate"]


@pytest.mark.slow  # waits, so that a busy machine passes too
def test_a_complete_later_window_replaces_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "WINDOW", 1.0)
    monkeypatch.setattr(profile, "STARTS", (0.0, 4.0, 1000.0))
    x = jnp.eye(40)
    jax.block_until_ready((first_part(x), steady_part(x)))
    with profile.trace(tmp_path / "train"):
        first_part(x).block_until_ready()
        time.sleep(2.0)
        compute(8.0)
    names = names_in(tmp_path / "train")
    assert any("steady_part" in name for name in names)
    assert not any("first_part" in name for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_run_outlives_a_trace_that_cannot_be_taken(tmp_path, capsys):
    with jax.profiler.trace(tmp_path / "other"), profile.trace(tmp_path / "train"):
        time.sleep(0.1)
    assert "train" in capsys.readouterr().out


def test_a_file_in_the_way_is_one_line(stages, tmp_path, capsys):
    (tmp_path / "profile").write_text("")
    assert command(tmp_path, "--stage=train", "--profile") == 2
    err = capsys.readouterr().err
    assert "profile" in err and err.count("\n") == 1
