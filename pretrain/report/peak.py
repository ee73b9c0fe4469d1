"""The FLOP/s that a device reaches at its best: what the utilisation of a run is a share of."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from pretrain.device import device_name
from pretrain.planning.devices import device_of_card

MEASURED_SECONDS = 0.15


@dataclass(frozen=True)
class Peak:
    flops: float
    """FLOP/s of one device."""
    source: str
    """Where the number comes from, in words."""


def find_peak(device: torch.device, precision: str, given: float | None) -> Peak | None:
    """`given` (monitor.peak_flops), or the data sheet's, or measured; None if nothing is known."""
    if given is not None:
        return Peak(given, "monitor.peak_flops")
    if device.type == "cpu":
        return measured()
    name = device_name(device)
    known = device_of_card(name)
    figure = known.flops[precision] if known is not None and precision != "fp32" else None
    return None if figure is None else Peak(figure.value, f"data sheet of {name}, dense {precision}")


def measured(seconds: float = MEASURED_SECONDS) -> Peak:
    """The best of as many fp32 matrix products as fit into `seconds`, by this process and its threads."""
    size, best = 384, 0.0
    one, other = torch.ones(size, size), torch.ones(size, size)
    began = now = time.perf_counter()
    while now - began < seconds:
        one @ other
        then, now = now, time.perf_counter()
        best = max(best, 2.0 * size**3 / (now - then))
    return Peak(best, f"measured: the best {size} x {size} fp32 matrix product of rank 0 while others trained")
