"""Who computes what: process groups and ranks, passed explicitly and never fetched from a global."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """The place of this process in the data-parallel dimension.

    `data_group` is None exactly when `data_size` is 1: a single process needs no process group, so models can be
    built and run in tests and on the meta device without torch.distributed.
    """

    data_rank: int = 0
    data_size: int = 1
    data_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size, f"rank {self.data_rank} of {self.data_size}"
        assert (self.data_group is None) == (self.data_size == 1), "a group is needed exactly when there are peers"
