"""The parts of a model that are told apart where it learns: groups of parameters, and those of each block."""

from __future__ import annotations

from typing import NamedTuple

from model.parameter_spec import ParameterSpec

GROUPS = ("embedding", "attention", "routers", "experts", "feed-forward", "norms", "head")
"""Of parameters: `attention` and `feed-forward` are what is neither expert nor router of theirs."""


def group_of(name: str, spec: ParameterSpec) -> str:
    """The group of the parameter with this canonical name."""
    parts = name.split(".")
    if parts[0] in ("embedding", "head"):
        return parts[0]
    if spec.experts is not None:
        return "experts"
    if parts[-1] == "router" or parts[-1].endswith("selector"):
        return "routers"
    module = parts[-2] if parts[0] != "blocks" else parts[2]
    if module.endswith("norm"):
        return "norms"
    return "attention" if module == "attention" else "feed-forward"


class Part(NamedTuple):
    """Some parameters of a model."""

    block: str
    """`blocks.3`; empty outside of the blocks."""
    group: str

    def __str__(self) -> str:
        return f"{self.block}.{self.group}" if self.block else self.group


def part_of(name: str, spec: ParameterSpec) -> Part:
    """The part of the parameter with this canonical name."""
    parts = name.split(".")
    return Part(".".join(parts[:2]) if parts[0] == "blocks" else "", group_of(name, spec))
