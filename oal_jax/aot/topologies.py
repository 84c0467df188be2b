"""Devices to compile for that need not be attached: TPU slices, NVIDIA nodes, virtual CPUs.

libtpu and XLA's CUDA plugin know the chips that they compile for, so a program for 256 TPUs or for
8 H100 compiles on a machine that has neither. Nothing runs there.
"""

import importlib.util
import os
import re
from typing import Any

from oal_jax.errors import UserError

EXAMPLES = ("v4:2x2x1", "v5e:2x2", "v5e:16x16", "v5p:2x2x1", "v6e:2x2", "h100:8", "cpu:8")

# Bytes of a device that a program may use. TPUs: HBM capacity per chip, from "System architecture"
# of cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e. H100: JAX's allocator takes three quarters of
# the card's 80 GB by default.
MEMORY = {
    "v4": 32 * 2**30,
    "v5e": 16 * 2**30,
    "v5p": 95 * 2**30,
    "v6e": 32 * 2**30,
    "h100": 60_000_000_000,
}

# XLA's description of the H100 SXM5 (its GpuTargetConfigProto): the limits of compute capability
# 9.0 (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"), the
# numbers of the card, and the library versions that JAX's CUDA 12 wheels ask for.
_H100 = """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  memory_bandwidth: 3350000000000 device_memory_size: 80000000000
  driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.8.0"
}
"""


def prepare(name: str) -> None:
    """Set the environment variables that JAX reads when it starts. Call before JAX is imported.

    Raises:
      UserError: the name is wrong (see `split`), or the compiler for it is not installed.
    """
    kind, size = split(name)
    # Other backends would look for attached devices.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if kind == "cpu":
        os.environ["JAX_NUM_CPU_DEVICES"] = size
    elif kind == "h100":
        _require(name, "jax_plugins.xla_cuda12", "cuda12")
    else:
        _require(name, "libtpu", "tpu")
        # Without these, libtpu asks the network for its host's name and type, and locks the chips.
        os.environ |= {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-256",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }


def _require(name: str, module: str, extra: str) -> None:
    try:
        installed = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its parent package is absent
        installed = None
    if not installed:
        raise UserError(
            f"--topology '{name}' needs the package {module.split('.')[-1]}:"
            f" pip install 'oal-jax[{extra}]'"
        )


def split(name: str) -> tuple[str, str]:
    """Kind and size in a topology's name: ("v5e", "16x16") of "v5e:16x16".

    Raises:
      UserError: the kind of device is unknown, or the size has the wrong form.
    """
    kind, _, size = name.partition(":")
    if kind not in (*MEMORY, "cpu"):
        raise UserError(f"--topology '{name}' is unknown; give one such as {', '.join(EXAMPLES)}")
    form = r"[1-9]\d*(x[1-9]\d*)+" if kind.startswith("v") else r"[1-9]\d*"
    if not re.fullmatch(form, size):
        example = next(e for e in EXAMPLES if e.startswith(f"{kind}:"))
        raise UserError(f"--topology '{name}' needs a size of the form of '{example}'")
    return kind, size


def devices_of(name: str) -> list[Any]:
    """The devices of a topology, to make a mesh of. Call `prepare(name)` first.

    Raises:
      UserError: the compiler for these devices knows no slice of that size.
    """
    import jax
    from jax.experimental import topologies

    kind, size = split(name)
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < int(size):
            raise UserError(f"--topology '{name}': JAX has started with {len(devices)} devices")
        return devices[: int(size)]
    if kind == "h100":  # the devices of one node
        arguments = {"platform": "cuda", "topology": f"1x{size}x1", "target_config": _H100}
    else:
        arguments = {"platform": "tpu"}
    if kind == "v4":  # as on an attached v4, the two cores of a chip are one device
        arguments["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(topology_name=name, **arguments).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology '{name}': {str(error).splitlines()[0]}") from None
