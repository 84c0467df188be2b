"""Results as rows, as CSV files and as a text table for the terminal."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oal_jax.artifacts import write_bytes
from oal_jax.errors import UserError

MEANS = {"near": "nearood", "far": "farood", "validation": "valood"}  # group -> its mean row


class Row(NamedTuple):
    """One score on one OOD set, metrics in percent; the fields are the columns of the CSV."""

    score: str
    dataset: str
    group: str  # near, far or validation
    auroc: float
    aupr_in: float
    aupr_out: float
    fpr_at_95_ood_tpr: float
    fpr_at_95_id_tpr: float
    id_accuracy: float


def is_mean(row: Row) -> bool:
    """Whether a row is the mean over a group."""
    return row.dataset == MEANS[row.group]


def with_means(rows: Sequence[Row], groups: Iterable[str]) -> list[Row]:
    """`rows`, then a row a score and group: the unweighted mean over the sets of the group.

    Args:
      rows: one a score and set, no means.
      groups: keys of `MEANS`; a group without sets gets no row.
    """
    groups = tuple(groups)
    means = []
    for score in dict.fromkeys(row.score for row in rows):
        for group in groups:
            members = [row[3:] for row in rows if (row.score, row.group) == (score, group)]
            if members:
                mean = np.mean(np.asarray(members, np.float64), axis=0)
                means.append(Row(score, MEANS[group], group, *map(float, mean)))
    return [*rows, *means]


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes `rows` with a header line, metrics with 4 decimals, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        writer.writerow([*row[:3], *(f"{value:.4f}" for value in row[3:])])
    write_bytes(Path(path), text.getvalue().encode())


def read_csv(path: str | Path) -> list[Row]:
    """The rows that `write_csv` wrote.

    Raises:
      UserError: the file is missing or has other columns.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is missing; run the stage report")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if next(reader, None) != list(Row._fields):
            raise UserError(f"{path} does not have the columns {', '.join(Row._fields)}")
        return [Row(*line[:3], *map(float, line[3:])) for line in reader]


def format_table(rows: Sequence[Row], width: int = 100) -> str:
    """A table for the terminal: a line a score, a column a set, group means first.

    A cell is `AUROC / FPR`, in percent, where FPR is `fpr_at_95_ood_tpr`. Columns that do not fit
    into `width` characters go into another block below.
    """
    rows = sorted(rows, key=lambda row: not is_mean(row))  # stable: keeps the order otherwise
    scores = list(dict.fromkeys(row.score for row in rows))
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    cells = {
        (row.score, row.dataset): f"{row.auroc:.2f} / {row.fpr_at_95_ood_tpr:.2f}" for row in rows
    }
    accuracy = {row.score: f"{row.id_accuracy:.2f}" for row in rows}
    first = [["score", *scores], ["acc", *(accuracy[s] for s in scores)]]
    columns = [[d, *(cells.get((s, d), "-") for s in scores)] for d in datasets]

    blocks: list[list[list[str]]] = []
    used = width + 1
    for column in columns:
        needed = 2 + max(map(len, column))
        if used + needed > width:
            # Only the first block repeats the accuracy; each names its scores.
            blocks.append(list(first if not blocks else first[:1]))
            used = sum(2 + max(map(len, c)) for c in blocks[-1]) - 2
        blocks[-1].append(column)
        used += needed
    lines = ["AUROC / FPR at 95 % OOD TPR, and ID accuracy, in percent"]
    for block in blocks:
        lines.append("")
        widths = [max(map(len, column)) for column in block]
        for cells_of_line in zip(*block, strict=True):
            name, *values = cells_of_line
            padded = [v.rjust(w) for v, w in zip(values, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines) + "\n"
