"""Result rows, their CSV files in this project's layout and in OpenOOD's, and a text table."""

import csv
import re
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
    write_bytes(Path(path), csv_bytes(rows, columns))


def csv_bytes(rows: Iterable[Sequence[object]], columns: Sequence[str]) -> bytes:
    """A header line and `rows` as CSV. Floats get 4 decimals, None an empty cell."""
    cells = ([f"{v:.4f}" if isinstance(v, float) else v for v in row] for row in rows)
    lines = [csv_line(row) for row in (columns, *cells)]
    return "".join(lines).encode("utf-8", "surrogateescape")  # names of files are bytes


def csv_line(row: Iterable[object]) -> str:
    """One line of CSV that a spreadsheet opens without running what a name holds.

    Text that a spreadsheet would take for a formula gets an apostrophe in front, which `read_cell`
    removes. So does the text after a comma, semicolon, tab or line break within a name: it is a
    cell of its own in a country where that character separates cells.
    """
    return ",".join(map(_cell, row)) + "\n"


def read_cell(text: str) -> str:
    """The text that `csv_line` wrote, from a cell as the module `csv` reads it."""
    return re.sub(r"(^|[,;\t\r\n])'", r"\1", text)


# A place where a cell may begin, before what makes it a formula. An apostrophe that is there
# already gets another one, so that reading gives it back.
_FORMULA = re.compile("(^|[,;\t\r\n])(?=[\"\\s]*[=+\\-@\t\r\n'\uff1d\uff0b\uff0d\uff20])")


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    if not _is_number(text):
        text = _FORMULA.sub(r"\1'", text)
    if set(',;\t\r\n"').isdisjoint(text):
        return text
    return '"' + text.replace('"', '""') + '"'


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()


def read_csv(path: str | Path) -> list[Row]:
    """Reads the rows of an `ood.csv`.

    Raises:
      UserError: the file is missing or has other columns.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is missing; run the stage report")
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        if next(reader, None) != list(Row._fields):
            raise UserError(f"{path} does not have the columns {', '.join(Row._fields)}")
        return [Row(*map(read_cell, line[:3]), *map(float, line[3:])) for line in reader]


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
            name = read_cell(line["dataset"].strip())
            rows.append(Row("", name, "", fpr_at_95_id_tpr=np.nan, **metrics))
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
