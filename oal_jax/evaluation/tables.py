"""Results as rows, as CSV files (our layout and OpenOOD's) and as a text table."""

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


class Shifted(NamedTuple):
    """One score on one covariate-shifted ID set, in percent; the fields are the columns."""

    score: str
    dataset: str
    id_accuracy: float
    rejected: float  # share above the threshold, which is called OOD though its class is known


class OpenOODRow(NamedTuple):
    """A line of OpenOOD v1.5's result files, in percent."""

    dataset: str
    fpr95: float  # FPR@95: ID rejected when 95 % of OOD is caught, our `fpr_at_95_ood_tpr`
    auroc: float
    aupr_in: float  # ID positive
    aupr_out: float  # OOD positive
    accuracy: float


_OPENOOD = ("dataset", "FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC")


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


def aggregate(runs: Sequence[Sequence[Row]]) -> tuple[list[Row], list[Row]]:
    """Mean and sample standard deviation (n - 1) of every row over several runs.

    Args:
      runs: the rows of each run, such as one a seed; all of the same scores and sets.

    Returns:
      Two lists of rows in the order of the first run. Of a single run the deviations are NaN.

    Raises:
      UserError: no runs, or runs whose rows are not of the same scores and sets.
    """
    if not runs:
        raise UserError("no runs to aggregate; give at least one")
    tables = [{row[:3]: row[3:] for row in rows} for rows in runs]
    for table in tables:
        missing = table.keys() ^ tables[0].keys()
        if missing:
            score, dataset, _ = sorted(missing)[0]
            raise UserError(
                f"some runs have no row of score {score} on {dataset}; give runs of the same scores"
                " and sets"
            )
    means, deviations = [], []
    for key in tables[0]:
        values = np.array([table[key] for table in tables], np.float64)
        spread = (
            np.std(values, axis=0, ddof=1) if len(runs) > 1 else np.full(values.shape[1], np.nan)
        )
        means.append(Row(*key, *map(float, np.mean(values, axis=0))))
        deviations.append(Row(*key, *map(float, spread)))
    return means, deviations


def write_lines(path: str | Path, lines: Iterable[Sequence[object]]) -> None:
    """Writes lines of cells as CSV, atomically; the first line is the header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_bytes(Path(path), text.getvalue().encode())


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes `rows` with a header line, metrics with 4 decimals, atomically."""
    lines = ([*row[:3], *(f"{value:.4f}" for value in row[3:])] for row in rows)
    write_lines(path, [Row._fields, *lines])


def write_shifted(path: str | Path, rows: Iterable[Shifted]) -> None:
    """Writes the rows of covariate-shifted ID sets, percent with 4 decimals, atomically."""
    lines = ([*row[:2], *(f"{value:.4f}" for value in row[2:])] for row in rows)
    write_lines(path, [Shifted._fields, *lines])


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


def as_openood(rows: Sequence[Row], score: str) -> list[OpenOODRow]:
    """The near sets of one score, their mean, the far sets, their mean, as OpenOOD orders them."""
    chosen = [row for row in rows if row.score == score and row.group in ("near", "far")]
    chosen.sort(key=lambda row: (row.group == "far", is_mean(row)))  # stable within both
    return [
        OpenOODRow(
            row.dataset,
            row.fpr_at_95_ood_tpr,
            row.auroc,
            row.aupr_in,
            row.aupr_out,
            row.id_accuracy,
        )
        for row in chosen
    ]


def write_openood(path: str | Path, rows: Iterable[OpenOODRow]) -> None:
    """Writes OpenOOD's header and lines, percent with 2 decimals, atomically."""
    lines = ([row.dataset, *(f"{value:.2f}" for value in row[1:])] for row in rows)
    write_lines(path, [_OPENOOD, *lines])


def read_openood(path: str | Path) -> list[OpenOODRow]:
    """The lines of a result file of OpenOOD, ours or theirs.

    Columns are found by their names: further ones (CCR) are ignored, and the first may have none.
    Of a cell `91.20 ± 0.30` the mean is taken. Files of OpenOOD before v1.5 have AUPR_IN and
    AUPR_OUT the other way round, which no file tells.

    Raises:
      UserError: the file is missing, lacks a column, or holds what is no number.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; give a CSV file in OpenOOD's layout")
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [line for line in csv.reader(file) if line]
    header = [cell.strip() for cell in lines[0]] if lines else []
    header = ["dataset", *header[1:]] if header and not header[0] else header
    missing = [name for name in _OPENOOD if name not in header]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]}; OpenOOD's layout is {','.join(_OPENOOD)}"
        )
    columns = [header.index(name) for name in _OPENOOD]
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            name, *cells = (line[column] for column in columns)
            rows.append(OpenOODRow(name.strip(), *(float(c.split("±")[0]) for c in cells)))
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, line {number} is not a data set and five numbers: {','.join(line)}"
            ) from None
    return rows


def difference(ours: Sequence[OpenOODRow], theirs: Sequence[OpenOODRow]) -> list[str]:
    """Lines of text: what `ours` has above `theirs`, set by set, and the sets of only one of them.

    Names of sets are compared without case.
    """
    wanted = {row.dataset.lower(): row for row in theirs}
    found = {row.dataset.lower() for row in ours}
    width = max((len(row.dataset) for row in [*ours, *theirs]), default=0)
    lines = []
    for row in ours:
        other = wanted.get(row.dataset.lower())
        if other is None:
            lines.append(f"{row.dataset.ljust(width)}  only in ours")
            continue
        cells = [  # + 0.0 turns -0.0 into 0.0
            f"{name} {b:.2f} -> {a:.2f} ({round(a - b, 2) + 0.0:+.2f})"
            for name, a, b in zip(_OPENOOD[1:], row[1:], other[1:], strict=True)
        ]
        lines.append(f"{row.dataset.ljust(width)}  " + ", ".join(cells))
    lines += [
        f"{row.dataset.ljust(width)}  only in theirs"
        for row in theirs
        if row.dataset.lower() not in found
    ]
    return lines


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
