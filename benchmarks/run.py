"""`python -m benchmarks.run --suite NAME --output results.json`: run a suite, write its rows.

A row is an object with `suite, case, framework, median_s, min_s, max_s, runs, device, versions`;
suites add fields of their own. Ratios are made of rows of one file.
"""

import argparse
import difflib
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from oal_jax.errors import UserError
from oal_jax.runtime import artifacts
from oal_jax.runtime.command import guard

SUITES = ("ablation", "features", "job", "latents", "methods", "outliers", "scores", "step")


def row(
    suite: str, case: str, seconds: Sequence[float], framework: str = "jax", **more: Any
) -> dict[str, Any]:
    """One row of results.json from the seconds of each run of a case."""
    return {
        "suite": suite,
        "case": case,
        "framework": framework,
        "median_s": round(statistics.median(seconds), 6),
        "min_s": round(min(seconds), 6),
        "max_s": round(max(seconds), 6),
        "runs": len(seconds),
        "device": device(),
        "versions": artifacts.versions(),
        **more,
    }


def device() -> str:
    """Accelerator, or processor and number of cores."""
    import jax

    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{jax.device_count()} x {first.device_kind}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [ln for ln in cpuinfo.read_text().splitlines() if ln.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {os.cpu_count()} cores"


def main(argv: Sequence[str]) -> None:
    """Parse the flags, run the suite, write the file."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--suite", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args, rest = parser.parse_known_args(argv[1:])
    if args.suite not in SUITES:
        near = difflib.get_close_matches(args.suite, SUITES, n=1, cutoff=0.0)
        raise UserError(f"suite '{args.suite}' is unknown; nearest: '{near[0]}'")
    suite = import_module(f"benchmarks.{args.suite}")
    with _alone(args.output):
        rows = suite.run(rest)
        artifacts.write_bytes(args.output, (json.dumps(rows, indent=1) + "\n").encode())
    print(f"{len(rows)} rows: {args.output}")
    if hasattr(suite, "draw"):
        print("pictures:", *suite.draw(rows, args.output))


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """One suite at a time for an output; that it can be written is known before the first run."""
    lock = output.with_name(f".{output.name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error})") from None
    busy = f"another suite writes --output {output}; wait for it, or choose another file"
    with artifacts.alone(lock, busy):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv))
