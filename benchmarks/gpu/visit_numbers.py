"""The numbers for which a GPU is wanted, of the records, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.record import PASSED, Entry
from benchmarks.gpu.winners import winners

Records = Mapping[str, Mapping[str, Entry]]
"""Command -> part -> its last entry."""
WANTED_MFU, WANTED_RATIO = 0.40, 1.3
STEPS = ("graphs", "tuned", "sets", "tuned sets", "documents graphs")
BLOCKS = ("block 1b", "block 1b sets", "block tuned 1b", "block tuned 1b sets")


def lines(records: Records) -> list[str]:
    """What was measured of them, and of the rest that it was not."""
    speed = {name: entry.result for name, entry in records.get("speed", {}).items() if entry.status == PASSED}
    found = [
        f"micro-step of switchall_1b, MFU ({WANTED_MFU:.0%} are wanted): {_joined(_shares(speed))}",
        f"SwitchHead's layer beside the dense one over their MACs (at most {WANTED_RATIO} is wanted): "
        f"{_joined(_ratios(speed))}",
        f"σ-MoE, forward + backward ms: {_joined(_kernels(speed))}",
    ]
    tuned = [entry for entry in records.get("tune", {}).values() if entry.status == PASSED]
    faster = winners(tuned)
    best = sorted(tuned, key=lambda entry: -entry.result.get("gain_percent", 0.0))[: len(faster)]
    gains = _joined(f"{entry.part} {entry.result['gain_percent']:.0f}%" for entry in best[:8])
    return [*found, f"kernels with faster tiles: {len(faster)} of {len(tuned)} that were searched: {gains}"]


def _joined(found: Iterator[str]) -> str:
    return ", ".join(found) or "not measured"


def _shares(speed: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    for kind in STEPS:
        for sequences in (8, 16, 32):
            result = speed.get(f"micro-step 1b {kind} {sequences}", {})
            if "mfu" in result:
                beside = f" (today's {result['today']['mfu']:.1%})" if "today" in result else ""
                yield f"{kind} {sequences} {result['mfu']:.1%}{beside}"


def _ratios(speed: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    for name in BLOCKS:
        if name in speed:
            yield f"{name} {speed[name]['time_over_macs']:.3g}"


def _kernels(speed: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    for name, result in speed.items():
        if name.startswith("kernel 1b sigma_moe"):
            for row in result["backends"]:
                if {"forward", "backward"} <= row.keys():
                    yield f"{row['backend']} {row['forward']['ms']:.3g} + {row['backward']['ms']:.3g}"
