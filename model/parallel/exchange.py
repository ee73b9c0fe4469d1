"""Expert parallelism: rows of slots travel to the rank that holds their expert and back (dropless, uneven splits).

Shapes: N tokens of this rank, k choices, E experts, R rows received. A slot n*k + j is the j-th choice of token n. A
rank sends rows in the order of their experts, and receives them in the order (source rank, expert).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(NamedTuple):
    """What goes where in one forward pass. The counts are on the host: the collectives need them as integers."""

    group: dist.ProcessGroup
    sent: list[int]
    """Rows to each rank of the group."""
    received: list[int]
    """Rows from each rank."""
    received_load: Tensor
    """[ranks, E / ranks] int64: rows from each rank for each expert that is held here."""

    @classmethod
    def plan(cls, load: Tensor, group: dist.ProcessGroup) -> Exchange:
        """From this rank's choices per expert, `load` [E] int64; collective. Waits for the device once."""
        received_load = torch.empty_like(load)
        dist.all_to_all_single(received_load, load.contiguous(), group=group)
        sizes = torch.stack([t.view(group.size(), -1).sum(1) for t in (load, received_load)])
        sent, received = sizes.tolist()
        return cls(group, sent, received, received_load.view(group.size(), -1))

    def there(self, rows: Tensor) -> Tensor:
        """Rows [N k, ...] sorted by expert -> those that this rank's experts compute [R, ...]."""
        return _ExchangeRows.apply(rows, self.sent, self.received, self.group)

    def back(self, rows: Tensor) -> Tensor:
        """The reverse of `there`."""
        return _ExchangeRows.apply(rows, self.received, self.sent, self.group)

    def row_experts(self) -> Tensor:
        """[R] int64: the expert, counted from the first one held here, of every received row."""
        ranks, held = self.received_load.shape
        expert = torch.arange(held, device=self.received_load.device).repeat(ranks)
        return expert.repeat_interleave(self.received_load.flatten(), output_size=sum(self.received))

    def row_order(self) -> Tensor:
        """[R] int64: the received rows grouped by expert, in the order of their sources. A stable counting sort whose
        counts are known: the rows of one source and expert lie together."""
        sizes = self.received_load.flatten()
        starts = (sizes.cumsum(0) - sizes).view_as(self.received_load).t().flatten()
        sizes = self.received_load.t().flatten()
        shift = starts - (sizes.cumsum(0) - sizes)
        num_rows = sum(self.received)
        return shift.repeat_interleave(sizes, output_size=num_rows) + torch.arange(num_rows, device=shift.device)


def spread(x: Tensor, order: Tensor, k: int) -> Tensor:
    """A row for every slot, sorted by expert: `x` [N, d], `order` [N k] -> [N k, d]. The gradient is `collect`."""
    return _Spread.apply(x, order, k)


def collect(rows: Tensor, order: Tensor, k: int) -> Tensor:
    """The sum over the k slots of every token of `rows` [N k, d], sorted by expert -> [N, d]. The gradient is
    `spread`."""
    return _Collect.apply(rows, order, k)


def _sum_slots(rows: Tensor, order: Tensor, k: int) -> Tensor:
    """A gather and a sum in fp32: repeatable, without atomics."""
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows[places].view(-1, k, rows.shape[1]).sum(1, dtype=wide).to(rows.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_slots(grad, ctx.saved_tensors[0], ctx.k), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _sum_slots(rows, order, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0] // ctx.k], None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.splits
        return _exchanged(grad, received, sent, ctx.group), None, None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
