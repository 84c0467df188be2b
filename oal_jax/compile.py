"""`python -m oal_jax.compile --config FILE --topology NAME [--stage NAME] [--config.a.b=VALUE]`.

Compiles the program of a stage ahead of time, for devices that need not be attached, from shapes
alone: no data set, no weights. Prints one JSON object.

  --topology  v5e:2x2, v5e:16x16, v4:2x2x1, v5p:2x2x1, v6e:2x2 (TPU slices of any size; extra
              `tpu`), h100:8 (GPUs of one node; extra `cuda12`), cpu:8 (virtual devices)
  --stage     train (default): the training step; latents: sampling of outlier latents, with the
              sizes of Stable Diffusion v1 if generator.directory is absent; features: the teacher

Keys, null where the compiler gives no answer. For one device: `flops_per_device`, of matrix
products and convolutions, shared evenly; `argument_bytes`, `temp_bytes`, `peak_bytes`, and whether
the peak `fits` in `memory_bytes`. `collectives`: number and bytes of the messages between devices,
by kind. `host_calls`: operations that call the host; there should be none. FLOPs and messages are
those of one training step (a call of `train` runs `steps_per_call` of them), or of one `batch` of
the other stages.

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

    topologies.prepare(args.topology)  # JAX may be imported only now
    from oal_jax.aot import costs, programs
    from oal_jax.runtime import distributed

    devices = topologies.devices_of(args.topology)
    mesh = distributed.make_mesh(config.mesh.model, devices)
    program = programs.make(args.stage, config, mesh)
    memory_bytes = topologies.MEMORY.get(topologies.split(args.topology)[0])
    measured = costs.measure(program, len(devices), memory_bytes)
    print(json.dumps({"topology": args.topology, "stage": args.stage, **measured}))


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
