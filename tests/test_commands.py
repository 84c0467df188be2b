"""The commands as one program, `oal-jax`: which there are, and what they share."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import oal_jax
from oal_jax import __main__ as program
from oal_jax.runtime.command import guard

ROOT = Path(__file__).parents[1]


def run(capsys, *arguments):
    """(exit code, stdout, lines on stderr)."""
    try:
        code = guard(program.run, ["oal-jax", *arguments])
    except SystemExit as stopped:  # of argparse's --help
        code = stopped.code or 0
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, []) and all(name in out for name in program.COMMANDS)


@pytest.mark.parametrize("command", program.COMMANDS)
def test_each_command_has_help(capsys, command):
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, []) and "--" in out


def test_the_version_is_that_of_the_package(capsys):
    assert run(capsys, "--version") == (0, f"oal-jax {oal_jax.__version__}\n", [])
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited[1].strip("\"'") == oal_jax.__version__


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "command 'trian' is unknown; nearest: train"),
        (["x"], "command 'x' is unknown; known: train, score"),
        (["train"], "--config is missing"),
        (["score", "--workdir=x", "--images=x", "--output=x", "--batchsize=3"], "--batch-size"),
        (["export", "--workdir=x", "--output=x", "--platform=cpu"], "nearest: --platforms"),
        (["bench", "--suite=stpe", "--output=x"], "nearest: 'step'"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert (code, out, len(err)) == (2, "", 1) and said in err[0]


def test_a_reader_that_ends_early_is_one_line():
    command = f"{sys.executable} -m oal_jax train --help | true; exit ${{PIPESTATUS[0]}}"
    child = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert child.returncode == 1 and child.stderr.count("\n") == 1, child.stderr


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "oal_jax", "train", "--config", "fashion", "--help", "seed"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "--config.seed=0" in child.stdout
