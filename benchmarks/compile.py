"""Suite `compile`: training steps and the latents' sampling, compiled for TPU slices and H100.

    pip install ".[tpu,cuda12]"
    python -m benchmarks.run --suite compile --output results.json [--cases PREFIX,PREFIX]
        [--workdir runs/compile]

No TPU, no GPU, no data and no weights are needed; each case is `python -m oal_jax.compile` in a
process of its own, minutes long. Its result is kept in the working directory, so that a suite that
was cut off goes on where it was, and so that cases can be compiled in two environments, one an
extra. Prints a table; the seconds of a row are those of the compilation.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import markdown
from benchmarks.run import row
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts

_DEVICES = {"v5e:2x2": 4, "v5e:16x16": 256, "v4:2x2x1": 4, "h100:8": 8}
_CONFIGS = ("cifar10", "cifar100", "imagenet1k")
# Microbatches that a batch of 4096 passes in: what the memory of these devices asks for. On 256
# chips, of which each has 16 images then, it is the only batch.
_LARGE, _MICROBATCHES = 4096, {"v5e:2x2": 16, "v4:2x2x1": 8, "h100:8": 1}
# CLUB as shipped pairs the whole batch at once; the energy loss takes microbatches.
_ENERGY = ["--config.method.micl=energy", "--config.outliers.source=diffusion"]


def _cases() -> dict[str, list[str]]:
    """Name to the arguments of `oal_jax.compile`."""
    cases = {}
    for topology, devices in _DEVICES.items():
        for config in _CONFIGS:
            batch = 128 if devices < 128 else _LARGE
            cases[f"train {config} {topology}"] = _train(config, topology, batch)
        if topology in _MICROBATCHES:
            more = f"--config.train.accumulate={_MICROBATCHES[topology]}"
            arguments = [*_train("cifar10", topology, _LARGE), *_ENERGY, more]
            cases[f"train cifar10 {topology} {_LARGE}"] = arguments
        # One latent of 64 x 64 a device, or four: the default bounds the memory of a laptop.
        each = 4 if devices < 128 else 1
        cases[f"latents cifar10 {topology}"] = [
            *_of("cifar10", topology),
            "--stage=latents",
            "--config.generator.dtype=bfloat16",
            f"--config.latents.chunk={64 * each * devices}",
        ]
    return cases


def _train(config: str, topology: str, batch: int) -> list[str]:
    streamed = ["--config.data.stream=True"] if config == "imagenet1k" else []  # 193 GB of bytes
    return [*_of(config, topology), f"--config.train.batch_size={batch}", *streamed]


def _of(config: str, topology: str) -> list[str]:
    return [f"--config=configs/{config}.py", f"--topology={topology}"]


CASES = _cases()


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Compile the cases; print the table; return the rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.run --suite compile")
    parser.add_argument("--cases", default="train,latents", help="names, or how they begin")
    parser.add_argument("--workdir", type=Path, default=Path("runs") / "compile")
    args = parser.parse_args(argv)
    wanted = args.cases.split(",")
    for name in wanted:
        if not any(case.startswith(name) for case in CASES):
            raise UserError(f"case '{name}' is unknown; known: {', '.join(CASES)}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process: it only asks for the host's name
    names = [case for case in CASES if case.startswith(tuple(wanted))]
    found = {name: _compiled(name, args.workdir) for name in names}
    print(table(found))
    return [row("compile", name, [r["compile_s"] or 0.0], **r) for name, r in found.items()]


def _compiled(name: str, workdir: Path) -> dict[str, Any]:
    """The object that the command prints for a case, from an earlier call if there is one."""
    path = workdir / f"{name.replace(' ', '_').replace(':', '_')}.json"
    if path.exists():
        return artifacts.read_json(path)
    print(f"--- {name}", flush=True)
    argv = [sys.executable, "-m", "oal_jax.compile", *CASES[name]]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads(done.stdout.splitlines()[-1])
    artifacts.write_json(path, result)
    return result


_HEAD = (
    *("program", "devices", "batch", "GFLOP a device", "arguments, GB", "temporary, GB"),
    *("peak, GB", "fits", "messages a step", "estimated step, ms", "bound by"),
)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a case."""
    lines = []
    for name, result in results.items():
        estimate = result["estimate"] or {}
        sizes = [result[f"{key}_bytes"] for key in ("argument", "temp", "peak")]
        lines.append(
            [
                name,
                str(result["devices"]),
                str(result["batch"]),
                f"{result['flops_per_device'] / 1e9:.1f}",
                *("?" if size is None else f"{size / 1e9:.2f}" for size in sizes),
                {True: "yes", False: "no", None: "?"}[result["fits"]],
                _messages(result["collectives"]),
                f"{1000 * estimate['step_s']:.3g}" if estimate else "?",
                estimate.get("bound_by", "?"),
            ]
        )
    return markdown(_HEAD, lines)


def _messages(collectives: Mapping[str, Mapping[str, float]] | None) -> str:
    if not collectives:
        return "?" if collectives is None else "none"
    return ", ".join(
        f"{c['count']:g} {kind}, {c['bytes'] / 1e6:.1f} MB" for kind, c in collectives.items()
    )
