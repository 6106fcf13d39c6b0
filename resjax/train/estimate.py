"""Estimates how long a device computes, before anything runs.

An estimate depends on the config and the device alone, so a run is divided in the same way whenever
it is launched.
"""

import jax

from resjax.machine import threads

SECONDS_AT_ONCE = 4.0  # for which a device gets work, as estimated, if the work can be divided
CORE_FLOPS = 5e9  # floating-point operations per second of a CPU core
ACCELERATOR_FLOPS = 1e12
LAYER_SECONDS = 7e-5  # of a layer so small that its operations take no time


def forward_seconds(images: int, macs: int, depth: int, devices: int) -> float:
    """Returns the time of a forward pass; twice as much goes to the backward pass.

    It is rather two to ten times too long than too short.

    Args:
      images: on all devices.
      macs: multiply-adds per image.
      depth: number of layers.
      devices: number of accelerators; CPU devices share the cores.
    """
    rate = devices * ACCELERATOR_FLOPS
    if jax.default_backend() == "cpu":
        rate = threads() * CORE_FLOPS
    return max(2 * macs * images / rate, depth * LAYER_SECONDS)
