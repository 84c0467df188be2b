"""`python -m oal_jax.export --workdir DIR --output FOLDER`: a detector that runs without oal_jax.

Writes `detector.jax_export` (uint8 images of any number to label, confidence, ood_score, is_ood;
weights inside), `weights.safetensors`, `model.json` and a model card, `README.md`. The folder
appears whole or not at all. Exit codes as those of `oal_jax.main`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from oal_jax.errors import UserError
from oal_jax.runtime import startup
from oal_jax.runtime.command import Parser, guard

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
FORMAT, MODEL = "oal_jax detector", "model.json"


def run(argv: Sequence[str]) -> None:
    """Parse the arguments, export, print where to."""
    parser = Parser("oal_jax.export", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--platforms", default="cpu,cuda,tpu", help=f"some of {','.join(PLATFORMS)}, with commas"
    )
    args = parser.parse_args(argv[1:])
    platforms = tuple(dict.fromkeys(name.strip() for name in args.platforms.split(",")))
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(f"platform '{name}' is unknown; known: {', '.join(PLATFORMS)}")
    _check_output(args.output)
    startup.use_compilation_cache()
    # These import JAX, so only after the arguments are checked.
    from oal_jax.detection import exported, load
    from oal_jax.stages import run as pipeline

    detector = load.load(args.workdir, args.score, args.keep_id)
    size = exported.write(args.output, detector, pipeline.resolve(args.workdir), platforms)
    print(f"detector by {detector.score.name}, {size / 1e6:.1f} MB: {args.output}")


def _check_output(output: Path) -> None:
    """Refuse a folder with files, unless this command wrote it."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    try:
        replaceable = json.loads((output / MODEL).read_text("utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        replaceable = not any(output.iterdir())
    if not replaceable:
        raise UserError(f"--output {output} holds other files; give an empty or a new folder")


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
