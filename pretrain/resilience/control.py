"""What all ranks agree on between steps, so that each does the same next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import PassingError
from pretrain.parallel.agreement import Agreement, agreement, of_all_ranks, said
from pretrain.parallel.rounds import maximum
from pretrain.resilience.signals import Stop


class Control:
    """A few bytes that all ranks tell each other on CPUs, which waits for no kernel. Every method is collective over
    all ranks."""

    def __init__(self, stop: Stop, group: Any, hosts: Sequence[str]) -> None:
        """`hosts`: the machine of every rank."""
        self._stop, self.group, self.hosts = stop, group, hosts

    def agree(self, error: Exception | None, *flags: bool) -> Agreement:
        """One message: did any rank fail with `error`, was any asked to stop, and for each flag, is it set on any
        rank?"""
        size = dist.get_world_size()
        stopping, passes = self._stop.requested is not None, isinstance(error, PassingError)
        own = said(dist.get_rank(), size, error is not None, stopping, *flags, passes=passes)
        return agreement(maximum(own, self.group), size)

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        return int(maximum(torch.tensor([value]), self.group))

    def table(self, values: Tensor) -> Tensor:
        """[n] int64 >= 0 of this rank -> [ranks, n], those of every rank."""
        rows = values.new_zeros(dist.get_world_size(), len(values))
        rows[dist.get_rank()] = values
        return maximum(rows.view(-1), self.group).view_as(rows)

    def gathered(self, values: list[Any]) -> list[Any]:
        """The values of all ranks, in their order."""
        return [value for of_rank in of_all_ranks(values, self.group) for value in of_rank]

    def stopping(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.agree(None).stopping

    def stop_reason(self) -> str:
        """Who was asked to stop and by what, e.g. `SIGTERM to rank 3`."""
        reasons = of_all_ranks(self._stop.requested, self.group)
        asked = {rank: reason for rank, reason in enumerate(reasons) if reason}
        if 1 < len(asked) == len(reasons):
            return f"{asked[0]} to every rank"
        return ", ".join(f"{reason} to rank {rank}" for rank, reason in list(asked.items())[:4])
