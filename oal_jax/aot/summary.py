"""What compiling the program of a stage tells: sizes, arithmetic, messages, a roofline."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from oal_jax.aot import costs, programs, topologies
from oal_jax.config import Config
from oal_jax.runtime import distributed


def compile_stage(config: Config, topology: topologies.Topology, stage: str) -> dict[str, Any]:
    """Lower and compile the program of a stage; the object that the command prints."""
    mesh = distributed.make_mesh(config.mesh.model, topology.devices)
    program = programs.make(stage, config, mesh, topology.platform)
    start = time.monotonic()
    traced = program.function.trace(*program.arguments)
    lowered = traced.lower()
    traced_at = time.monotonic()
    flops = {k: v / program.repeats for k, v in costs.flops(traced.jaxpr).items()}
    result = {
        "topology": topology.name,
        "devices": len(topology.devices),
        "device_kind": topology.devices[0].device_kind,
        "stage": stage,
        "batch": program.batch,
        "steps_per_call": program.repeats,
        "flops_per_device": sum(flops.values()) / len(topology.devices),
        "host_calls": costs.host_calls(traced.jaxpr),
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
    sent = costs.collectives(compiled.as_text())
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
