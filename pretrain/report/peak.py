"""The FLOP/s that a device reaches at its best: what the utilisation of a run is a share of."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from pretrain.device import device_name

MEASURED_SECONDS = 0.15
DATA_SHEETS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307.4e12,
    "MI250X": 383e12,
}
"""Part of a device's name -> dense bf16 (V100, T4: fp16) FLOP/s with fp32 sums, by its maker's data sheet."""


@dataclass(frozen=True)
class Peak:
    flops: float
    """FLOP/s of one device."""
    source: str
    """Where the number comes from, in words."""


def data_sheet(name: str) -> float | None:
    """FLOP/s of the device with this name; None if it is not known. The longest name that fits counts."""
    fitting = [part for part in DATA_SHEETS if part.lower() in name.lower()]
    return DATA_SHEETS[max(fitting, key=len)] if fitting else None


def find_peak(device: torch.device, precision: str, given: float | None) -> Peak | None:
    """`given` (monitor.peak_flops), or the data sheet's, or measured; None if nothing is known."""
    if given is not None:
        return Peak(given, "monitor.peak_flops")
    if device.type == "cpu":
        return measured()
    name = device_name(device)
    flops = data_sheet(name) if precision != "fp32" else None
    return None if flops is None else Peak(flops, f"data sheet of {name}, dense {precision}")


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
