"""Run a benchmark suite and write its rows as JSON.

    python -m benchmarks.run --suite NAME --output results.json [flags of the suite]
    python -m benchmarks.run --suite NAME --help

Suites:
  ablation  OAL's objectives and outlier sources, trained and evaluated
  methods   training methods, trained and evaluated
  job       the whole of OAL, against PyTorch
  step      training steps of every method, against PyTorch
  features  forward passes of the teacher, against PyTorch
  outliers  k-NN boundary sampling, against PyTorch and faiss
  latents   Stable Diffusion sampling, against PyTorch
  scores    post-hoc scores and metrics, against pytorch-ood and scikit-learn

Benchmarks are not part of the installed package: run the command in a checkout. A row is an object
with `suite, case, framework, median_s, min_s, max_s, runs, device, versions`. Suites add fields.
"""

import difflib
import json
import os
import platform
import statistics
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from oal_jax.errors import UserError
from oal_jax.runtime import artifacts, writing
from oal_jax.runtime.command import BareParser, guard

SUITES = ("ablation", "features", "job", "latents", "methods", "outliers", "scores", "step")


def row(
    suite: str, case: str, seconds: Sequence[float], framework: str = "jax", **fields: Any
) -> dict[str, Any]:
    """One row of results.json from the seconds of each run. `fields` may replace `device`."""
    return {
        "suite": suite,
        "case": case,
        "framework": framework,
        "median_s": round(statistics.median(seconds), 6),
        "min_s": round(min(seconds), 6),
        "max_s": round(max(seconds), 6),
        "runs": len(seconds),
        "device": fields.pop("device", None) or device(),
        "versions": fields.pop("versions", None) or artifacts.versions(),
        **fields,
    }


def choose(kind: str, flag: str, known: Collection[str]) -> tuple[str, ...]:
    """The names in a comma-separated flag, without repetition.

    Raises:
      UserError: a name that is not known.
    """
    names = tuple(dict.fromkeys(flag.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"{kind} '{name}' is unknown; known: {', '.join(known)}")
    return names


def device() -> str:
    """JAX's accelerators, or the processor and its number of cores."""
    import jax

    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{jax.device_count()} x {first.device_kind}"
    return processor()


def processor() -> str:
    """The processor's model name and its number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def run(argv: Sequence[str]) -> None:
    """Run the suite that the flags name, write its rows, and draw them if the suite can."""
    parser = BareParser("benchmarks.run", __doc__)
    parser.add_argument("--suite", required=True)
    parser.add_argument("--output", type=Path, help="JSON file for the rows; required")
    flags = list(argv[1:])
    help_flags = [flag for flag in flags if flag in ("-h", "--help")]
    if help_flags and any(flag.startswith("--suite") for flag in flags):
        args, _ = parser.parse_known_args([flag for flag in flags if flag not in help_flags])
        _suite(args.suite).run(help_flags)  # prints the suite's flags and exits
    args, rest = parser.parse_known_args(flags)
    if args.output is None:
        raise UserError("--output is required; see --help")
    suite = _suite(args.suite)
    with _exclusive(args.output):
        rows = suite.run(rest)
        artifacts.write_output(args.output, (json.dumps(rows, indent=1) + "\n").encode())
    # Rows on stdout get no other lines.
    stream = sys.stderr if writing.is_stdout(args.output) else sys.stdout
    print(f"{len(rows)} rows: {args.output}", file=stream)
    if hasattr(suite, "draw") and writing.is_replaced(args.output):
        print("pictures:", *suite.draw(rows, args.output), file=stream)


def _suite(name: str) -> Any:
    if name not in SUITES:
        nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
        raise UserError(f"suite '{name}' is unknown; nearest: '{nearest}'")
    return import_module(f"benchmarks.{name}")


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Hold a lock on the output. Raises `UserError` if it is taken or cannot be written."""
    if not writing.is_replaced(output):
        yield
        return
    lock = output.with_name(f".{output.name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error})") from None
    busy = f"another suite writes --output {output}; wait for it, or choose another file"
    with writing.alone(lock, busy):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
