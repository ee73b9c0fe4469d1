"""Who computes what: process groups and ranks, passed explicitly and never fetched from a global."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """The place of this process in the data-parallel and the tensor-parallel dimension.

    Ranks that follow each other form a tensor-parallel group: rank = data_rank x tensor_size + tensor_rank. A group is
    None exactly when its size is 1: a single process needs no process group, so models can be built and run in tests
    and on the meta device without torch.distributed.
    """

    data_rank: int = 0
    data_size: int = 1
    data_group: dist.ProcessGroup | None = None
    """The ranks that hold the same slice of the model."""
    tensor_rank: int = 0
    tensor_size: int = 1
    tensor_group: dist.ProcessGroup | None = None
    """The ranks that hold the slices of one model and read the same data."""

    def __post_init__(self) -> None:
        for name in ("data", "tensor"):
            rank, size, group = (getattr(self, f"{name}_{part}") for part in ("rank", "size", "group"))
            assert 0 <= rank < size, f"{name} rank {rank} of {size}"
            assert (group is None) == (size == 1), f"a {name} group is needed exactly when there are peers"

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.data_rank == 0 and self.tensor_rank == 0

    def share(self, size: int) -> int:
        """This rank's part of `size` heads, experts, columns or classes."""
        assert size % self.tensor_size == 0, f"{size} cannot be divided by {self.tensor_size} tensor-parallel ranks"
        return size // self.tensor_size

    def slice_of(self, size: int) -> slice:
        """Where this rank's part of `size` lies."""
        part = self.share(size)
        return slice(self.tensor_rank * part, (self.tensor_rank + 1) * part)
