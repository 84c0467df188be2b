"""Scores of all images of a folder as a CSV file."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from oal_jax.data import image_files
from oal_jax.data.image_files import Decoding
from oal_jax.detection.detector import Detector
from oal_jax.errors import UserError
from oal_jax.evaluation.tables import csv_line
from oal_jax.runtime.progress import Bar

COLUMNS = ("path", "prediction", "confidence", "ood_score", "threshold", "is_ood")
_UNREADABLE = "could not be read"
_NAMED = 20  # files that are named, of those that can't be read


def write(file: TextIO, detector: Detector, folder: Path, names: Sequence[str]) -> tuple[int, int]:
    """Write a row for each image; return the number of images and how many of them are OOD."""
    file.write(csv_line(COLUMNS))
    threshold = repr(detector.threshold)
    tally = Counter[str]()
    count = ood = 0
    with Bar(len(names), "score", "image") as bar:
        for batch, images in _batches(detector, folder, names, tally, bar):
            result = detector(images)
            for name, prediction, confidence, value, is_ood in zip(
                batch,
                result.class_names.tolist(),
                result.confidence.tolist(),
                result.ood_score.tolist(),
                result.is_ood.tolist(),
                strict=True,
            ):
                verdict = "true" if is_ood else "false"
                row = (name, prediction, f"{confidence:.6f}", repr(value), threshold, verdict)
                file.write(csv_line(row))
            count += len(batch)
            bar.update(len(batch))
            ood += int(result.is_ood.sum())
    if not count:
        raise UserError(f"none of the {len(names)} image files in {folder} can be read")
    if tally[_UNREADABLE]:
        _warn(f"{tally.pop(_UNREADABLE)} of {len(names)} image files {_UNREADABLE}")
    for note, number in tally.items():
        _warn(f"{number} of {count} images {note}")
    return count, ood


def _batches(detector, folder, names, tally, bar) -> Iterator[tuple[list[str], np.ndarray]]:
    """(names, images) batches of the readable images, all full but the last."""
    size, waiting, images = detector.batch_size, [], []
    decoding = detector.decoding or Decoding.to_shape(detector.image_shape)
    with contextlib.closing(image_files.stream(names, decoding, folder)) as chunks:
        for chunk in chunks:
            for name, reason in chunk.unreadable:
                tally[_UNREADABLE] += 1
                if tally[_UNREADABLE] <= _NAMED:
                    bar.clear()
                    _warn(f"{image_files.some([name])} is left out: {reason}")
            tally.update(chunk.notes)
            bar.total -= len(chunk.unreadable)
            waiting += chunk.names
            images.append(chunk.images)
            while len(waiting) >= size:
                together = np.concatenate(images)
                yield waiting[:size], together[:size]
                waiting, images = waiting[size:], [together[size:]]
    if waiting:
        yield waiting, np.concatenate(images)


def _warn(message: str) -> None:
    print("oal_jax:", message, file=sys.stderr, flush=True)
