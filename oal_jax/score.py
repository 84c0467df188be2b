"""`python -m oal_jax.score --workdir DIR --images FOLDER --output scores.csv`: score image files.

`--detector DIR` takes a saved detector in place of a run. Columns: path (below FOLDER), prediction
(name of the class), confidence (largest softmax probability), ood_score (higher = more OOD),
threshold, is_ood (ood_score above it), percentile (of ID validation images with a lower ood_score).

Images in FOLDER and below are decoded as in training. Files that can't be read go to stderr, and
the rest is scored. Exit codes as those of `oal_jax.main`.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from oal_jax.errors import UserError
from oal_jax.runtime import startup, writing
from oal_jax.runtime.command import Parser, guard


def run(argv: Sequence[str]) -> None:
    """Parse the arguments, score the folder, print a line about it."""
    parser = Parser("oal_jax.score", __doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder with image files")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--batch-size", type=int, help="images a call of the model")
    args = parser.parse_args(argv[1:])
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be 1 or more")
    if args.images.is_file():
        raise UserError(f"--images {args.images} is a file; give its folder")
    startup.use_compilation_cache()
    from oal_jax.data import image_files

    files = image_files.find(args.images)
    if not files.names:
        left_out = files.left_out()
        raise UserError(f"{args.images} holds no image files{left_out and f'; {left_out}'}")
    # Names that are not UTF-8 come out as the bytes that they are.
    text = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with writing.output_file(args.output, "w", **text) as file:
        # This imports JAX, so only after the arguments are checked.
        from oal_jax.detection import load, score_folder

        detector = load.load(args.directory, args.score, args.keep_id, args.batch_size)
        start = time.monotonic()
        count, ood = score_folder.write(file, detector, args.images, files.names)
        seconds = time.monotonic() - start
    stream = sys.stderr if writing.is_stdout(args.output) else sys.stdout  # nothing in the table
    print(
        f"{count} images, {ood} of them OOD ({ood / count:.1%}) by {detector.score.name} above"
        f" {detector.threshold:.6g}; {count / seconds:.0f} images/s: {args.output}",
        file=stream,
    )
    if left_out := files.left_out():
        print(left_out, file=stream)


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
