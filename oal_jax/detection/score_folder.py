"""Scores of all images of a folder as a CSV file."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from oal_jax.data import image_files
from oal_jax.detection.detector import Detector
from oal_jax.errors import UserError
from oal_jax.evaluation.tables import csv_line
from oal_jax.runtime.progress import Bar

COLUMNS = ("path", "prediction", "confidence", "ood_score", "threshold", "is_ood", "percentile")
_UNREADABLE = "could not be read"
_NAMED = 20  # files that are named, of those that can't be read


def write(file: TextIO, detector: Detector, folder: Path, names: Sequence[str]) -> tuple[int, int]:
    """Write a row for each image; return the number of images and how many of them are OOD."""
    file.write(csv_line(COLUMNS))
    threshold = repr(detector.threshold)
    tally = Counter[str]()
    count = ood = 0
    rows = detector.iter_files(folder / name for name in names)
    with Bar(len(names), "score", "image") as bar:
        for name, row in zip(names, rows, strict=True):
            result = row.result
            if result is None:
                bar.total -= 1
                tally[_UNREADABLE] += 1
                if tally[_UNREADABLE] <= _NAMED:
                    bar.clear()
                    _warn(f"{image_files.some([name])} is left out: {row.reason}")
                continue
            tally.update(row.notes)
            label = result.label if result.class_names is None else result.class_names
            values = (name, label, f"{result.confidence:.6f}", repr(result.ood_score.item()))
            verdict = "true" if result.is_ood else "false"
            file.write(csv_line((*values, threshold, verdict, f"{result.percentile:.4g}")))
            count += 1
            ood += int(result.is_ood)
            if count % detector.batch_size == 0:  # rows come by the batch
                bar.update(detector.batch_size)
        bar.update(count % detector.batch_size)
    if not count:
        raise UserError(f"none of the {len(names)} image files in {folder} can be read")
    if tally[_UNREADABLE]:
        _warn(f"{tally.pop(_UNREADABLE)} of {len(names)} image files {_UNREADABLE}")
    for note, number in tally.items():
        _warn(f"{number} of {count} images {note}")
    return count, ood


def _warn(message: str) -> None:
    print("oal_jax:", message, file=sys.stderr, flush=True)
