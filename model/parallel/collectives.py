"""Collectives of tensor and sequence parallelism that autograd knows, for tensors of any memory layout.

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


def gather_tokens(x: Tensor, group: dist.ProcessGroup | None, *, chunk: int | None = None) -> Tensor:
    """The tokens of every rank, [B, T / ranks, d] -> [B, T, d], for computations on shards: the gradient of a rank's
    tokens is the sum over `group`.

    `chunk`: tokens of this rank per chunk, where `x` [B, c chunk, d] is a row of chunks divided alike: the result is
    the row of whole chunks.
    """
    return x if group is None else _GatherTokens.apply(x, group, chunk or x.shape[1])


def gather_tokens_twice(
    x: Tensor, group: dist.ProcessGroup | None, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """`gather_tokens`, and the same values for computations that every rank does alike: the gradient of those is the
    rank's own part, without a sum."""
    return (x, x) if group is None else _GatherTokensTwice.apply(x, group, chunk or x.shape[1])


def scatter_tokens(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's tokens of the sum over `group` of partial results: [B, T, d] -> [B, T / ranks, d]."""
    return x if group is None else _ScatterTokens.apply(x, group)


def own_tokens(x: Tensor, *, rank: int, size: int, chunk: int) -> Tensor:
    """Rank `rank`'s part of a row of whole chunks `x` [B, c size chunk, d] -> [B, c chunk, d]: what `gather_tokens`
    puts together. Without communication."""
    return x.unflatten(1, (-1, size, chunk))[:, :, rank].flatten(1, 2)


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


def _gathered(x: Tensor, group: dist.ProcessGroup, chunk: int) -> Tensor:
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=group)
    return parts.view(group.size(), x.shape[0], -1, chunk, x.shape[2]).permute(1, 2, 0, 3, 4).flatten(1, 3)


def _scattered(x: Tensor, group: dist.ProcessGroup, chunk: int) -> Tensor:
    # The copy is always one: the collective may use its input as scratch.
    parts = (
        x.unflatten(1, (-1, group.size(), chunk)).permute(2, 0, 1, 3, 4).clone(memory_format=torch.contiguous_format)
    )
    own = x.new_empty(x.shape[0], x.shape[1] // group.size(), x.shape[2])
    dist.reduce_scatter_tensor(own, parts.view(group.size() * x.shape[0], *own.shape[1:]), group=group)
    return own


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, chunk: int) -> Tensor:
        ctx.group, ctx.chunk = group, chunk
        return _gathered(x, group, chunk)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grad, ctx.group, ctx.chunk), None, None


class _GatherTokensTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, chunk: int) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.chunk = group, chunk
        ctx.set_materialize_grads(False)
        tokens = _gathered(x, group, chunk)
        return tokens, tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, divided: Tensor | None, alike: Tensor | None) -> tuple[Tensor | None, None, None]:
        # Which gradients exist is the same on every rank: the collective is called by all or by none.
        grad = None if divided is None else _scattered(divided, ctx.group, ctx.chunk)
        if alike is not None:
            own = own_tokens(alike, rank=ctx.group.rank(), size=ctx.group.size(), chunk=ctx.chunk)
            grad = own if grad is None else grad.add_(own)
        return grad, None, None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        assert x.shape[1] % group.size() == 0, f"{x.shape[1]} tokens cannot be divided by {group.size()} ranks"
        ctx.group, ctx.chunk = group, x.shape[1] // group.size()
        return _scattered(x, group, ctx.chunk)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group, ctx.chunk), None
