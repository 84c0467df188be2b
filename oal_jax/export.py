"""`python -m oal_jax.export --workdir DIR --output FOLDER`: a detector that runs without oal_jax.

`--detector DIR` takes a saved detector in place of a run. Writes `detector.jax_export` (uint8
images of any number to label, confidence, ood_score, is_ood; weights inside), `preprocess.py`
(image files to such images), `weights.safetensors`, `model.json` and a model card, `README.md`;
with `--onnx` also `detector.onnx`. The folder appears whole or not at all. Exit codes as those of
`oal_jax.main`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from oal_jax.detection import folder
from oal_jax.errors import UserError
from oal_jax.runtime import startup
from oal_jax.runtime.command import Parser, guard

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")


def run(argv: Sequence[str]) -> None:
    """Parse the arguments, export, print where to."""
    parser = Parser("oal_jax.export", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--platforms", default="cpu,cuda,tpu", help=f"some of {','.join(PLATFORMS)}, with commas"
    )
    parser.add_argument("--onnx", action="store_true", help="also write detector.onnx")
    args = parser.parse_args(argv[1:])
    platforms = tuple(dict.fromkeys(name.strip() for name in args.platforms.split(",")))
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(f"platform '{name}' is unknown; known: {', '.join(PLATFORMS)}")
    folder.check_replaceable(args.output, folder.MODEL, folder.EXPORTED)
    startup.use_compilation_cache()
    # These import JAX, so only after the arguments are checked.
    from oal_jax.detection import exported, load

    detector = load.load(args.directory, args.score, args.keep_id)
    size = exported.write(args.output, detector, platforms, args.onnx)
    print(f"detector by {detector.score.name}, {size / 1e6:.1f} MB: {args.output}")


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
