"""Timing jobs of two frameworks in turns: flags, rows, ratios and memory."""

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

from benchmarks.run import choose, processor, row
from benchmarks.run import device as jax_device
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts
from oal_jax.runtime.command import BareParser

FRAMEWORKS = ("jax", "torch")
FORMS = ("reference", "tuned", "shortcuts")  # of the PyTorch twin; see torch_twin.forms
_LONG = 10  # seconds; longer runs are printed when they end
_LIBRARIES = (
    *("torch", "torchvision", "timm", "diffusers", "transformers", "faiss-cpu"),
    *("pytorch-ood", "scikit-learn"),
)


class Job(NamedTuple):
    """Something to time.

    Attributes:
      case: name of the row.
      framework: "jax" or "torch".
      run: does the work and waits for its result.
      against: cases of JAX that it is compared with. Empty: a PyTorch job is compared with the case
        of its own name, a JAX job with none.
      fields: further fields of the row.
      items: images, latents, ... that a call handles, for the field `per_s`.
    """

    case: str
    framework: str
    run: Callable[[], Any]
    against: tuple[str, ...] = ()
    fields: Mapping[str, Any] = MappingProxyType({})
    items: int = 0


def make_parser(suite: str, doc: str, runs: int = 5, *, twin: bool = True) -> BareParser:
    """A parser with the shared flags. With `twin`, also those of the PyTorch twin."""
    parser = BareParser(f"benchmarks.run --suite {suite}", doc)
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS))
    parser.add_argument("--runs", type=int, default=runs, help="counted runs, after one warm-up")
    parser.set_defaults(device="auto")
    if twin:
        parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        parser.add_argument("--forms", default=",".join(FORMS), help="of the PyTorch twin")
        dtypes = {"default": "float32", "choices": ("float32", "bfloat16")}
        parser.add_argument("--twin-dtype", help="autocast type of the fast forms", **dtypes)
        parser.add_argument("--twin-eager", action="store_true", help="no torch.compile")
    return parser


def add_teacher_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the suites that run the JAX teacher."""
    parser.add_argument(
        "--teacher-dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="type of the JAX teacher's products",
    )


def settle(args: argparse.Namespace, modules: Sequence[str] = ("torch", "timm")) -> None:
    """Check and resolve the shared flags in place, before a framework starts.

    Afterwards `frameworks` and `forms` are tuples and `device` is "cpu" or "cuda" if PyTorch runs.
    Without one of `modules` the JAX half runs alone; one printed line says so.

    Raises:
      UserError: an unknown framework or form, no runs, or a device that is missing.
    """
    args.frameworks = choose("framework", args.frameworks, FRAMEWORKS)
    if "forms" in args:
        args.forms = choose("form", args.forms, FORMS)
    if args.runs < 1:
        raise UserError(f"--runs {args.runs} must be 1 or more")
    # Both frameworks share the accelerator's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if "torch" in args.frameworks and missing:
        print(f'{", ".join(missing)} missing (pip install ".[bench]"): JAX runs alone')
        args.frameworks = ("jax",) if "jax" in args.frameworks else ()
    if "jax" in args.frameworks:
        _settle_jax(args)
    if "torch" in args.frameworks:
        _settle_torch(args)


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
    if "twin_eager" in args and not args.twin_eager and not can_compile(args.device):
        print("no C++ compiler: the PyTorch twin runs without torch.compile")
        args.twin_eager = True
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def can_compile(device: str) -> bool:
    """Whether torch.compile works. On CPU it needs a C++ compiler."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    return device != "cpu" or any(shutil.which(name) for name in compilers if name)


def measure(suite: str, jobs: Sequence[Job], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the jobs in turns, print a line each, and return a row each.

    The first turn is a warm-up: its length is the field `warm_up_s`, and what it exceeds the median
    of the other turns by is `compile_s`. Compared rows have `ratios`: case of JAX to the median,
    least and greatest ratio of the row's time to that case's time in the same turn.
    """
    seconds: list[list[float]] = [[] for _ in jobs]
    for turn in range(args.runs + 1):
        for times, job in zip(seconds, jobs, strict=True):
            start = time.perf_counter()
            job.run()
            times.append(time.perf_counter() - start)
            if times[-1] > _LONG:
                turns = f"turn {turn} of {args.runs}"
                print(f"{turns}: {job.case}, {job.framework}: {times[-1]:.1f} s", flush=True)
    ours = {j.case: t[1:] for j, t in zip(jobs, seconds, strict=True) if j.framework == "jax"}
    rows = []
    for job, (first, *times) in zip(jobs, seconds, strict=True):
        median = float(np.median(times))
        fields = {
            "warm_up_s": round(first, 6),
            "compile_s": round(max(0.0, first - median), 6),
            **where(job.framework, args.device),
            **job.fields,
        }
        if job.items:
            fields["per_s"] = round(job.items / median, 3)
        if job.framework != "jax" or job.against:
            against = [case for case in job.against or (job.case,) if case in ours]
            fields["ratios"] = {case: _ratio(times, ours[case]) for case in against}
        rows.append(row(suite, job.case, times, job.framework, **fields))
        print(_line(rows[-1]), flush=True)
    return rows


def _ratio(times: Sequence[float], ours: Sequence[float]) -> list[float]:
    each = np.divide(times, ours)
    return [round(float(x), 3) for x in (np.median(each), each.min(), each.max())]


def _line(row: Mapping[str, Any]) -> str:
    rate = f"  {row['per_s']:10.1f} /s" if "per_s" in row else ""
    ratios = "".join(
        f"  {median:.2f} x {case} in JAX ({low:.2f} to {high:.2f})"
        for case, (median, low, high) in row.get("ratios", {}).items()
    )
    times = f"{row['median_s']:10.4f} s ({row['min_s']:.4f} to {row['max_s']:.4f})"
    start = f"  + {row['compile_s']:.1f} s at the start"
    return f"{row['case']:28s} {row['framework']:6s} {times}{start}{rate}{ratios}"


def where(framework: str, device: str) -> dict[str, Any]:
    """The fields `device` and `versions` of a framework's rows."""
    if framework == "jax":
        return {"device": jax_device(), "versions": artifacts.versions()}
    import torch

    versions = {
        name: importlib.metadata.version(name)
        for name in _LIBRARIES
        if importlib.util.find_spec(_module_of(name))
    }
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {"device": name, "versions": versions}


def _module_of(package: str) -> str:
    modules = {"faiss-cpu": "faiss", "pytorch-ood": "pytorch_ood", "scikit-learn": "sklearn"}
    return modules.get(package, package)


def python(arguments: Sequence[str], **environment: str) -> str:
    """Run Python in a new process that can import this checkout, and return what it printed.

    Raises:
      UserError: it failed; the message has the last line that it printed.
    """
    path = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    process = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        output = process.stderr.strip() or process.stdout.strip() or "it printed nothing"
        command = f"python {' '.join(arguments[:2])}"
        raise UserError(f"{command} failed ({process.returncode}): {output.splitlines()[-1]}")
    return process.stdout


def peak_growth(job: Callable[[], Any]) -> int:
    """Bytes by which a job raises the peak resident memory of this process. Linux only.

    Freed memory that the C library holds is returned first. So a second run of the job shows what
    the job itself takes, without compilation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    job()
    return max(0, _memory("VmHWM") - before)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
