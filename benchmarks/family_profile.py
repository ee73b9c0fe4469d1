"""Where a step of each family goes, by torch's profiler: seconds of its products, experts, attention and so on."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

PARTS = {
    "output layer": r"linear_cross_entropy",
    "routers": r"switchall.*route|group_choices|RouterInput",
    "experts of attention": r"switchhead_(value|output)|expert_linear",
    "experts of feed-forward": r"switchall.*sigma_moe",
    "attention itself": r"scaled_dot_product|ScaledDotProduct|(relative|causal)_attention|[sS]oftmax|[bB]mm|matmul",
    "dense products": r"aten::linear|aten::mm|aten::addmm|\bMmBackward|AddmmBackward|_Linear",
}
"""Part of a step -> what its operators and nodes of the graph are called. The first that fits counts."""
REST = "the rest"
ALL_PARTS = (*PARTS, REST)


def part_of(name: str) -> str:
    """The part that an operator, or a node of the backward pass, belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), REST)


def profiled(step: Callable[[], Any]) -> dict[str, float]:
    """Part -> seconds of one step, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seconds: Counter[str] = Counter(dict.fromkeys(ALL_PARTS, 0.0))
    for event in found.events():
        if event.cpu_parent is None:
            seconds[part_of(event.name)] += event.cpu_time_total / 1e6
    return dict(seconds)


def median_parts(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Part -> the median of its seconds."""
    return {part: statistics.median(one[part] for one in rounds) for part in ALL_PARTS}
