"""Topologies of accelerators that their compilers describe without the hardware.

`libtpu` and JAX's CUDA plugin compile for devices that are absent, and need no driver. The CUDA
plugin then cannot measure which of several kernels is fastest, so a GPU may run other kernels.

Peak rates and bandwidths are the vendors': Google's pages on TPU v5e, v5p and v6e, and NVIDIA's
datasheets of H100 SXM and H200. The memory of TPUs is the limit that their compiler reports.
"""

import os
import re
from importlib.util import find_spec
from typing import NamedTuple

import jax
from jax.experimental import topologies

from resjax.errors import UserError, one_line
from resjax.xla.target import Target

GIB = 2**30


class Chip(NamedTuple):
    """The memory and the peak rates of one device.

    Attributes:
      kind: JAX's `device_kind`.
      memory: bytes of memory; all that programs may use on a TPU, the whole memory of a GPU.
      flops: FLOP/s of matrix products by dtype. XLA multiplies float32 matrices in one pass of
        bfloat16 on a TPU, and in TensorFloat-32 on a GPU.
      bandwidth: bytes/s from and to memory.
      link: bytes/s that a device sends to others.
      launch: seconds that every kernel takes at least; an assumption.
      latency: seconds that a collective of few bytes takes; an assumption.
      clock: cycles per second, for the cycles that the compiler of TPUs expects; 0 without them.
    """

    kind: str
    memory: int
    flops: dict[str, float]
    bandwidth: float
    link: float
    launch: float
    latency: float
    clock: float = 0.0


def _tpu(kind: str, gib: float, flops: float, bandwidth: float, link: float, clock: float) -> Chip:
    rates = {"bfloat16": flops, "float32": flops}
    return Chip(kind, int(gib * GIB), rates, bandwidth, link, 0.0, 5e-6, clock)


def _hopper(kind: str, memory: int, bandwidth: float) -> Chip:
    rates = {"bfloat16": 989e12, "float32": 494e12}
    return Chip(kind, memory, rates, bandwidth, 450e9, 2.5e-6, 1e-5)


TPUS = {
    "v5e": _tpu("TPU v5 lite", 15.75, 197e12, 819e9, 200e9, 1.5e9),
    "v5p": _tpu("TPU v5", 95.74, 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": _tpu("TPU v6 lite", 31.25, 918e12, 1640e9, 400e9, 1.75e9),
}
GPUS = {
    "h100": _hopper("NVIDIA H100 80GB HBM3", 85_029_158_912, 3.35e12),
    "h200": _hopper("NVIDIA H200", 150_109_880_320, 4.8e12),
}
CHIPS = {chip.kind: chip for chip in (*TPUS.values(), *GPUS.values())}
"""By `device_kind`."""

EXAMPLES = "tpu:v5e:2x2, tpu:v5p:2x2x1, tpu:v6e:2x4, gpu:h100, gpu:h200:8"


def describe(name: str) -> Target:
    """Returns the devices of a topology; call it before JAX looks for devices.

    Args:
      name: a TPU and the shape of its slice, such as "tpu:v5e:2x2", or a GPU and the number of
        devices on one host, such as "gpu:h100:8"; the default number is 1.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    platform, _, rest = name.partition(":")
    chip, _, shape = rest.partition(":")
    known = {"tpu": TPUS, "gpu": GPUS}.get(platform, {})
    pattern = r"\d+(x\d+)+" if platform == "tpu" else r"([1-9]\d*)?"
    if chip not in known or not re.fullmatch(pattern, shape):
        raise UserError(f"--topology={name}: no such topology; known are, for example, {EXAMPLES}")
    plugin, extra = ("libtpu", "tpu") if platform == "tpu" else ("jax_cuda13_plugin", "cuda")
    if find_spec(plugin) is None:
        raise UserError(f'--topology={name} needs a compiler: pip install ".[{extra}]"')
    jax.config.update("jax_platforms", "cpu")  # this machine needs no other device
    jax.devices()  # registers the compilers' plugins
    try:
        if platform == "tpu":
            devices = _tpu_devices(chip, shape)
        else:
            devices = _gpu_devices(known[chip], int(shape or 1))
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"--topology={name}: {one_line(error)}") from error
    memory = known[chip].memory
    if platform == "gpu":  # the fraction that JAX's allocator reserves
        memory = int(float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) * memory)
    return Target(devices, memory)


def _tpu_devices(chip: str, shape: str) -> list[jax.Device]:
    # Without these, libtpu queries the metadata server of a cloud machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Without it, libtpu warns that it finds no host; the topology overrides the value.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    # A process that only compiles leaves the chips to others.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{shape}")
    return list(found.devices)


def _gpu_devices(chip: Chip, count: int) -> list[jax.Device]:
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=chip.kind,
        topology=f"1x1x{count}",  # partitions, hosts, devices
        target_config=HOPPER.format(
            kind=chip.kind, memory=chip.memory, bandwidth=int(chip.bandwidth)
        ),
    )
    return list(found.devices)


# A GpuTargetConfigProto of XLA; the numbers are those of `cudaGetDeviceProperties`.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{kind}"
"""
