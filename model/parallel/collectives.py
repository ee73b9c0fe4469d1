"""Collectives that autograd knows, for tensors of any memory layout; without a group they do nothing. Those of tensor
and sequence parallelism are megatron-core's, called through model/parallel/megatron_core.py, which makes any memory
layout right."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None


def sum_for_each(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over `group` of `x`, of which each rank computes a loss of its own: the gradient is the sum of those of
    all ranks' losses."""
    return x if group is None else _Sum.apply(x, group)


def enter_shards(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`x`, the same on every rank of `group`, enters computations on shards: its gradient is the sum of theirs."""
    if group is None:
        return x
    from model.parallel import megatron_core

    return megatron_core.copy_to_region(x, group)


def leave_shards(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over `group` of partial results `x`; every rank continues with it, so its gradient is the sum's."""
    if group is None:
        return x
    from model.parallel import megatron_core

    return megatron_core.reduce_from_region(x, group)


def gather_tokens(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tokens of every rank, [B, T / ranks, d] -> [B, T, d], for computations on shards: the gradient of a rank's
    tokens is the sum over `group`."""
    if group is None:
        return x
    from model.parallel import megatron_core

    return megatron_core.gather_tokens(x, group)


def scatter_tokens(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's tokens of the sum over `group` of partial results: [B, T, d] -> [B, T / ranks, d]."""
    if group is None:
        return x
    from model.parallel import megatron_core

    return megatron_core.scatter_tokens(x, group)


def gather_last(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The shards [..., n] side by side, [..., n * ranks]; the gradient is this rank's part."""
    if group is None:
        return x
    from model.parallel import megatron_core

    return megatron_core.gather_last(x, group)
