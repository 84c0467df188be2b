"""Result rows, their CSV files in this project's layout and in OpenOOD's, and a text table."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oal_jax.errors import UserError
from oal_jax.runtime.artifacts import write_bytes

MEANS = {"near": "nearood", "far": "farood", "validation": "valood"}  # group -> its mean row


class Row(NamedTuple):
    """One score on one OOD set, metrics in percent. The fields are the columns of the CSV."""

    score: str
    dataset: str
    group: str  # near, far or validation
    auroc: float
    aupr_in: float
    aupr_out: float
    fpr_at_95_ood_tpr: float
    fpr_at_95_id_tpr: float
    id_accuracy: float


class Shifted(NamedTuple):
    """One score on one covariate-shifted ID set, in percent. The fields are the columns."""

    score: str
    dataset: str
    id_accuracy: float
    rejected: float  # share above the threshold: called OOD although its class is known


# Columns of OpenOOD v1.5's result files and the fields of `Row` that they hold. ID is the positive
# class of AUPR_IN, OOD that of AUPR_OUT.
OPENOOD = {
    "FPR@95": "fpr_at_95_ood_tpr",
    "AUROC": "auroc",
    "AUPR_IN": "aupr_in",
    "AUPR_OUT": "aupr_out",
    "ACC": "id_accuracy",
}


def is_mean(row: Row) -> bool:
    """Whether a row is the mean over a group."""
    return row.dataset == MEANS[row.group]


def with_means(rows: Sequence[Row], groups: Iterable[str]) -> list[Row]:
    """`rows`, then one row per score and group: the unweighted mean over the group's sets.

    Args:
      rows: one per score and set, no means.
      groups: keys of `MEANS`. A group without sets gets no row.
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


def write_csv(
    path: str | Path, rows: Iterable[Sequence[object]], columns: Sequence[str] = Row._fields
) -> None:
    """Writes a header line and `rows`, atomically. Floats get 4 decimals, None an empty cell."""
    cells = ([f"{v:.4f}" if isinstance(v, float) else v for v in row] for row in rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *cells])
    write_bytes(Path(path), text.getvalue().encode())


def read_csv(path: str | Path) -> list[Row]:
    """Reads the rows of an `ood.csv`.

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


def write_openood(path: str | Path, rows: Iterable[Row], score: str) -> None:
    """Writes one score in OpenOOD's layout, percent with 2 decimals, atomically.

    The order is OpenOOD's: near sets, their mean, far sets, their mean.
    """
    chosen = [row for row in rows if row.score == score and row.group in ("near", "far")]
    chosen.sort(key=lambda row: (row.group == "far", is_mean(row)))
    lines = (
        [row.dataset, *(f"{getattr(row, field):.2f}" for field in OPENOOD.values())]
        for row in chosen
    )
    write_csv(path, lines, ("dataset", *OPENOOD))


def read_openood(path: str | Path) -> list[Row]:
    """Reads a result file of OpenOOD v1.5. Score and group are empty: the file names neither.

    Columns are identified by name. Other columns (CCR) are ignored, and the first needs no name.
    A cell `91.20 ± 0.30` counts as its mean. Files of OpenOOD before v1.5 have AUPR_IN and AUPR_OUT
    swapped, which cannot be detected.

    Raises:
      UserError: the file is missing or empty, lacks a column or has a cell that is not a number.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; give a CSV file in OpenOOD's layout")
    rows, columns = [], ("dataset", *OPENOOD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = [name.strip() for name in reader.fieldnames or [""]]
        reader.fieldnames = [names[0] or "dataset", *names[1:]]
        missing = [name for name in columns if name not in reader.fieldnames]
        if missing:
            layout = ",".join(columns)
            raise UserError(f"{path} has no column {missing[0]}; OpenOOD's layout is {layout}")
        for line in reader:
            try:
                metrics = {OPENOOD[n]: float(line[n].split("±")[0]) for n in OPENOOD}
            except (AttributeError, ValueError):
                raise UserError(
                    f"{path}, line {reader.line_num} is not a data set and five numbers"
                ) from None
            rows.append(Row("", line["dataset"].strip(), "", fpr_at_95_id_tpr=np.nan, **metrics))
    if not rows:
        raise UserError(f"{path} has no lines below its header")
    return rows


def format_table(rows: Sequence[Row], width: int = 100) -> str:
    """A table for the terminal: one line per score, one column per set, group means first.

    A cell is `AUROC / FPR` in percent, where FPR is `fpr_at_95_ood_tpr`. Columns that do not fit
    into `width` characters continue in another block below.
    """
    rows = sorted(rows, key=lambda row: not is_mean(row))
    cells = {
        (row.dataset, row.score): f"{row.auroc:.2f} / {row.fpr_at_95_ood_tpr:.2f}" for row in rows
    }
    accuracy = {row.score: f"{row.id_accuracy:.2f}" for row in rows}
    names = ["score", *accuracy]
    blocks = [[names, ["acc", *accuracy.values()]]]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        column = [dataset, *(cells.get((dataset, score), "-") for score in accuracy)]
        if len(aligned(list(zip(*blocks[-1], column, strict=True)))[0]) > width:
            blocks.append([names])
        blocks[-1].append(column)
    lines = ["AUROC / FPR at 95 % OOD TPR, and ID accuracy, in percent"]
    for block in blocks:
        lines += ["", *aligned(list(zip(*block, strict=True)))]
    return "\n".join(lines) + "\n"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text in columns: the first is flush left, the others are flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
