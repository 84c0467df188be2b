"""Scores of all images of a folder as a CSV file."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from oal_jax.data import image_files
from oal_jax.detection.detector import Detector
from oal_jax.errors import UserError
from oal_jax.evaluation.tables import csv_line

COLUMNS = ("path", "prediction", "confidence", "ood_score", "threshold", "is_ood")


def write(file: TextIO, detector: Detector, folder: Path, names: Sequence[str]) -> tuple[int, int]:
    """Write a row for each image; return the number of images and how many of them are OOD."""
    file.write(csv_line(COLUMNS))
    threshold = repr(detector.threshold)
    tally = {"converted": 0, "unreadable": 0}
    count = ood = 0
    with tqdm(total=len(names), desc="score", unit="image", mininterval=1.0) as bar:
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
            ood += int(result.is_ood.sum())
    if not count:
        raise UserError(f"none of the {len(names)} image files in {folder} can be read")
    if tally["unreadable"]:
        _warn(f"{tally['unreadable']} of {len(names)} image files could not be read")
    if tally["converted"]:
        channels = detector.image_shape[2]
        _warn(
            f"{tally['converted']} of {count} images were converted to the model's"
            f" {channels} channel{'s' if channels > 1 else ''} of 8 bits"
        )
    return count, ood


def _batches(detector, folder, names, tally, bar) -> Iterator[tuple[list[str], np.ndarray]]:
    """(names, images) batches of the readable images, all full but the last."""
    size, waiting, images = detector.batch_size, [], []
    with contextlib.closing(image_files.stream(folder, names, detector.image_shape)) as chunks:
        for chunk in chunks:
            for name, reason in chunk.unreadable:
                bar.clear()
                _warn(f"{name if name.isprintable() else ascii(name)} is left out: {reason}")
            tally["unreadable"] += len(chunk.unreadable)
            tally["converted"] += chunk.converted
            bar.update(len(chunk.names) + len(chunk.unreadable))
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
