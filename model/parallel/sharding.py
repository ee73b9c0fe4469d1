"""How each parameter is divided over tensor-parallel ranks: data, by the end of its canonical name.

Heads, experts, hidden columns and classes are divided; what every rank needs whole is replicated, and its gradient is
complete on every rank because the forward pass enters shards through `enter_shards`.
"""

from __future__ import annotations

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


def owner_of(name: str, config: ModelConfig) -> str:
    """The parameter that `name` is initialised and saved as: itself, but for the output layer's copy of a tied
    embedding, which a pipeline's last stage holds."""
    return "embedding.weight" if config.tied_embedding and name == "head.weight" else name


def sharded_dim(name: str, config: ModelConfig) -> int | None:
    """The dimension of the parameter `name` that is divided over tensor-parallel ranks; None: replicated."""
    if ".attention." in name and isinstance(config.attention, MoAConfig):
        return None
    return next((dim for end, dim in SHARDED.items() if name == end or name.endswith("." + end)), None)


def local_part(full: Tensor, name: str, config: ModelConfig, parallel: ParallelContext) -> Tensor:
    """This rank's part (a view) of the full tensor of the parameter `name`."""
    dim = sharded_dim(name, config)
    if dim is None or parallel.tensor_size == 1:
        return full
    part = parallel.share(full.shape[dim])
    return full.narrow(dim, parallel.tensor_rank * part, part)


def full_shape(local: list[int], name: str, config: ModelConfig, parallel: ParallelContext) -> list[int]:
    """Shape of the whole parameter `name`, from a rank's."""
    dim = sharded_dim(name, config)
    return [size * parallel.tensor_size if axis == dim else size for axis, size in enumerate(local)]
