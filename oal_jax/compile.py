"""`python -m oal_jax.compile --config FILE --topology NAME [--stage NAME] [--config.a.b=VALUE]`.

Compiles the program of a stage ahead of time, for devices that need not be there, from shapes
alone: no data set, no weights. Prints one JSON object.

  --topology  v5e:2x2, v5e:16x16, v4:2x2x1, v5p:2x2x1, v6e:2x2 (TPU slices of any size; extra
              `tpu`), h100:8 (GPUs of one node; extra `cuda12`), cpu:8 (virtual devices)
  --stage     train (default): the training step; latents: the sampling of outlier latents, of
              Stable Diffusion v1 where generator.directory is not there; features: the teacher

Keys, null where the compiler does not tell: `devices` as JAX counts them; for each of them
`argument_bytes`, `temp_bytes`, `peak_bytes`, and whether that `fits` its memory;
`flops_per_device`, of matrix products and convolutions, shared evenly over the devices, beside the
compiler's own count `compiler_flops_per_device`, which takes each loop's body once; `collectives`,
count and bytes by kind, and `origins`, the operations that those other than all-reduce come from;
`host_calls` (none may be there). All but the bytes are a training step's (a call of `train` runs
`steps_per_call` of them), or a chunk's or batch's of the other stages. `estimate`: a roofline of
the chip's published numbers, no measurement.

Exit codes as those of `oal_jax.main`.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from oal_jax import topologies
from oal_jax.config import GENERATED, Config
from oal_jax.config_checks import validate
from oal_jax.errors import UserError
from oal_jax.main import guard, parse
from oal_jax.smoke import shrink

STAGES = ("train", "latents", "features")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(argv: Sequence[str]) -> None:
    """Parse the arguments, compile, print the object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        "oal_jax.compile", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--topology", required=True)
    parser.add_argument("--stage", default="train")
    args, rest = parser.parse_known_args(argv[1:])
    if args.stage not in STAGES:
        raise UserError(f"--stage {args.stage} is not compiled; known: {', '.join(STAGES)}")
    config = read_config(rest)
    topologies.prepare(args.topology)  # JAX starts only now
    print(json.dumps(compile_stage(config, topologies.describe(args.topology), args.stage)))


def read_config(arguments: Sequence[str]) -> Config:
    """The config of `--config FILE --config.a.b=VALUE ...`, as a stage gets it.

    Raises:
      UserError: another flag than these, or anything that is wrong about the config.
    """
    wrong = [a for a in arguments if a.startswith("-") and not re.match(r"--?(no)?config\b", a)]
    if wrong:
        raise UserError(f"unknown flag {wrong[0]}; known: --config, --topology, --stage")
    if not any(re.match(r"--?config(=|$)", a) for a in arguments):
        raise UserError("--config FILE is missing; for example --config configs/fashion.py")
    argv = ["oal_jax.compile", *arguments]
    try:
        config = parse(argv).config
    except UserError:
        # Files that are not there are not read: a trained start has the shapes of a fresh one, and
        # the teacher the sizes in the config.
        unread = ("data.root=unread", "train.start=unread", f"teacher.weights={GENERATED}")
        config = parse([*argv, *(f"--config.{key}" for key in unread)]).config
    if config.smoke:
        config = shrink(config)
        validate(config)
    return config


def compile_stage(config: Config, topology: topologies.Topology, stage: str) -> dict[str, Any]:
    """Lower and compile the program of a stage; the object that the command prints."""
    import jax

    from oal_jax import distributed, program_costs, programs

    mesh = distributed.make_mesh(config.mesh.model, topology.devices)
    program = programs.make(stage, config, mesh, topology.platform)
    start = time.monotonic()
    traced = program.function.trace(*program.arguments)
    lowered = traced.lower()
    traced_at = time.monotonic()
    flops = {k: v / program.repeats for k, v in program_costs.flops(traced.jaxpr).items()}
    result = {
        "topology": topology.name,
        "devices": len(topology.devices),
        "device_kind": topology.devices[0].device_kind,
        "stage": stage,
        "batch": program.batch,
        "steps_per_call": program.repeats,
        "flops_per_device": sum(flops.values()) / len(topology.devices),
        "host_calls": program_costs.host_calls(traced.jaxpr),
        "memory_bytes": topology.chip.memory_bytes if topology.chip else None,
        "lower_s": round(traced_at - start, 1),
    }
    if stage == "latents":
        result["generator"] = programs.generator_of(config)[1]
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = " ".join(str(error).split())[:300]
        return result | _NOTHING | {"fits": False, "compiler": said}
    result["compile_s"] = round(time.monotonic() - traced_at, 1)
    told = _told(compiled.cost_analysis)
    sent = program_costs.collectives(compiled.as_text())
    result |= _memory(_told(compiled.memory_analysis), topology.chip) | {
        "compiler_flops_per_device": told.get("flops"),
        "collectives": _by_kind(sent, program.repeats),
        "origins": sorted({f"{c.kind}: {c.op}" for c in sent if c.kind != "all-reduce"}),
    }
    return result | {"estimate": _roofline(result, flops, told.get("bytes accessed"), topology)}


_MEMORY = ("argument_bytes", "temp_bytes", "peak_bytes", "fits")
_NOTHING = dict.fromkeys(
    (*_MEMORY, "compile_s", "compiler_flops_per_device", "collectives", "origins", "estimate")
)


def _told(ask: Any) -> Any:
    """What the compiler says; {} where it does not (CUDA without a device has no costs)."""
    try:
        return ask() or {}
    except (NotImplementedError, RuntimeError):
        return {}


def _memory(stats: Any, chip: topologies.Chip | None) -> dict[str, Any]:
    """Bytes on one device, and whether they fit."""
    if not stats:
        return dict.fromkeys(_MEMORY)
    arguments, temporary = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    # Donated arguments hold results; the others need room of their own.
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = arguments + fresh + temporary + stats.generated_code_size_in_bytes
    return {
        "argument_bytes": arguments,
        "temp_bytes": temporary,
        "peak_bytes": peak,
        "fits": None if chip is None else peak <= chip.usable * chip.memory_bytes,
    }


def _by_kind(sent: Sequence[Any], repeats: int) -> dict[str, dict[str, float]]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for one in sent:
        count[one.kind] += one.times
        size[one.kind] += one.times * one.bytes
    return {k: {"count": count[k] / repeats, "bytes": size[k] / repeats} for k in sorted(count)}


def _roofline(
    result: Mapping[str, Any],
    flops: Mapping[str, float],
    accessed: float | None,
    topology: topologies.Topology,
) -> dict[str, Any] | None:
    """The least time that the published numbers of the chip allow; None without such numbers.

    Arithmetic, memory and messages at their peak rates, and the longest of the three: what would be
    if each hid the others. A ring all-reduce sends 2 (n - 1) / n of its bytes.
    """
    chip, devices = topology.chip, len(topology.devices)
    if chip is None:
        return None
    busy = sum(n / devices / chip.flops[kind] for kind, n in flops.items())
    if accessed:
        # The compiler takes the body of a sampler's loop once; its bytes grow as its arithmetic.
        accessed *= max(1.0, result["flops_per_device"] / result["compiler_flops_per_device"])
    sent = sum(kind["bytes"] for kind in result["collectives"].values())
    seconds = {
        "compute_s": busy,
        "memory_s": accessed / chip.bandwidth if accessed else None,
        "network_s": 2 * (devices - 1) / devices * sent / chip.link,
    }
    bound = max((v, k.removesuffix("_s")) for k, v in seconds.items() if v is not None)
    return {
        "note": "estimate from published peak rates, not measured",
        **{k: v if v is None else float(f"{v:.3g}") for k, v in seconds.items()},
        "step_s": float(f"{bound[0]:.3g}"),
        "bound_by": bound[1],
        "mfu": round(busy / bound[0], 3),
    }


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
