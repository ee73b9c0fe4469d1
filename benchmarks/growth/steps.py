"""Times of forward and backward at the points of an axis, in turns."""

from __future__ import annotations

from typing import Any

from benchmarks.families import Step
from benchmarks.growth.axes import Axis, model_of, step_macs
from benchmarks.rounds import orders


def measured(axis: Axis, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Family -> its points: size, multiply-accumulates of a step (macs), and the seconds of each round. One sequence a
    step. Every point has one step before that does not count."""
    points = {(family, size): model_of(axis, family, size) for family in axis.families for size in axis.sizes}
    steps = {point: Step(config, 1) for point, config in points.items()}
    seconds: dict[tuple[str, int], list[float]] = {point: [] for point in points}
    for step in steps.values():
        step()
    for point in orders(list(points), rounds):
        seconds[point].append(steps[point]())
    return {
        family: [
            {"size": size, "macs": step_macs(points[family, size]), "seconds": seconds[family, size]}
            for size in axis.sizes
        ]
        for family in axis.families
    }
