"""`oal-jax COMMAND ...`, the same as `python -m oal_jax COMMAND ...`.

  train     train and test a detector (oal_jax.main)
  score     score image files with a detector (oal_jax.score)
  export    write a detector that runs without oal_jax (oal_jax.export)
  compile   compile a program for devices that need not be there (oal_jax.compile)
  bench     run a benchmark suite; in a checkout of the sources (benchmarks.run)

`oal-jax COMMAND --help` describes a command, `oal-jax --version` prints the version.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from oal_jax import __version__
from oal_jax.errors import UserError
from oal_jax.runtime.command import guard

COMMANDS = {
    "train": "oal_jax.main",
    "score": "oal_jax.score",
    "export": "oal_jax.export",
    "compile": "oal_jax.compile",
    "bench": "benchmarks.run",
}


def run(argv: Sequence[str]) -> None:
    """Run the command that the first argument names with the others."""
    command, *rest = argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        return print(__doc__)
    if command == "--version":
        return print(f"oal-jax {__version__}")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"nearest: {near[0]}" if near else f"known: {', '.join(COMMANDS)}"
        raise UserError(f"command '{command}' is unknown; {hint}")
    if command == "bench":
        _find_benchmarks()
    return import_module(COMMANDS[command]).run([f"oal-jax {command}", *rest])


def _find_benchmarks() -> None:
    """Make the benchmarks importable that lie beside the package in a checkout."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks" / "run.py").is_file() or not (checkout / "configs").is_dir():
        raise UserError(
            "benchmarks are not part of the installed package; run oal-jax bench from a checkout of"
            " the sources, installed with pip install -e ."
        )
    sys.path.insert(0, str(checkout))


def main() -> int:
    """The console script `oal-jax`; its exit code."""
    return guard(run, sys.argv)


if __name__ == "__main__":
    sys.exit(main())
