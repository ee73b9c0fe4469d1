"""The models of each axis, which differ in one dimension, all other settings being those of `BASE`; and the times of
forward and backward at its points, in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.families import Step, forward_macs
from benchmarks.rounds import orders
from model.config import ModelConfig

BASE: dict[str, Any] = {
    "d_model": 256,
    "num_layers": 4,
    "vocab_size": 1024,
    "sequence_length": 512,
    "position": {"type": "rope"},
}
"""A small vocabulary: the output layer costs the same whatever grows, and would hide it."""
DENSE, SWITCHALL = "dense", "SwitchAll"
FAMILIES: dict[str, dict[str, Any]] = {
    DENSE: {
        "attention": {"type": "dense", "num_heads": 8, "head_dim": 32},
        "feedforward": {"type": "dense", "hidden_size": 1024},
    },
    SWITCHALL: {
        "attention": {"type": "switchhead", "num_heads": 2, "head_dim": 50, "num_experts": 4, "active_experts": 2},
        "feedforward": {"type": "sigma_moe", "num_experts": 16, "expert_size": 64, "active_experts": 4},
    },
}
"""Of the same number of parameters, within 2%."""


class Axis(NamedTuple):
    """One dimension that grows."""

    label: str
    sizes: tuple[int, ...]
    families: tuple[str, ...]
    changes: Callable[[dict[str, Any], int], dict[str, Any]]
    """(section `model`, size) -> what is different in it."""
    is_straight: bool = True
    """Whether the arithmetic grows along a straight line, so that its start says what does not grow."""


def _experts(section: str) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    return lambda tree, size: {section: tree[section] | {"num_experts": size}}


AXES = {
    "sequence-length": Axis(
        "sequence length, tokens",
        (128, 256, 512, 1024, 2048),
        (DENSE, SWITCHALL),
        lambda tree, size: {"sequence_length": size},
        is_straight=False,
    ),
    "sigma-moe-experts": Axis("σ-MoE experts, 4 active", (8, 16, 32, 64, 128), (SWITCHALL,), _experts("feedforward")),
    "switchhead-experts": Axis(
        "SwitchHead experts of a head, 2 active", (2, 4, 8, 16, 32), (SWITCHALL,), _experts("attention")
    ),
    "layers": Axis("layers", (1, 2, 4, 8, 16), (DENSE, SWITCHALL), lambda tree, size: {"num_layers": size}),
}


def model_of(axis: Axis, family: str, size: int) -> ModelConfig:
    """The model at one point."""
    tree = BASE | FAMILIES[family]
    return ModelConfig.model_validate(tree | axis.changes(tree, size))


def step_macs(config: ModelConfig) -> int:
    """Multiply-accumulates of forward and backward: a product's backward pass has two products of its size."""
    return 3 * forward_macs(config)


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
