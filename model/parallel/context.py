"""Which rank computes what: process groups and ranks, passed explicitly and never fetched from a global."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

DIMENSIONS = ("pipeline", "data", "tensor")
"""The dimensions of the mesh of ranks, the slowest first: rank = (pipeline_rank x data_size + data_rank) x tensor_size
+ tensor_rank."""


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """The place of this process in every dimension of parallelism.

    Ranks that follow each other form a tensor-parallel group, see DIMENSIONS. Expert parallelism divides the
    data-parallel ranks: expert_rank = data_rank mod expert_size. A group is None exactly when its size is 1: a single
    process needs no process group, so models can be built and run in tests and on the meta device without
    torch.distributed.
    """

    data_rank: int = 0
    data_size: int = 1
    data_group: dist.ProcessGroup | None = None
    """The ranks that hold the same slice of the model."""
    tensor_rank: int = 0
    tensor_size: int = 1
    tensor_group: dist.ProcessGroup | None = None
    """The ranks that hold the slices of one model and read the same data."""
    sequence_parallel: bool = False
    """Between the tensor-parallel regions each rank of the tensor group holds T / tensor_size tokens of every
    sequence."""
    pipeline_rank: int = 0
    pipeline_size: int = 1
    pipeline_group: dist.ProcessGroup | None = None
    """The ranks that hold the stages of one model."""
    expert_rank: int = 0
    expert_size: int = 1
    expert_group: dist.ProcessGroup | None = None
    """Neighbouring data-parallel ranks that divide the sigma-MoE experts."""

    def __post_init__(self) -> None:
        for name in (*DIMENSIONS, "expert"):
            rank, size, group = (getattr(self, f"{name}_{part}") for part in ("rank", "size", "group"))
            assert 0 <= rank < size, f"{name} rank {rank} of {size}"
            assert (group is None) == (size == 1), f"a {name} group is needed exactly when there are peers"
        assert self.data_size % self.expert_size == 0, f"{self.expert_size} expert ranks of {self.data_size} data ranks"
        assert not self.sequence_parallel or self.tensor_size > 1, "sequence parallelism needs a tensor group"

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.data_rank == 0 and self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the output layer."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def token_shards(self) -> int:
        """Ranks that share the tokens of a sequence between the tensor-parallel regions."""
        return self.tensor_size if self.sequence_parallel else 1

    def share(self, size: int) -> int:
        """This rank's part of `size` heads, experts, columns or classes."""
        assert size % self.tensor_size == 0, f"{size} cannot be divided by {self.tensor_size} tensor-parallel ranks"
        return size // self.tensor_size

    def slice_of(self, size: int) -> slice:
        """Where this rank's part of `size` lies."""
        part = self.share(size)
        return slice(self.tensor_rank * part, (self.tensor_rank + 1) * part)
