"""Devices to compile for: TPU slices and NVIDIA nodes by name, none of them attached.

libtpu and XLA's CUDA plugin know the chips that they compile for, so a program for 256 TPUs or for
8 H100 compiles on a machine that has neither. Nothing runs there.
"""

import difflib
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from oal_jax.errors import UserError

EXAMPLES = ("v4:2x2x1", "v5e:2x2", "v5e:16x16", "v5p:2x2x1", "v6e:2x2", "h100:8", "cpu:8")


class Chip(NamedTuple):
    """Published numbers of one device, as JAX counts devices.

    Attributes:
      flops: peak FLOP/s of matrix products, by the type of their inputs at JAX's default precision:
        float32 is one pass of bfloat16 on a TPU and TensorFloat-32 on an H100. No sparsity.
      memory_bytes: of the device.
      usable: share of it that a program may fill.
      bandwidth: of that memory, in bytes a second.
      link: bytes a second that leave the device towards its neighbours, all links, one way.
    """

    flops: Mapping[str, float]
    memory_bytes: float
    usable: float
    bandwidth: float
    link: float


def _tpu(flops: float, memory_gib: float, bandwidth: float, link: float) -> Chip:
    # libtpu itself refuses a program that does not fit.
    both = {"bfloat16": flops, "float32": flops}
    return Chip(both, memory_gib * 2**30, 1.0, bandwidth, link)


# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, "System architecture": peak compute per chip
# (bf16), HBM capacity and bandwidth, bidirectional inter-chip interconnect bandwidth, halved here.
# H100: NVIDIA's data sheet of the SXM5 card (80 GB of HBM3, 3.35 TB/s, 900 GB/s of NVLink in both
# directions), and "NVIDIA H100 Tensor Core GPU Architecture", table 2, for rates without sparsity.
CHIPS = {
    "v4": _tpu(275e12, 32, 1228e9, 150e9),
    "v5e": _tpu(197e12, 16, 819e9, 100e9),
    "v5p": _tpu(459e12, 95, 2765e9, 300e9),
    "v6e": _tpu(918e12, 32, 1640e9, 200e9),
    # JAX's allocator takes three quarters of a GPU's memory unless it is told otherwise.
    "h100": Chip({"bfloat16": 989.4e12, "float32": 494.7e12}, 80e9, 0.75, 3350e9, 450e9),
}

# XLA's description of the H100 SXM5 (its GpuTargetConfigProto): the limits of compute capability
# 9.0 (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"), the
# numbers of the card, and the library versions that JAX's CUDA 12 wheels ask for.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 80000000000
  driver_version: "12.8.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.8.0"
}
"""


class Topology(NamedTuple):
    """Devices of one kind.

    Attributes:
      name: as the user wrote it.
      devices: to make a mesh of.
      platform: "tpu", "cuda" or "cpu".
      chip: what is published of them; of processors nothing is.
    """

    name: str
    devices: list[Any]
    platform: str
    chip: Chip | None


def prepare(name: str) -> None:
    """Set what JAX reads when it starts: call it before anything imports JAX.

    Raises:
      UserError: see `split`; or the compiler for these devices is not installed.
    """
    kind, size = split(name)
    # No backend but the CPU's starts: the others would look for devices.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if kind == "cpu":
        os.environ["JAX_NUM_CPU_DEVICES"] = size
    elif kind == "h100":
        _want(name, "jax_plugins.xla_cuda12", "cuda12")
    else:
        _want(name, "libtpu", "tpu")
        # libtpu asks the network who it is unless it is told, and wants the chips for itself.
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-256"
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"


def split(name: str) -> tuple[str, str]:
    """("v5e", "16x16") of "v5e:16x16".

    Raises:
      UserError: no such kind of device, or no such size.
    """
    kind, _, size = name.partition(":")
    kinds = (*CHIPS, "cpu")
    if kind not in kinds:
        near = difflib.get_close_matches(name, EXAMPLES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"--topology '{name}' is unknown; nearest: '{near}'; known: {', '.join(EXAMPLES)}, and"
            " other sizes of these"
        )
    right = r"[1-9]\d*(x[1-9]\d*)+" if kind.startswith("v") else r"[1-9]\d*"
    if not re.fullmatch(right, size):
        example = next(e for e in EXAMPLES if e.startswith(f"{kind}:"))
        raise UserError(f"--topology '{name}' has no size of that form; one is '{example}'")
    return kind, size


def describe(name: str) -> Topology:
    """The devices of a topology; `prepare(name)` came first.

    Raises:
      UserError: the compiler for these devices knows no slice of that size.
    """
    import jax
    from jax.experimental import topologies

    kind, size = split(name)
    chip = CHIPS.get(kind)
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < int(size):
            raise UserError(f"--topology '{name}': JAX has started with {len(devices)} devices")
        return Topology(name, devices[: int(size)], "cpu", None)
    try:
        if kind == "h100":
            made = topologies.get_topology_desc(
                platform="cuda",
                topology_name="h100",
                topology=f"1x{size}x1",  # one node
                target_config=_H100,
            )
            return Topology(name, list(made.devices), "cuda", chip)
        # As JAX shows a v4 to its users: the two cores of a chip are one device.
        options = {"chip_config_name": "megacore"} if kind == "v4" else {}
        made = topologies.get_topology_desc(name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology '{name}': {str(error).splitlines()[0]}") from None
    return Topology(name, list(made.devices), "tpu", chip)


def _want(name: str, module: str, extra: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if not found:
        raise UserError(
            f"--topology '{name}' needs the package {module.partition('.')[2] or module}:"
            f" pip install 'oal-jax[{extra}]'"
        )
