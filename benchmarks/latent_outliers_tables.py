"""The tables of suite `latent_outliers`, from its rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import paired
from benchmarks.cases import markdown, spread
from oal_jax.config.benchmarks import LEFT_OUT
from oal_jax.evaluation.tables import MEANS

FULL = "full"  # the problem with all classes


class Run(NamedTuple):
    """The numbers of a run, in percent and seconds; NaN where there are none."""

    near: float  # AUROC of `left_out`, or in problem "full" the mean of its near-OOD sets
    far: float
    left_out: float  # AUROC of `val_left_out`
    families: float  # mean AUROC of the other validation sets
    accuracy: float
    train_s: float
    epoch_s: float
    outlier_s: float


def numbers_of(row: Mapping[str, Any]) -> Run | None:
    """What the tables show of a row; None where the training failed."""
    if row["metrics"] is None:
        return None
    left = row["problem"] != FULL

    def mean(group: str, chosen: Callable[[str], bool] = lambda name: True) -> float:
        values = [
            m["auroc"]
            for m in row["metrics"]
            if m["group"] == group and m["dataset"] not in MEANS.values() and chosen(m["dataset"])
        ]
        return float(np.mean(values)) if values else float("nan")

    nan = float("nan")
    return Run(
        near=mean("near", lambda name: not left or name == LEFT_OUT["near"]),
        far=mean("far"),
        left_out=mean("validation", lambda name: name == LEFT_OUT["validation"]) if left else nan,
        families=mean("validation", lambda name: name != LEFT_OUT["validation"]),
        accuracy=row["metrics"][0]["id_accuracy"],
        train_s=row["train_s"],
        epoch_s=nan if row["epoch_s"] is None else row["epoch_s"],
        outlier_s=nan if row["outlier_s"] is None else row["outlier_s"],
    )


class Table(NamedTuple):
    """The numbers of all runs of a case and a kind of problem, (seeds, problems) each."""

    seeds: list[int]
    runs: list[list[Run]]

    def of(self, field: str) -> np.ndarray:
        """A field of them, (seeds, problems)."""
        return np.array([[getattr(run, field) for run in line] for line in self.runs])


def table_of(
    rows: Sequence[Mapping[str, Any]], case: str, left_out: bool, seeds: Sequence[int] | None = None
) -> Table:
    """The runs of a case: those with a class left out, or those of the whole ID set.

    Args:
      seeds: only these; None: those of which no run failed.
    """
    chosen = [r for r in rows if r["case"] == case and (r["problem"] != FULL) == left_out]
    found = {(r["seed"], r["problem"]): numbers_of(r) for r in chosen}
    problems = list(dict.fromkeys(r["problem"] for r in chosen))
    whole = [
        seed
        for seed in dict.fromkeys(r["seed"] for r in chosen)
        if all(found.get((seed, problem)) for problem in problems)
    ]
    kept = [seed for seed in whole if seeds is None or seed in seeds]
    return Table(kept, [[found[seed, problem] for problem in problems] for seed in kept])


# Heading, whether of the problems with a class left out, field: what is compared with the control.
COMPARED = (
    ("near, class left out", True, "near"),
    ("near, full", False, "near"),
    ("far, class left out", True, "far"),
    ("far, full", False, "far"),
    ("val: class left out", True, "left_out"),
    ("val: families", False, "families"),
    ("ID acc, class left out", True, "accuracy"),
    ("ID acc, full", False, "accuracy"),
)
_COSTS = ("train_s", "epoch_s", "outlier_s")


def differences(
    rows: Sequence[Mapping[str, Any]], case: str, left_out: bool, field: str
) -> np.ndarray | None:
    """Case minus control, (seeds, problems), on the seeds that both have whole; None: none."""
    control = rows[0]["control"]
    both = [table_of(rows, name, left_out).seeds for name in (case, control)]
    seeds = [seed for seed in both[0] if seed in both[1]]
    if not seeds:
        return None
    here, there = (table_of(rows, name, left_out, seeds).of(field) for name in (case, control))
    return here - there


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a case, near-OOD problem by problem, paired differences to the control."""
    names, control = list(dict.fromkeys(r["case"] for r in rows)), rows[0]["control"]
    shown = [c for c in COMPARED if any((r["problem"] != FULL) == c[1] for r in rows)]
    lines = []
    for name in names:
        cells = []
        for _, left_out, field in shown:
            values = table_of(rows, name, left_out).of(field)
            cells.append(spread(values.mean(axis=1)) if values.size else "-")
        failed = sum(r["metrics"] is None for r in rows if r["case"] == name)
        runs = [n for r in rows if r["case"] == name and (n := numbers_of(r))]
        costs = [np.array([getattr(n, field) for n in runs]) for field in _COSTS]
        cells += ["-" if not v.size or np.isnan(v).all() else f"{np.nanmean(v):.3g}" for v in costs]
        lines.append([name, str(len(runs)), str(failed), *cells])
    head = ["case", "runs", "failed", *(c[0] for c in shown), "train s", "s/epoch", "s/outlier"]
    title = f"AUROC of the score `{rows[0]['score']}` and accuracy, percent: mean ± std over seeds"
    text = [title, "", markdown(head, lines), "", *_by_problem(rows, names)]
    if control not in names:
        return "\n".join(text)
    lines = []
    for name in (n for n in names if n != control):
        cells = []
        for _, left_out, field in shown:
            values = differences(rows, name, left_out, field)
            cells.append("-" if values is None else _interval(values))
        lines.append([name, *cells])
    text += [
        f"Minus `{control}` of the same seed and problem: mean [95 % interval over seeds]"
        " [over seeds and problems]",
        "",
        markdown(["case", *(c[0] for c in shown)], lines),
    ]
    return "\n".join(text)


def _by_problem(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    problems = list(dict.fromkeys(r["problem"] for r in rows))
    lines = []
    for name in names:
        columns = [
            table_of([r for r in rows if r["problem"] == p], name, p != FULL).of("near")
            for p in problems
        ]
        lines.append([name, *(spread(c[:, 0]) if c.size else "-" for c in columns)])
    return ["Near-OOD of each problem", "", markdown(["case", *problems], lines), ""]


def _interval(values: np.ndarray) -> str:
    over = ("seeds", "crossed") if values.shape[1] > 1 else ("seeds",)
    found = [paired.paired_interval(values, o) for o in over]
    ends = " ".join(f"[{i.low:+.2f}, {i.high:+.2f}]" for i in found)
    return f"{found[0].mean:+.2f} {ends}"
