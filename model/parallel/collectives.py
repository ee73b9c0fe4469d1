"""Collectives of tensor parallelism that autograd knows, for tensors of any memory layout.

megatron-core's functions of the same purpose reduce a contiguous COPY of a non-contiguous gradient and return the
unreduced original (0.16.1, tensor_parallel/mappings.py), and they reduce gradients in place; these do neither.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def enter_shards(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`x`, the same on every rank of `group`, goes into computations on shards: the gradient is their sum."""
    return x if group is None else _EnterShards.apply(x, group)


def leave_shards(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over `group` of partial results `x`; every rank continues with it, so its gradient is the sum's."""
    return x if group is None else _LeaveShards.apply(x, group)


def gather_last(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The shards [..., n] side by side, [..., n * size], without gradient."""
    if group is None:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _EnterShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _LeaveShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
