"""How each parameter is divided over tensor-parallel or expert-parallel ranks: data, by the end of its canonical name.

Heads, experts, hidden columns and classes are divided; what every rank needs whole is replicated, and its gradient is
complete on every rank because the forward pass enters shards through `enter_shards`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from model.config import MoAConfig, ModelConfig
from model.parallel.context import ParallelContext

SHARDED: dict[str, int] = {
    "embedding.weight": 0,  # classes
    "head.weight": 0,
    "head.bias": 0,
    # heads
    **{f"attention.{name}.weight": 0 for name in ("query", "key", "value", "position")},
    "attention.output.weight": 1,
    **{f"attention.{name}_experts": 0 for name in ("query", "key", "value", "output")},
    **{f"attention.{name}_selector": 0 for name in ("query", "key", "value", "output")},
    "attention.content_bias": 0,
    "attention.position_bias": 0,
    # hidden columns
    "feedforward.up.weight": 0,
    "feedforward.up.bias": 0,
    "feedforward.gate.weight": 0,
    "feedforward.down.weight": 1,
    # experts
    "feedforward.up_experts": 0,
    "feedforward.down_experts": 0,
}
"""End of a parameter's name -> the dimension that is divided. MoA divides a token's active slots, no parameter."""


EXPERT_SHARDED = ("feedforward.up_experts", "feedforward.down_experts")
"""Divided over expert-parallel ranks if there are any, and then not over tensor-parallel ones."""

Axis = Literal["tensor", "expert"]


def owner_of(name: str, config: ModelConfig) -> str:
    """The parameter that `name` is initialised and saved as: itself, but for the output layer's copy of a tied
    embedding, which a pipeline's last stage holds."""
    return "embedding.weight" if config.tied_embedding and name == "head.weight" else name


def sharded_dim(name: str, config: ModelConfig) -> int | None:
    """The dimension of the parameter `name` that is divided over ranks; None: replicated."""
    if ".attention." in name and isinstance(config.attention, MoAConfig):
        return None
    return next((dim for end, dim in SHARDED.items() if name == end or name.endswith("." + end)), None)


def sharded_axis(name: str, config: ModelConfig, *, expert_size: int) -> Axis | None:
    """The ranks that the parameter `name` is divided over, where `expert_size` is the expert-parallel size."""
    if sharded_dim(name, config) is None:
        return None
    return "expert" if expert_size > 1 and name.endswith(EXPERT_SHARDED) else "tensor"


def shard_place(name: str, config: ModelConfig, parallel: ParallelContext) -> tuple[int, int]:
    """Number of this rank's part of the parameter `name`, and how many parts there are; (0, 1): replicated."""
    axis = sharded_axis(name, config, expert_size=parallel.expert_size)
    if axis is None:
        return 0, 1
    if axis == "expert":
        return parallel.expert_rank, parallel.expert_size
    return parallel.tensor_rank, parallel.tensor_size


def local_part(full: Tensor, name: str, config: ModelConfig, parallel: ParallelContext) -> Tensor:
    """This rank's part (a view) of the full tensor of the parameter `name`."""
    dim, (part, parts) = sharded_dim(name, config), shard_place(name, config, parallel)
    if dim is None or parts == 1:
        return full
    assert full.shape[dim] % parts == 0, f"{name}: {full.shape[dim]} cannot be divided by {parts} ranks"
    size = full.shape[dim] // parts
    return full.narrow(dim, part * size, size)


def full_shape(local: list[int], name: str, config: ModelConfig, parallel: ParallelContext) -> list[int]:
    """Shape of the whole parameter `name`, from a rank's."""
    dim, (_, parts) = sharded_dim(name, config), shard_place(name, config, parallel)
    return [size * parts if axis == dim else size for axis, size in enumerate(local)]
