"""Suite `scaling`: how the cost of each part grows with what it is given.

    python -m benchmarks.run --suite scaling --output results.json [--runs 5] [--smoke]
        [--axes images,classes,outliers,side,batch,devices]

Axes, and what is timed at each of their values:

    images    `features` (the teacher's forward pass) and `evaluation` (the student's outputs,
              energy scores, metrics) of so many images
    classes   `knn`: boundary sampling in so many classes of 500 features each
    outliers  `latents`: so many outliers sampled as latents, a chunk at a time
    side      `step` (a training step of OAL) and `features` of a batch, at so many pixels a side
    batch     `step` on so many images
    devices   `step` on one batch that so many devices share: on CPU virtual ones, which share the
              cores, in processes of their own; else the first of those that are there

The networks are those of configs/fashion.py, their weights and the data random numbers; no outlier
images. The points of a series take turns. Rows have `axis`, `value`, `program`, and the `exponent`
p of their series with its standard error: least squares of log(median seconds) = p log(value) + c,
which need three points. A picture shows them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing
from benchmarks.cases import load_config
from benchmarks.timing import Job
from oal_jax.config import GENERATED, Config, flatten, unflatten
from oal_jax.config.smoke import shrink
from oal_jax.errors import UserError

Run = Callable[[], Any]
# Values of each axis, and with --smoke.
AXES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "images": ((256, 512, 1024, 2048), (16, 32, 64)),
    "classes": ((2, 4, 8, 16), (1, 2, 4)),
    "outliers": ((8, 16, 32, 64), (4, 8, 12)),
    "side": ((16, 24, 32, 48), (8, 12)),
    "batch": ((16, 32, 64, 128), (4, 8)),
    "devices": ((1, 2, 4, 8), (1, 2)),
}
UNITS = {"side": "pixels a side", "batch": "images a batch"}
_SHARED_BATCH = 64  # of the axes `side` and `devices`
_MARKERS = "os^D"


class Fit(NamedTuple):
    """seconds = exp(constant) value ** exponent, and the exponent's standard error."""

    exponent: float
    error: float
    constant: float


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the points of each axis in turns; print the exponents; return the rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.run --suite scaling")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--runs", type=int, default=5, help="that count; one more warms up")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    args = parser.parse_args(argv, argparse.Namespace(device="auto"))
    if args.runs < 1:
        raise UserError(f"--runs {args.runs} must be 1 or more")
    axes = args.axes.split(",")
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"axis '{axis}' is unknown; known: {', '.join(AXES)}")
    rows = [row for axis in AXES if axis in axes for row in _axis(axis, args)]
    for members in series(rows).values():
        found = fit([r["value"] for r in members], [r["median_s"] for r in members])
        for row in members:
            row["exponent"], row["exponent_error"] = (
                None if np.isnan(number) else round(number, 4)
                for number in (found.exponent, found.error)
            )
    print(table(rows))
    return rows


def series(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """The rows of each axis and program, by value."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in sorted(rows, key=lambda row: row["value"]):
        found.setdefault((row["axis"], row["program"]), []).append(row)
    order = [(row["axis"], row["program"]) for row in rows]
    return {name: found[name] for name in dict.fromkeys(order)}


def fit(values: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Least squares on the logarithms; NaN where the points are too few to say."""
    x, y = np.log(np.asarray(values, float)), np.log(np.asarray(seconds, float))
    spread = ((x - x.mean()) ** 2).sum()
    if len(x) < 2 or spread == 0:
        return Fit(float("nan"), float("nan"), float(y.mean()))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    constant = y.mean() - slope * x.mean()
    rest = ((y - constant - slope * x) ** 2).sum()
    error = np.sqrt(rest / (len(x) - 2) / spread) if len(x) > 2 else np.nan
    return Fit(float(slope), float(error), float(constant))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a series: its exponent, and the seconds at its ends."""
    lines = [f"{'axis':10s} {'program':12s} {'exponent':>16s}  from, to"]
    for (axis, program), members in series(rows).items():
        ends = [f"{r['value']}: {r['median_s']:.4f} s" for r in (members[0], members[-1])]
        lines.append(f"{axis:10s} {program:12s} {_exponent(members[0]):>16s}  {', '.join(ends)}")
    return "\n".join(lines)


def _exponent(row: Mapping[str, Any]) -> str:
    if row["exponent"] is None:
        return "–"
    error = "" if row["exponent_error"] is None else f" ± {row['exponent_error']:.2f}"
    return f"{row['exponent']:.2f}{error}"


def draw(rows: Sequence[Mapping[str, Any]], output: Path) -> list[Path]:
    """OUTPUT.png and .svg: seconds against the value, a panel an axis, with the fitted lines."""
    from benchmarks.middle_stage_figures import save

    return save(figure(rows), output.with_suffix(""), ("png", "svg"))


def figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The figure that `draw` writes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    columns = min(3, len(axes))
    lines = -(-len(axes) // columns)
    made = Figure(figsize=(0.6 + 3.9 * columns, 0.6 + 3.2 * lines), layout="constrained")
    FigureCanvasAgg(made)
    made.suptitle(f"Cost against size, medians of {rows[0]['runs']}: {rows[0]['device']}")
    grid = made.subplots(lines, columns, squeeze=False)
    for panel in grid.flat[len(axes) :]:
        panel.set_axis_off()
    for panel, axis in zip(grid.flat, axes, strict=False):
        _panel(panel, axis, [row for row in rows if row["axis"] == axis])
    return made


def _panel(panel: Any, axis: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import NullLocator

    from oal_jax.report.figures import INK, SERIES

    for index, ((_, program), members) in enumerate(series(rows).items()):
        values = np.array([row["value"] for row in members], float)
        middle, low, high = (
            np.array([row[key] for row in members]) for key in ("median_s", "min_s", "max_s")
        )
        style = {
            "color": SERIES[index % len(SERIES)],
            "label": f"{program}: {_exponent(members[0])}",
        }
        panel.errorbar(
            values,
            middle,
            [middle - low, high - middle],
            linestyle="none",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            capsize=2,
            **style,
        )
        found = fit(values, middle)
        if not np.isnan(found.exponent):
            fitted = np.exp(found.constant) * values**found.exponent
            panel.plot(values, fitted, color=style["color"], linewidth=1.2, alpha=0.7)
    values = sorted({row["value"] for row in rows})
    panel.set(xscale="log", yscale="log", xlabel=UNITS.get(axis, axis), ylabel="seconds")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(values, [str(value) for value in values])
    panel.tick_params(labelsize=8, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color=INK, alpha=0.12, linewidth=0.6, which="both")
    panel.legend(title="exponent", frameon=False, fontsize=8, title_fontsize=8, loc="best")


def _axis(axis: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    values = AXES[axis][args.smoke]
    if axis == "devices":
        return _devices(values, args)
    jobs = [
        _job(axis, value, program, take)
        for value in values
        for program, take in _PROGRAMS[axis](value, args.smoke)
    ]
    return timing.measure("scaling", jobs, args)


def _job(axis: str, value: int, program: str, take: Run | None = None) -> Job:
    more = {"axis": axis, "value": value, "program": program}
    return Job(f"{axis}-{value}-{program}", "jax", take, more=more)


def _images(count: int, smoke: bool) -> Iterator[tuple[str, Run]]:
    """Of so many images; the batches are as large as the smallest number of them."""
    import jax
    import jax.numpy as jnp

    from oal_jax import scores as post_hoc
    from oal_jax.aot import programs
    from oal_jax.evaluation import protocol
    from oal_jax.evaluation.protocol import Inputs
    from oal_jax.runtime import distributed
    from oal_jax.scores import forward
    from oal_jax.stages import teacher, train
    from oal_jax.stages.context import apply_in_batches, classifier

    config = _config(smoke)
    known, mesh, rng = programs.images_of(config), distributed.make_mesh(), _random()
    images = rng.integers(0, 256, (count, *known.shape), np.uint8)
    labels = rng.integers(0, known.classes, count).astype(np.int32)
    batch, first = AXES["images"][smoke][0], jnp.zeros((1, *known.shape))
    look, student = teacher.model(config, known.classes), train.student(config, known.classes)
    key = jax.random.key(0)
    of_teacher = classifier(look, mesh)(jax.jit(look.init)(key, first))
    yield "features", lambda: apply_in_batches(of_teacher, images, batch, mesh)
    variables = jax.jit(student.init)(key, first)
    of_student = forward.scaled(forward.make_forward(student, variables, ()), images)
    names = ("id_train", "id_val", "id_test", "ood")

    def evaluate():
        outputs = post_hoc.compute(of_student, images, batch, ())
        quarter = count // len(names)
        parts = [slice(i * quarter, (i + 1) * quarter) for i in range(len(names))]
        sets = [Inputs(post_hoc.Outputs(outputs.logits[p]), None, labels[p]) for p in parts]
        *known_sets, ood = sets
        return protocol.evaluate(("energy",), *known_sets, {"ood": ood}, {"ood": "far"})

    yield "evaluation", evaluate


def _classes(count: int, smoke: bool) -> Iterator[tuple[str, Run]]:
    """The sampling of suite `outliers`, with features as wide as those of the shipped teacher."""
    from benchmarks import outliers

    sizes = {"repeats": 1, "classes": count, "features": 500, "width": 128}
    sizes |= {"neighbour": 300, "anchors": 50, "noise_rows": 500}
    tiny = {"features": 40, "width": 16, "neighbour": 20, "anchors": 8, "noise_rows": 16}
    yield "knn", outliers.ours(sizes | tiny if smoke else sizes)


def _latents(count: int, smoke: bool) -> Iterator[tuple[str, Run]]:
    """The chunks that stage `latents` samples, one after the other."""
    import jax

    program, arguments = _chunk(smoke)

    def sample():
        for _ in range(-(-count // program.batch)):
            jax.block_until_ready(program.function(*arguments))

    yield "latents", sample


@cache  # one program for all numbers of chunks
def _chunk(smoke: bool) -> tuple[Any, Any]:
    program = _program("latents", {"latents.chunk": AXES["outliers"][smoke][0]}, smoke)
    return program, filled(program.arguments)


def _side(pixels: int, smoke: bool) -> Iterator[tuple[str, Run]]:
    import jax

    batch = AXES["batch"][1][0] if smoke else _SHARED_BATCH
    changes = {
        **{"data.source": GENERATED, "data.id_set": "cifar10", "data.image_size": pixels},
        **{"train.batch_size": batch, "evaluation.batch_size": batch},
    }
    program = _program("features", changes, smoke)
    arguments = filled(program.arguments)
    yield "features", lambda: jax.block_until_ready(program.function(*arguments))
    yield "step", _step(_program("train", changes, smoke))


def _batch(size: int, smoke: bool) -> Iterator[tuple[str, Run]]:
    yield "step", _step(_program("train", {"train.batch_size": size}, smoke))


_PROGRAMS: dict[str, Callable[[int, bool], Iterator[tuple[str, Run]]]] = {
    "images": _images,
    "classes": _classes,
    "outliers": _latents,
    "side": _side,
    "batch": _batch,
}


def _config(smoke: bool, changes: Mapping[str, Any] | None = None) -> Config:
    # Steps a call are as many as are logged at once: one. So few images that none fill a memory.
    base = {"train.log_every": 1, "data.train_images": 1024, "outliers.image_share": 0.0}
    config = load_config(Path("configs") / "fashion.py")
    config = shrink(config) if smoke else config
    return unflatten(flatten(config) | base | dict(changes or {}))


def _program(stage: str, changes: Mapping[str, Any], smoke: bool, count: int | None = None) -> Any:
    """A program of `oal_jax.aot.programs` for the first devices, or all."""
    import jax

    from oal_jax.aot import programs
    from oal_jax.runtime import distributed

    mesh = distributed.make_mesh(devices=jax.devices()[:count])
    return programs.make(stage, _config(smoke, changes), mesh, jax.default_backend())


def _step(program: Any) -> Run:
    import jax

    state, *rest = filled(program.arguments)

    def take() -> None:
        nonlocal state  # which every step takes over
        state, metrics = program.function(state, *rest)
        jax.block_until_ready((state, metrics))

    return take


def filled(tree: Any) -> Any:
    """Arrays on the devices in place of shapes: small positive floats, 0 and 1, random bytes.

    Scalars of whole numbers, which count steps, are 0.
    """
    import jax
    import jax.numpy as jnp

    rng = _random()

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            array = rng.uniform(0.01, 0.1, leaf.shape)
        elif leaf.dtype == jnp.uint8:
            array = rng.integers(0, 256, leaf.shape)
        else:
            array = rng.integers(0, 2, leaf.shape) if leaf.shape else np.zeros(())
        return jax.device_put(np.asarray(array, leaf.dtype), getattr(leaf, "sharding", None))

    return jax.tree.map(fill, tree)


def _random() -> np.random.Generator:
    return np.random.default_rng(0)


def _devices(values: Sequence[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax

    jobs = [_job("devices", value, "step") for value in values]
    if jax.default_backend() != "cpu":
        there = [job for job in jobs if job.more["value"] <= jax.device_count()]
        jobs = [job._replace(run=_on_devices(job.more["value"], args.smoke)) for job in there]
        return timing.measure("scaling", jobs, args)
    seconds = []
    for value in values:
        order = json.dumps({"count": value, "smoke": args.smoke, "turns": args.runs + 1})
        flags = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(value)}
        printed = timing.python(["-m", "benchmarks.scaling", order], **flags)
        seconds.append(json.loads(printed.splitlines()[-1]))
    return timing.rows_of("scaling", jobs, seconds, args.device)


def _on_devices(count: int, smoke: bool) -> Run:
    batch = max(AXES["devices"][1]) if smoke else _SHARED_BATCH
    return _step(_program("train", {"train.batch_size": batch}, smoke, count))


def main(argv: Sequence[str]) -> None:
    """Print the seconds of steps on virtual devices; `argv[1]` says of how many, as JSON."""
    order = json.loads(argv[1])
    take, seconds = _on_devices(order["count"], order["smoke"]), []
    for _ in range(order["turns"]):
        start = time.perf_counter()
        take()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
