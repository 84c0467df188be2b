"""`python -m oal_jax.score --workdir DIR --images FOLDER --output scores.csv`: score image files.

Columns: path (below FOLDER), prediction (name of the class), confidence (largest softmax
probability), ood_score (higher = more OOD), threshold, is_ood (ood_score above the threshold).

Every image in FOLDER and below is upright by its EXIF tag, resized on its shorter side, cropped in
the centre, and gets the channels of the model. Files that can't be read are listed on stderr; the
rest is scored. Exit codes as those of `oal_jax.main`.
"""

import contextlib
import csv
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from oal_jax import compilation_cache
from oal_jax.arguments import Parser
from oal_jax.errors import UserError
from oal_jax.main import guard

COLUMNS = ("path", "prediction", "confidence", "ood_score", "threshold", "is_ood")


def run(argv: Sequence[str]) -> None:
    """Parse the arguments, score the folder, print a line about it."""
    parser = Parser("oal_jax.score", __doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder with image files")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--batch-size", type=int, default=256, help="images a call of the model")
    args = parser.parse_args(argv[1:])
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be 1 or more")
    compilation_cache.keep_programs()
    from oal_jax.data import folder

    found = folder.find(args.images)
    if not found.names:
        others = f", only {found.others} other files" if found.others else ""
        raise UserError(f"{args.images} holds no image files{others}")
    with _whole_or_not_at_all(args.output) as file:
        from oal_jax import detector  # JAX starts only once the arguments are known to be right

        made = detector.load(args.workdir, args.score, args.keep_id, args.batch_size)
        start = time.monotonic()
        count, ood = _write(file, made, args.images, found.names)
        seconds = time.monotonic() - start
    print(
        f"{count} images, {ood} of them OOD ({ood / count:.1%}) by {made.score.name} above"
        f" {made.threshold:.6g}; {seconds:.1f} s, {count / seconds:.0f} images/s: {args.output}"
    )
    if found.others:
        print(f"{found.others} other files in {args.images} are not images by their names")


def _write(file: TextIO, detector, folder: Path, names: Sequence[str]) -> tuple[int, int]:
    """Scores the named images, a row each; how many there were, and how many of them OOD."""
    from tqdm import tqdm

    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
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
                writer.writerow(row)
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
    """Full batches of decoded images (the last one may be less), whatever could not be read."""
    from oal_jax.data.folder import stream

    size, kept, images = detector.batch_size, [], []
    with contextlib.closing(stream(folder, names, detector.image_shape)) as chunks:
        for chunk in chunks:
            for name, reason in chunk.unreadable:
                bar.clear()
                _warn(f"{name if name.isprintable() else ascii(name)} is left out: {reason}")
            tally["unreadable"] += len(chunk.unreadable)
            tally["converted"] += chunk.converted
            bar.update(len(chunk.names) + len(chunk.unreadable))
            kept += chunk.names
            images.append(chunk.images)
            while len(kept) >= size:
                together = np.concatenate(images)
                yield kept[:size], together[:size]
                kept, images = kept[size:], [together[size:]]
    if kept:
        yield kept, np.concatenate(images)


def _warn(message: str) -> None:
    print("oal_jax:", message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _whole_or_not_at_all(path: Path) -> Iterator[TextIO]:
    """A text file that has its name only once it is written to its end."""
    temporary = path.with_name(path.name + ".partial")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; give the name of a CSV file")
    try:
        # Names that are no UTF-8 come out as the bytes that they are.
        file = temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"--output {path} can't be written ({error.strerror})") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
