"""`python -m oal_jax.compile --config FILE --topology NAME [--stage NAME] [--config.a.b=VALUE]`.

Compiles the program of a stage ahead of time, for devices that need not be there, from shapes
alone: no data set, no weights. Prints one JSON object.

  --topology  v5e:2x2, v5e:16x16, v4:2x2x1, v5p:2x2x1, v6e:2x2 (TPU slices of any size; extra
              `tpu`), h100:8 (GPUs of one node; extra `cuda12`), cpu:8 (virtual devices)
  --stage     train (default): the training step; latents: the sampling of outlier latents, of
              Stable Diffusion v1 where generator.directory is not there; features: the teacher

Keys, null where the compiler does not tell: `devices` as JAX counts them; for each of them
`argument_bytes`, `temp_bytes`, `peak_bytes`, and whether that `fits` its memory;
`flops_per_device`, of matrix products and convolutions, shared evenly over the devices, beside the
compiler's own count `compiler_flops_per_device`, which takes each loop's body once; `collectives`,
count and bytes by kind, and `origins`, the operations that those other than all-reduce come from;
`host_calls` (none may be there). All but the bytes are a training step's (a call of `train` runs
`steps_per_call` of them), or a chunk's or batch's of the other stages. `estimate`: a roofline of
the chip's published numbers, no measurement.

Exit codes as those of `oal_jax.main`.
"""

import json
import sys
from collections.abc import Sequence

from oal_jax.config.flags import read_for_compiling
from oal_jax.errors import UserError
from oal_jax.runtime.command import BareParser, guard

STAGES = ("train", "latents", "features")


def run(argv: Sequence[str]) -> None:
    """Parse the arguments, compile, print the object."""
    parser = BareParser("oal_jax.compile", __doc__)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--stage", default="train")
    args, rest = parser.parse_known_args(argv[1:])
    if args.stage not in STAGES:
        raise UserError(f"--stage {args.stage} is not compiled; known: {', '.join(STAGES)}")
    config = read_for_compiling(rest)
    from oal_jax.aot import topologies

    topologies.prepare(args.topology)  # JAX starts only now
    from oal_jax.aot import summary

    print(json.dumps(summary.compile_stage(config, topologies.describe(args.topology), args.stage)))


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
