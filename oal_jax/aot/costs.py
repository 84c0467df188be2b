"""Costs of a program on given devices: arithmetic, memory, messages between devices.

Arithmetic is counted in the traced program (jaxpr): XLA's own count takes the body of a loop once,
and XLA gives none for CUDA without a device. Messages are counted in the compiled program's text,
because the compiler inserts them.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from oal_jax.aot.programs import Program


def measure(program: Program, devices: int, memory_bytes: int | None) -> dict[str, Any]:
    """Compile a program and return its costs for JSON; `oal_jax.compile` explains the keys.

    Args:
      program: with arguments that are placed on a mesh of the devices.
      devices: number of devices.
      memory_bytes: memory of a device that a program may use; None if unknown.
    """
    steps = program.steps_per_call
    traced = program.function.trace(*program.arguments)
    costs = {
        "devices": devices,
        "batch": program.batch,
        "steps_per_call": steps,
        "flops_per_device": flops(traced.jaxpr) / steps / devices,
        "host_calls": host_calls(traced.jaxpr),
        "memory_bytes": memory_bytes,
        **dict.fromkeys(("argument_bytes", "temp_bytes", "peak_bytes", "fits", "collectives")),
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return costs | {"fits": False, "compiler": " ".join(str(error).split())[:300]}
    costs["collectives"] = {
        kind: {name: value / steps for name, value in numbers.items()}
        for kind, numbers in collectives(compiled.as_text()).items()
    }
    return costs | memory(compiled.memory_analysis(), memory_bytes)


def memory(stats: Any, available: int | None) -> dict[str, Any]:
    """Bytes on one device, from `compiled.memory_analysis()`, and whether they fit.

    Args:
      stats: None if the compiler gives none.
      available: bytes of a device that a program may use; None if unknown.
    """
    if stats is None:
        return {}
    # Donated arguments hold results; other results need memory of their own.
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    arguments, temporary = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    peak = arguments + results + temporary + stats.generated_code_size_in_bytes
    return {
        "argument_bytes": arguments,
        "temp_bytes": temporary,
        "peak_bytes": peak,
        "fits": None if available is None else peak <= available,
    }


def flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products and convolutions of a traced program.

    A multiplication and an addition are two FLOPs. A `scan` counts once per iteration, a
    `while_loop` once, a `cond` as its most expensive branch.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            total += _convolution_flops(eqn)
        else:
            leaves = jax.tree.leaves(list(p.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
            inner = [flops(leaf) for leaf in leaves if hasattr(leaf, "eqns")]
            total += max(inner) if name == "cond" else p.get("length", 1) * sum(inner)
    return total


def _convolution_flops(eqn: Any) -> int:
    p, (lhs, rhs, out) = eqn.params, (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    spec = p["dimension_numbers"]
    sizes = (
        [shape[i] for i in axes[2:]] for shape, axes in zip((lhs, rhs, out), spec, strict=True)
    )
    steps = p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"]
    taps = math.prod(map(_taps, *sizes, *steps))
    rows, channels, inputs = out[spec.out_spec[0]], out[spec.out_spec[1]], rhs[spec.rhs_spec[1]]
    return 2 * rows * channels * inputs * taps


def _taps(size, kernel, outputs, stride, padding, gap, dilation) -> int:
    """Pairs of an output and a kernel element on one axis that meet neither padding nor a gap."""
    place = np.arange(outputs)[:, None] * stride + np.arange(kernel) * dilation - padding[0]
    return int(np.sum((place >= 0) & (place <= (size - 1) * gap) & (place % gap == 0)))


def host_calls(jaxpr: Any) -> list[str]:
    """Names of the operations of a traced program that call the host; a step should have none."""
    return sorted(set(re.findall(r"\b(\w+_callback|infeed|outfeed)\[", str(jaxpr))))


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_MESSAGE = re.compile(
    r"= (?P<type>\S.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all"
    r"|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|\w+_computations?)=\{?%?([\w.\-]+(?:, %[\w.\-]+)*)"
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bits, shape


def collectives(text: str) -> dict[str, Counter[str]]:
    """Count and result bytes of a compiled program's messages between devices, by kind.

    A message in a loop counts once per iteration, or once if the text (HLO) does not tell how many
    iterations there are.
    """
    entry, bodies, sent = "", {}, {}
    for is_entry, name, body in _COMPUTATION.findall(text):
        bodies[name] = body
        entry = name if is_entry else entry

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, "").splitlines():
            if message := _MESSAGE.search(line):
                numbers = sent.setdefault(message["kind"], Counter())
                numbers.update({"count": times, "bytes": times * _result_bytes(message)})
            iterations = _iterations(line, bodies) if " while(" in line else 1
            for names in _CALLED.findall(line):
                for called in names.split(", "):
                    visit(called.removeprefix("%"), times * iterations)

    visit(entry, 1)
    return dict(sorted(sent.items()))


def _iterations(line: str, bodies: Mapping[str, str]) -> int:
    """Iterations of a loop: the compiler's note, or the bound that its counter stays below."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", line):
        return int(known[1])
    condition = bodies[re.search(r"condition=%?([\w.\-]+)", line)[1]]
    bounds = re.findall(r" constant\((\d+)\)", condition)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in condition else 1


def _result_bytes(message: re.Match[str]) -> int:
    """Bytes of a message's result on one device; its type is "f32[2,3]{1,0}", or a tuple."""
    arrays = _ARRAY.findall(message["type"])
    if message["start"] and message["kind"] != "all-reduce":
        # The tuple holds operands, results and scalar counters.
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    return sum(
        int(bits or 8) * math.prod(int(n) for n in shape.split(",") if n) // 8
        for bits, shape in arrays
    )
