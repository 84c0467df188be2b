"""The command: what it refuses and in what words, exit codes, signals, what it imports."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from oal_jax import main
from oal_jax.config import Config, flatten
from oal_jax.errors import UserError

FASHION = str(Path(__file__).parents[1] / "configs" / "fashion.py")


def run(capsys, *arguments, config=FASHION):
    """(exit code, lines on stderr) of the command."""
    code = main.guard(main.run, ["main", *(["--config", config] if config else []), *arguments])
    return code, capsys.readouterr().err.splitlines()


def refusal(capsys, *arguments, config=FASHION):
    """The one line with which the command refuses."""
    code, lines = run(capsys, *arguments, config=config)
    assert code == 2
    assert len(lines) == 1
    return lines[0].removeprefix("oal_jax: ")


def test_workdirs_that_do_not_do_are_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = str(tmp_path / "file" / "run")
    assert "is not a writable directory" in refusal(capsys, "--workdir", workdir)
    flat = flatten(Config()) | {"seed": 7}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").write_text("{}")
    said = refusal(capsys, "--workdir", str(tmp_path), "--config.method.name=ce")
    assert "seed was 7, now 0" in said and "--force" in said


def test_exit_codes(capsys):
    from oal_jax.training.loop import Preempted, TrainingFailed

    for error, code in [
        (UserError("two\nlines"), 2),
        (TrainingFailed("loss is nan at step 3"), 1),
        (Preempted("stopped"), 143),
        (KeyboardInterrupt(), 130),
    ]:

        def command(_, error=error):
            raise error

        assert main.guard(command, []) == code
        assert capsys.readouterr().err.count("\n") == 1
    assert main.guard(lambda _: None, []) == 0


def environment(cache):
    """Environment of a child process with a compilation cache of a user's own."""
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return {
        **inherited,
        "JAX_NUM_CPU_DEVICES": "1",
        "XDG_CACHE_HOME": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


TRAIN = [
    *(sys.executable, "-m", "oal_jax.main", "--config", FASHION, "--stage", "train"),
    *("--config.method.name=ce", "--config.data.train_images=256", "--config.train.batch_size=32"),
    *("--config.train.epochs=24", "--config.train.log_every=3", "--config.student.width=4"),
]


def rows(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(workdir):
    return max((row["step"] for row in rows(workdir)), default=0)


def stop(command, workdir, env, number):
    """(exit code, stderr) of the command, sent a signal when it has logged one more epoch."""
    before = last_step(workdir)
    with (workdir.parent / "stderr").open("w+") as err:
        child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=err)
        try:
            deadline = time.monotonic() + 240
            while last_step(workdir) < before + 8:
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            child.send_signal(number)
            code = child.wait(60)
        finally:
            child.kill()
            child.wait()
        err.seek(0)
        return code, err.read()


@pytest.mark.slow
def test_signals_stop_the_command_and_it_goes_on_to_the_same_bits(tmp_path):
    env = environment(tmp_path / "cache")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    child = subprocess.run([*TRAIN, "--workdir", str(whole)], env=env, capture_output=True)
    assert child.returncode == 0, child.stderr
    assert any(tmp_path.glob("cache/oal_jax/programs/*/jit_*-cache"))
    command = [*TRAIN, "--workdir", str(stopped)]
    for number, expected, message in [
        (signal.SIGTERM, 143, r"oal_jax: train: stopped by SIGTERM at step \d+, which was saved"),
        (signal.SIGINT, 130, "oal_jax: interrupted; start the same command again to go on"),
    ]:
        code, err = stop(command, stopped, env, number)
        assert code == expected, err
        assert not (stopped / "train" / "manifest.json").exists()
        lines = [line for line in re.split(r"[\r\n]+", err) if line and "train:  " not in line]
        assert len(lines) == 1 and re.match(message, lines[0]), err
    child = subprocess.run(command, env=env, capture_output=True)
    assert child.returncode == 0, child.stderr
    tensors = [
        safetensors.numpy.load_file(d / "train" / "student.safetensors") for d in (whole, stopped)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        np.testing.assert_array_equal(value, tensors[1][name], err_msg=name)
    assert rows(stopped) == rows(whole)
    steps = [row["step"] for row in rows(whole)]
    assert steps == sorted(set(steps)) and steps[-1] == 192


def test_the_command_imports_little_before_its_flags_are_known():
    heavy = ("jax", "diffusers", "transformers", "tensorflow", "torch", "matplotlib", "scipy")
    code = f"import oal_jax.main, sys; print([m for m in {heavy} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_loading_a_detector_imports_what_it_needs():
    heavy = ("orbax", "scipy", "matplotlib", "tensorflow_datasets", "tensorboardX", "grain")
    code = f"import oal_jax.detection.load, sys; print([m for m in {heavy} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_skipping_everything_imports_no_model_library():
    heavy = ("diffusers", "transformers", "tensorflow", "torch", "matplotlib", "flax", "orbax")
    code = "import oal_jax.stages.run, oal_jax.evaluation.tables, oal_jax.main, sys;"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
