"""`--profile`: where the time of a run goes, stage by stage, and a trace of a window of each.

The run itself is as without. JAX tells when it makes programs; what else a stage is at is seen by
looking at its thread's stack every few milliseconds; another thread takes the traces. Files:

    stages.json, stages.csv       a row a stage that was planned, and one of the whole
    stages.png, stages.svg        the same as bars
    STAGE.perfetto.json.gz        the trace for https://ui.perfetto.dev
    STAGE/plugins/profile/TIME/   the trace for TensorBoard (its plugin `xprof`)
"""

import csv
import gc
import gzip
import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from oal_jax.errors import UserError

ROWS = "stages.json"
_PERFETTO = ".perfetto.json.gz"
WINDOW = 3.0  # seconds of a stage that are traced
PARTS = {
    "compile": "tracing, lowering, compiling",
    "data": "reading data",
    "evaluation": "evaluation",
    "files": "writing files",
    "other": "computing, other work",
}
_SECONDS = tuple(f"{part}_s" for part in PARTS)
COLUMNS = ("stage", "status", "seconds", "share", *_SECONDS, "trace", "trace_s", "trace_bytes")
_COLORS = {"compile": 1, "data": 3, "evaluation": 4, "files": 7, "other": 0}
_EVERY = 0.01  # seconds between two looks at the stack
_WINDOWS = 8  # of a stage, at most
_STEADY = 0.9  # share of a window without the making of programs that is enough
_NEWS = 0.5  # seconds of making programs after which a later window is taken
_LARGEST = 64 * 2**20  # bytes of a trace as recorded, from which a shorter window is taken

Watch = Callable[[str, str], AbstractContextManager[None]]


class Spent:
    """When JAX was at work on making programs, as its own events tell."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self._begun: list[float] = []

    def __call__(self, event: str, start: float, end: float, **_: Any) -> None:
        """Keeps the time span of one of JAX's events."""
        if event.startswith("/jax/core/compile/"):
            self.spans.append((start, end))
            if self._begun:
                self._begun.pop()

    def begin(self, event: str, start: float, **_: Any) -> None:
        """Notes that what an event is the span of has begun."""
        if event.startswith("/jax/core/compile/"):
            self._begun.append(start)

    @property
    def seconds(self) -> float:
        """Length of all spans: those of a function called by another lie within that one's."""
        return self.within(float("-inf"), float("inf"))

    @property
    def making(self) -> bool:
        """Whether a program is being made now."""
        return bool(self._begun)

    def within(self, start: float, end: float) -> float:
        """Seconds of the spans, and of the one under way, between two times (`time.time`)."""
        total, last = 0.0, start
        under_way = [(begun, time.time()) for begun in self._begun[:1]]
        spans = [span for span in (*self.spans, *under_way) if span[1] > start]
        for first, until in sorted(spans):
            total += max(0.0, min(until, end) - max(first, last))
            last = max(last, until)
        return total


def watch_compilation() -> Spent:
    """What JAX spends on tracing, lowering and compiling from now on."""
    spent = Spent()
    jax.monitoring.register_event_time_span_listener(spent)
    jax.monitoring.register_scalar_listener(spent.begin)
    return spent


@contextmanager
def profile(folder: Path, window: float = WINDOW) -> Iterator[Watch]:
    """A `watch` for `pipeline.run`; at the end the table is printed and the files are written.

    Where the run fails, they tell of the stages up to there.

    Raises:
      UserError: `folder` can't be written to.
    """
    rows: list[dict[str, Any]] = []
    spent, began = watch_compilation(), time.time()

    @contextmanager
    def watch(stage: str, skipped: str) -> Iterator[None]:
        if skipped:
            rows.append({"stage": stage, "status": skipped})
            return (yield)
        _make(folder)
        rows.append(row := {"stage": stage, "status": "failed"})
        with _traced(folder, stage, spent, window, row), _sampled(spent, row):
            start = time.time()
            try:
                yield
                row["status"] = "ran"
            finally:
                end = time.time()
                row |= {"seconds": end - start, "compile_s": spent.within(start, end)}

    try:
        yield watch
    finally:
        jax.monitoring.unregister_event_time_span_listener(spent)
        jax.monitoring.unregister_scalar_listener(spent.begin)
        if rows:
            rows = summary(rows, time.time() - began)
            print(table(rows))
            print("profile:", *write(rows, folder))
            opened = f"*.perfetto.json.gz in ui.perfetto.dev, or tensorboard --logdir {folder}"
            print(f"traces: {opened}", flush=True)


def summary(rows: Sequence[Mapping[str, Any]], whole: float) -> list[dict[str, Any]]:
    """The rows with their share of the whole run's seconds and what is left, and one of the whole.

    `between_s` passes between the stages: imports, hashes of inputs, writing the traces.
    """
    found, seen = [], _SECONDS[:-1]
    for row in rows:
        row = dict(row)
        if "seconds" in row:
            known = sum(row.get(part, 0.0) for part in seen)
            row |= {part: row.get(part, 0.0) for part in seen}
            row |= {"share": row["seconds"] / whole, "other_s": max(0.0, row["seconds"] - known)}
        found.append(row)
    ran = [row for row in found if "seconds" in row]
    total = {"stage": "whole", "status": "", "seconds": whole, "share": 1.0}
    total |= {part: sum(row[part] for row in ran) for part in _SECONDS}
    total["between_s"] = max(0.0, whole - sum(row["seconds"] for row in ran))
    return [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        for row in (*found, total)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `summary` for the terminal: seconds, and the share of the whole."""
    heads = ("seconds", "share", *PARTS)
    lines = ["stage".ljust(14) + "".join(head.rjust(12) for head in heads) + "  trace"]
    for row in rows:
        line = row["stage"].ljust(14)
        if "seconds" not in row:
            lines.append(f"{line}{row['status']}")
            continue
        cells = [f"{row['seconds']:.2f}", f"{100 * row['share']:.1f} %"]
        cells += [f"{row[part]:.2f}" for part in _SECONDS]
        line += "".join(cell.rjust(12) for cell in cells)
        line += "  failed" * (row["status"] == "failed")
        if "trace" in row:
            line += f"  {row['trace_s']:.1f} s, {row['trace_bytes'] / 2**20:.1f} MiB"
        elif "trace_problem" in row:
            line += f"  none: {row['trace_problem']}"
        elif "between_s" in row:
            line += f"  {row['between_s']:.2f} s between the stages"
        lines.append(line)
    return "\n".join(lines)


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """The rows of `summary` as JSON, as CSV and as a figure; returns the files."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    files = {
        ROWS: (json.dumps(rows, indent=1) + "\n").encode(),
        "stages.csv": text.getvalue().encode(),
        **pictures(rows),
    }
    _make(folder)
    for name, data in files.items():
        # Not by `artifacts`, where all processes of a run take part: here is one alone.
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def pictures(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """`stages.png` and `stages.svg`: a bar a stage that ran, its parts in colours."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from oal_jax.report.figures import INK, SERIES

    ran = [row for row in rows[:-1] if "seconds" in row][::-1]
    skipped = [row["stage"] for row in rows[:-1] if "seconds" not in row]
    figure = Figure(figsize=(7.2, 1.6 + 0.34 * len(ran)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = [0.0] * len(ran)
    for part, label in PARTS.items():
        widths, style = [row[f"{part}_s"] for row in ran], {"color": SERIES[_COLORS[part]]}
        axes.barh(range(len(ran)), widths, left=left, height=0.66, label=label, **style)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in enumerate(ran):
        axes.annotate(
            f"{row['seconds']:.1f} s, {100 * row['share']:.0f} %",
            (max(row["seconds"], left[place]), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=8,
        )
    names = [row["stage"] + " (failed)" * (row["status"] == "failed") for row in ran]
    axes.set_yticks(range(len(ran)), names)
    axes.set_xlim(0, 1.2 * max([0.001, *(row["seconds"] for row in ran)]))
    note = f"; skipped: {', '.join(skipped)}" if skipped else ""
    axes.set_xlabel(f"seconds{note}", fontsize=9)
    axes.set_title(f"Where {rows[-1]['seconds']:.1f} s went", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "oal_jax"}):  # the same rows, the same bytes
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {"stages.png": png.getvalue(), "stages.svg": svg.getvalue()}


_PACKAGE = str(Path(__file__).parent) + os.sep
_FILES = {
    "data" + os.sep: "data",
    "artifacts.py": "files",
    os.path.join("training", "checkpoints.py"): "files",
    os.path.join("training", "log.py"): "files",
    "evaluation" + os.sep: "evaluation",
    "scores" + os.sep: "evaluation",
    os.path.join("stages", "evaluate.py"): "evaluation",
}


def part_of(frame: FrameType | None) -> str:
    """What a stack is at, by its innermost frame that tells: data, files or evaluation; or ""."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            inside = path.removeprefix(_PACKAGE)
            for start, part in _FILES.items():
                if inside.startswith(start):
                    return part
            if frame.f_code.co_name == "evaluate":  # what a training does after an epoch
                return "evaluation"
        frame = frame.f_back
    return ""


def _at(thread: int) -> str:
    """What another thread is at now, by `part_of`."""
    # Where a walk along the stack collected garbage (Python 3.11 does so at any allocation), the
    # other thread would go on meanwhile, and the walk would read frames that it has left.
    collects = gc.isenabled()
    gc.disable()
    try:
        return part_of(sys._current_frames().get(thread))
    finally:
        if collects:
            gc.enable()


@contextmanager
def _sampled(spent: Spent, row: dict[str, Any]) -> Iterator[None]:
    """Adds the seconds of the parts that `part_of` knows of this thread to the row."""
    stop, watched = threading.Event(), threading.get_ident()
    found = dict.fromkeys(_FILES.values(), 0.0)

    def look() -> None:
        last = time.monotonic()
        while not stop.wait(_EVERY):
            now = time.monotonic()
            part = "" if spent.making else _at(watched)
            if part:
                found[part] += now - last
            last = now

    try:
        with _beside(look, stop):
            yield
    finally:
        row |= {f"{part}_s": seconds for part, seconds in found.items()}


@contextmanager
def _beside(work: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    """A thread at work meanwhile, which ends once `stop` is set."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _traced(
    folder: Path, stage: str, spent: Spent, window: float, row: dict[str, Any]
) -> Iterator[None]:
    """Trace this process for a window after the stage's programs are made.

    That is the last window with hardly any making of programs in it and much before it; where
    there is none such, the one with most time for anything else after the first programs, which may
    be the stage's end. A trace that is too large is followed by one that is as much shorter.
    """
    stop, scratch, path = threading.Event(), folder / ".window", folder / f"{stage}{_PERFETTO}"
    kept: dict[str, float] = {}
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would be most of a trace

    def due(settled: float) -> bool:
        """Waits until another window is due; whether the stage is still at work."""
        while spent.making or (settled and spent.within(settled, time.time()) < _NEWS):
            if stop.wait(0.1):
                return False
        return not stop.is_set()

    def take() -> None:
        length, settled, began = window, 0.0, time.time()
        for number in range(_WINDOWS):
            if number and not due(settled):
                return
            shutil.rmtree(scratch, ignore_errors=True)
            jax.profiler.start_trace(scratch, profiler_options=options)
            start = time.time()
            stop.wait(length)
            end = time.time()
            jax.profiler.stop_trace()
            steady = end - start - spent.within(start, end)
            size = _size(scratch)
            if size > _LARGEST:
                length, settled = length * 0.8 * _LARGEST / size, 0.0
                continue
            settled = end if steady > _STEADY * (end - start) else 0.0
            whole = settled and end - start > 0.5 * length  # not cut short by the stage's end
            worth = steady if spent.within(began, end) >= _NEWS else 0.0
            if not kept or whole or worth > kept["worth"]:
                shutil.rmtree(folder / stage, ignore_errors=True)
                os.replace(scratch, folder / stage)
                kept.update(seconds=end - start, worth=worth)

    def keep() -> None:
        if kept:
            _for_perfetto(folder / stage, path)
            size = path.stat().st_size + _size(folder / stage)
            row.update(trace=path.name, trace_s=kept["seconds"], trace_bytes=size)

    shutil.rmtree(folder / stage, ignore_errors=True)  # of an earlier profile
    path.unlink(missing_ok=True)
    try:
        with _beside(lambda: _tried(take, row), stop):
            yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _tried(keep, row)


def _tried(work: Callable[[], None], row: dict[str, Any]) -> None:
    """A trace is not worth the loss of a run: what is wrong with it goes to the row."""
    try:
        work()
    except (RuntimeError, OSError, ValueError) as error:
        row["trace_problem"] = " ".join(f"{type(error).__name__}: {error}".split())


def _for_perfetto(folder: Path, path: Path) -> None:
    """Write the trace without its `metadata`, which Perfetto does not read."""
    (given,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    with gzip.open(given, "rb") as file:
        trace = json.load(file)
    trace.pop("metadata", None)
    path.write_bytes(gzip.compress(json.dumps(trace).encode()))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"profile: {folder} is not a writable directory ({error})") from None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
