"""What the suites share that compare two frameworks: flags, turns, rows, the table."""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks.run import device as jax_device
from benchmarks.run import row
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts

FRAMEWORKS = ("jax", "torch")
FORMS = ("reference", "tuned", "shortcuts")  # of the twin; see benchmarks.torch_twin.forms
_LONG = 10  # seconds of a run, above which it is told of when it ends
_LIBRARIES = ("torch", "torchvision", "timm", "diffusers", "transformers", "faiss-cpu")


class Job(NamedTuple):
    """Something to time: `run()` does all of it and waits for the result."""

    case: str
    framework: str
    run: Callable[[], Any]
    # Cases of JAX that it is compared with; empty: of PyTorch its own, of JAX none.
    against: tuple[str, ...] = ()
    more: Mapping[str, Any] = MappingProxyType({})  # further fields of its row
    items: int = 0  # a call handles so many (images, latents): the row has `per_s`


def parser(suite: str, runs: int = 5) -> argparse.ArgumentParser:
    """A parser with the flags that these suites share."""
    made = argparse.ArgumentParser(prog=f"benchmarks.run --suite {suite}")
    made.add_argument("--frameworks", default=",".join(FRAMEWORKS))
    made.add_argument("--forms", default=",".join(FORMS), help="of the PyTorch twin")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--runs", type=int, default=runs, help="that count; one more warms up")
    made.add_argument(
        "--twin-dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the fast forms' products in PyTorch (autocast)",
    )
    made.add_argument("--twin-eager", action="store_true", help="no torch.compile in any form")
    return made


def add_teacher_dtype(parser: argparse.ArgumentParser) -> None:
    """The flag of the suites that run our teacher."""
    parser.add_argument(
        "--teacher-dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of our teacher's products; those of the twin: --twin-dtype",
    )


def settle(args: argparse.Namespace, needs: Sequence[str] = ("torch", "timm")) -> None:
    """Check and resolve the shared flags in place, before either framework starts.

    Afterwards `frameworks` and `forms` are tuples, without "torch" where one of the modules `needs`
    is missing (said in one line), and `device` is "cpu" or "cuda".

    Raises:
      UserError: an unknown framework or form, no runs, or no such device.
    """
    args.frameworks = _chosen("framework", args.frameworks, FRAMEWORKS)
    args.forms = _chosen("form", args.forms, FORMS)
    if args.runs < 1:
        raise UserError(f"--runs {args.runs} must be 1 or more")
    # Both frameworks share the accelerator's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if "torch" in args.frameworks and missing:
        print(f'{", ".join(missing)} missing (pip install ".[bench]"): our half runs alone')
        args.frameworks = tuple(f for f in args.frameworks if f != "torch")
    if "jax" in args.frameworks:
        _settle_jax(args)
    if "torch" in args.frameworks:
        _settle_torch(args)


def _chosen(kind: str, given: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(given.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"{kind} '{name}' is unknown; known: {', '.join(known)}")
    return names


def _settle_jax(args: argparse.Namespace) -> None:
    import jax

    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if args.device == "cuda" and jax.default_backend() != "gpu":
        raise UserError('--device cuda: JAX sees no GPU; pip install ".[cuda12]", or --device cpu')


def _settle_torch(args: argparse.Namespace) -> None:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; install its CUDA build")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.twin_eager and not can_compile(args.device):
        print("no C++ compiler: torch.compile is left out, every form of the twin runs eagerly")
        args.twin_eager = True
    torch.set_num_threads(cores())


def can_compile(device: str) -> bool:
    """Whether torch.compile can work: on CPU it needs a C++ compiler."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    return device != "cpu" or any(shutil.which(name) for name in compilers if name)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def measure(suite: str, jobs: Sequence[Job], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the jobs in turns; print a line each, with ratios; a row each.

    The first turn does not count: its length is the row's `warm_up_s`, and what it takes longer
    than the median of the others is `compile_s`. Rows that are compared with one of JAX have
    `ratios`: case of JAX to the median, least and greatest of their times over its times, turn by
    turn.
    """
    seconds: list[list[float]] = [[] for _ in jobs]
    for turn in range(args.runs + 1):
        for times, job in zip(seconds, jobs, strict=True):
            start = time.perf_counter()
            job.run()
            times.append(time.perf_counter() - start)
            if times[-1] > _LONG:
                print(
                    f"turn {turn} of {args.runs}: {job.case}, {job.framework}: {times[-1]:.1f} s",
                    flush=True,
                )
    return rows_of(suite, jobs, seconds, args.device)


def rows_of(
    suite: str, jobs: Sequence[Job], seconds: Sequence[Sequence[float]], device: str
) -> list[dict[str, Any]]:
    """The rows of `measure`, printed too; the first time of each job is its warm-up."""
    counted = [times[1:] for times in seconds]
    ours = {j.case: t for j, t in zip(jobs, counted, strict=True) if j.framework == "jax"}
    rows = []
    for job, times in zip(jobs, counted, strict=True):
        first, middle = seconds[len(rows)][0], float(np.median(times))
        more = {
            "warm_up_s": round(first, 6),
            "compile_s": round(max(0.0, first - middle), 6),
            **where(job.framework, device),
            **job.more,
        }
        if job.items:
            more["per_s"] = round(job.items / middle, 3)
        if job.framework != "jax" or job.against:
            more["ratios"] = {
                case: _ratio(times, ours[case])
                for case in job.against or (job.case,)
                if case in ours
            }
        rows.append(row(suite, job.case, times, job.framework, **more))
        print(_line(rows[-1]), flush=True)
    return rows


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    each = np.divide(theirs, ours)
    return [round(float(x), 3) for x in (np.median(each), each.min(), each.max())]


def _line(row: dict[str, Any]) -> str:
    rate = f"  {row['per_s']:10.1f} /s" if "per_s" in row else ""
    ratios = "".join(
        f"  {middle:.2f} x ours ({low:.2f} to {high:.2f})"
        + (f" of {case}" if case != row["case"] else "")
        for case, (middle, low, high) in row.get("ratios", {}).items()
    )
    times = f"{row['median_s']:10.4f} s ({row['min_s']:.4f} to {row['max_s']:.4f})"
    start = f"  + {row['compile_s']:.1f} s at the start"
    return f"{row['case']:28s} {row['framework']:6s} {times}{start}{rate}{ratios}"


def where(framework: str, device: str) -> dict[str, Any]:
    """The fields `device` and `versions` of a row of a framework."""
    if framework == "jax":
        return {"device": jax_device(), "versions": artifacts.versions()}
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {"device": name, "versions": torch_versions()}


def processor() -> str:
    """The processor and its cores, as `benchmarks.run.device` names them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else os.uname().machine}, {os.cpu_count()} cores"


def torch_versions() -> dict[str, str]:
    """Versions of PyTorch and of what the twin takes from others."""
    found = {}
    for name in _LIBRARIES:
        if importlib.util.find_spec(name.partition("-")[0]):
            found[name] = importlib.metadata.version(name)
    return found


def python(arguments: Sequence[str], **environment: str) -> str:
    """Run Python in a process of its own, with this package on its path; what it printed.

    Raises:
      UserError: it failed; the last line that it printed.
    """
    path = (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()
        raise UserError(f"python {' '.join(arguments[:2])} failed ({done.returncode}): {said[-1]}")
    return done.stdout


def peak_growth(job: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of this process grows at most while a job runs.

    For a process of its own. What the C library has kept of freed memory is given back first, so
    that after one run of the job another one shows what it takes, and compilation does not count.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory("VmRSS")
    job()
    return max(0, _memory("VmHWM") - before)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
