"""Suite `startup`: how long it takes until something happens.

    python -m benchmarks.run --suite startup --output results.json [--frameworks jax,torch]
        [--cases help,imports,first,second,again] [--runs 5] [--config configs/fashion.py]
        [--config.a.b=VALUE ...]

Every run is a process of its own. `help`: `python -m oal_jax.main --help`. `imports`: of all that
our main command imports before its first stage, and for PyTorch of what the twin does. `first`:
the main job (by default with smoke=True) in a new directory and with an empty compilation cache;
`second`: the same in another new directory with the cache that the first filled; `again`: in the
first directory, where everything is done. Rows of the last three have `compile_s`, what JAX spent
on tracing, lowering and compiling (reading the cache counts), and `compile_share` of the time.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.plots import draw as draw
from benchmarks.timing import Job
from oal_jax.errors import UserError

CASES = ("help", "imports", "first", "second", "again")
_IMPORTS = {
    "jax": "import oal_jax.main, oal_jax.stages.run, oal_jax.stages.train, oal_jax.stages.latents",
    "torch": "import torch, timm, diffusers, transformers",
}


class Starts:
    """The main job, each start in a process of its own; caches and directories of one turn."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder, self.arguments = folder, arguments
        self.compile_s: dict[str, list[float]] = {}

    def take(self, case: str) -> Callable[[], None]:
        """A function that makes the start of a case; "first" comes first in every turn."""
        kept = self.compile_s.setdefault(case, [])

        def start() -> None:
            if case == "first":
                self.turn = Path(tempfile.mkdtemp(dir=self.folder))
            workdir = self.turn / ("second" if case == "second" else "first")
            output = self.turn / "compile_s.json"
            cache = {
                "JAX_COMPILATION_CACHE_DIR": str(self.turn / "cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            command = ["-m", "benchmarks.startup", str(output), f"--workdir={workdir}"]
            timing.python([*command, *self.arguments], **cache)
            kept.append(json.loads(output.read_text()))

        return start


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the starts in turns; print them; return the rows."""
    parser = timing.parser("startup")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--config", type=Path, default=Path("configs/fashion.py"))
    args, overrides = parser.parse_known_args(argv)
    timing.settle(args, ("torch", "timm", "diffusers"))
    cases = args.cases.split(",")
    for case in cases:
        if case not in CASES:
            raise UserError(f"case '{case}' is unknown; known: {', '.join(CASES)}")
    if {"second", "again"} & set(cases):
        cases = ["first", *cases]  # whose cache and directory they use
    if not any(given.startswith("--config.smoke") for given in overrides):
        overrides = ["--config.smoke=True", *overrides]
    with tempfile.TemporaryDirectory() as scratch:
        starts = Starts(Path(scratch), [f"--config={args.config}", *overrides])
        jobs = [
            Job(case, framework, _job(case, framework, starts))
            for case in CASES
            for framework in args.frameworks
            if case in cases and (framework == "jax" or case == "imports")
        ]
        rows = timing.measure("startup", jobs, args)
    for row in rows:
        del row["compile_s"]  # every run is a start
        if row["case"] in starts.compile_s:
            row["compile_s"] = round(float(np.median(starts.compile_s[row["case"]][1:])), 6)
            row["compile_share"] = round(row["compile_s"] / row["median_s"], 4)
            print(f"{row['case']}: {100 * row['compile_share']:.0f} % of it makes programs")
    return rows


def _job(case: str, framework: str, starts: Starts) -> Callable[[], None]:
    if case == "help":
        return lambda: timing.python(["-m", "oal_jax.main", "--help"])
    if case == "imports":
        # Or diffusers and transformers import JAX too, where it is installed.
        alone = {"USE_FLAX": "0"} if framework == "torch" else {}
        return lambda: timing.python(["-c", _IMPORTS[framework]], **alone)
    return starts.take(case)


def main(argv: Sequence[str]) -> None:
    """One start of the main job with flags `argv[2:]`; `argv[1]` gets what compilation took."""
    from benchmarks.compilation import CompilationTime

    spent = CompilationTime()
    from oal_jax import main as command

    command.run(["run", *argv[2:]])
    Path(argv[1]).write_text(json.dumps(spent.seconds))


if __name__ == "__main__":
    main(sys.argv)
