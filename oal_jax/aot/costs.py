"""What a program costs, read off it: arithmetic, messages between devices, calls to the host.

Arithmetic is counted in the traced program (a jaxpr), which says the same on every backend, and
where a loop's length is known. Messages are counted in the compiled program's text (HLO), since the
compiler is who makes them.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """One instruction that sends between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: of its result, on one device.
      times: how often a call of the program runs it.
      op: the operation that it was made of, as JAX names it.
    """

    kind: str
    bytes: int
    times: int
    op: str


def flops(jaxpr: Any) -> dict[str, int]:
    """FLOPs of the matrix products and convolutions of a call, by the type of their inputs.

    A multiplication and an addition are two. A loop counts as often as it runs (`while_loop`, whose
    length is not known, once), a branch as its most expensive side. Of a convolution, taps that
    fall on padding or between the elements of a dilated input do not count: a strided convolution
    costs its gradient what it costs forward.
    """
    counts: Counter[str] = Counter()
    for eqn in _open(jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            counts[_type(eqn)] += 2 * math.prod(eqn.outvars[0].aval.shape) * _contracted(eqn)
        elif name == "conv_general_dilated":
            counts[_type(eqn)] += _convolution(eqn)
        elif name == "cond":
            sides = [flops(branch) for branch in eqn.params["branches"]]
            counts.update(max(sides, key=lambda side: sum(side.values())))
        else:
            times = eqn.params["length"] if name == "scan" else 1
            for inner in _inner(eqn):
                counts.update({k: times * v for k, v in flops(inner).items()})
    return dict(counts)


def host_calls(jaxpr: Any) -> list[str]:
    """Names of the operations that leave the devices in the middle of a program."""
    found = []
    for eqn in _open(jaxpr).eqns:
        name = eqn.primitive.name
        if "callback" in name or name in ("infeed", "outfeed"):
            found.append(name)
        for inner in _inner(eqn):
            found += host_calls(inner)
    return found


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(item), "eqns"):
                yield item


def _type(eqn: Any) -> str:
    return str(eqn.invars[0].aval.dtype)


def _contracted(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[d] for d in contracting)


def _convolution(eqn: Any) -> int:
    p, (lhs, rhs, out) = eqn.params, (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    numbers = p["dimension_numbers"]
    taps = math.prod(
        _taps(lhs[i], rhs[k], out[o], stride, padding, holes_in, holes_kernel)
        for i, k, o, stride, padding, holes_in, holes_kernel in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            strict=True,
        )
    )
    # Inputs of a group: the kernel's second axis says how many.
    channels = rhs[numbers.rhs_spec[1]]
    rows, maps = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * rows * maps * channels * taps


def _taps(size: int, kernel: int, out: int, stride: int, padding, dilated: int, holes: int) -> int:
    """Pairs of an output and a kernel position, along one axis, that meet an element."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * holes - padding[0]
    inside = (at >= 0) & (at <= (size - 1) * dilated) & (at % dilated == 0)
    return int(inside.sum())


def collectives(text: str) -> list[Collective]:
    """The instructions of a compiled program that send between devices, loops unrolled in `times`.

    A loop whose length the compiler does not know counts once.
    """
    bodies, entry = _computations(text)
    times: dict[str, int] = defaultdict(int)
    _visit(bodies, entry, 1, times)
    found = []
    for name, lines in bodies.items():
        for line in lines if times[name] else []:
            match = _COLLECTIVE.search(line)
            if match:
                op = re.search(r'op_name="([^"]*)"', line)
                size = _result_bytes(match["type"], bool(match["start"]), match["kind"])
                found.append(
                    Collective(match["kind"], size, times[name], op[1] if op else "unknown")
                )
    return found


_COLLECTIVE = re.compile(
    rf"= (?P<type>\S.*?) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\("
)
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)')


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name to lines of each computation, and the name of the one that runs."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith("HloModule"):
            lines = bodies.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif line.startswith(" "):
            lines.append(line)
    return bodies, entry


def _visit(bodies: dict[str, list[str]], name: str, count: int, times: dict[str, int]) -> None:
    times[name] += count
    for line in bodies.get(name, ()):
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        rounds = _rounds(bodies, line) if " while(" in line else 1
        for other in called:
            _visit(bodies, other, count * rounds, times)


def _rounds(bodies: dict[str, list[str]], line: str) -> int:
    """How often a loop runs: as the compiler says, or by the bound that its counter stays below."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = bodies.get(re.search(r"condition=%?([\w.\-]+)", line)[1], ())
    bounds = [int(n) for text in condition for n in re.findall(r" constant\((\d+)\)", text)]
    counted = any("compare(" in text and "direction=LT" in text for text in condition)
    return bounds[0] if counted and len(bounds) == 1 else 1


def _result_bytes(written: str, start: bool, kind: str) -> int:
    """Bytes of a result type as HLO writes it: "f32[2,3]{1,0}", or several in parentheses."""
    arrays = [
        (_bits(kind_of) * math.prod(int(n) for n in shape.split(",") if n)) // 8
        for kind_of, shape in re.findall(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]", written)
    ]
    if start and kind in ("all-gather", "collective-permute"):
        return max(arrays, default=0)  # the operand is beside the result, and counters
    return sum(arrays)


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
