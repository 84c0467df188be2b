"""The result of a run in the terminal."""

import sys
from pathlib import Path

from oal_jax.evaluation import headline
from oal_jax.evaluation.tables import format_table, read_csv
from oal_jax.runtime import processes


def show(report: Path, smoke: bool) -> None:
    """Print the table of a report, its headline score and, on stderr, its warnings.

    Args:
      report: directory of the stage report.
      smoke: whether all sizes were tiny.

    Raises:
      UserError: a file is missing or damaged.
    """
    if smoke:
        print("SMOKE: all sizes were tiny, and the numbers mean nothing\n")
    rows, chosen = read_csv(report / "ood.csv"), headline.read(report)
    if not rows and (report / "validation.csv").is_file():
        print("There are no near- or far-OOD sets. On the validation OOD sets:")
        rows = read_csv(report / "validation.csv")
    if rows:
        first = chosen.score if chosen else rows[0].score
        print(format_table(sorted(rows, key=lambda row: row.score != first)))
    if chosen:
        print(f"headline score: {chosen.score}, {chosen.reason}; --score NAME takes another")
    print(f"report: {report / 'index.html'}", flush=True)
    for warning in chosen.warnings if chosen and processes.is_main() else ():
        print(f"oal_jax: WARNING: {warning}", file=sys.stderr, flush=True)
