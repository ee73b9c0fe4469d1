"""Entering a tensor-parallel region so that in the backward pass communication overlaps with computation: the gradient
of the region's input is summed over ranks WHILE the gradients of the region's weights are computed.

megatron-core's ColumnParallelLinear does that for one linear map (model/parallel/megatron_core.py, `column_linear`).
Here several maps share one entry: SwitchHead's joint queries and keys beside its value experts, MoA, sigma-MoE,
SwiGLU's two projections, the three of dense attention. One collective serves the sum of their gradients; a collective
per map would multiply the traffic. megatron-core cannot do that, so this is our own.

How it works: among the nodes that are ready, autograd runs the one that was made last. The forward pass makes the nodes
in this order, and the backward pass runs them in reverse:

    wait    awaits the collective and hands the sum on                        backward 4
    late    one for the weights of each map: computes their gradients         backward 3
    enter   begins the collective of the input's gradient                     backward 2
    maps    compute the gradient of their input, and leave to their `late`
            what it needs for the weights                                     backward 1

A map that does not take part (a composite of torch operations) gives its weights' gradients at once: `late` passes them
on, and only the overlap is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.context import ParallelContext

WeightGradients = Callable[[], Sequence[Tensor]]


class Slot:
    """Where a map's backward pass leaves the computation of its weights' gradients for their `late` node."""

    def __init__(self) -> None:
        self._gradients: WeightGradients | None = None

    def leave(self, gradients: WeightGradients) -> None:
        """Called by a map's backward pass, which returns None for its weights' gradients: `gradients()` computes
        them."""
        assert self._gradients is None, "one map uses these weights, once"
        self._gradients = gradients

    def take(self) -> WeightGradients | None:
        """What was left, once."""
        gradients, self._gradients = self._gradients, None
        return gradients


class Late(NamedTuple):
    """The weights of one map."""

    weights: tuple[Tensor, ...]
    slot: Slot | None = None
    """None: the map gives its weights' gradients like any other."""


def enter_overlapped(
    x: Tensor, parallel: ParallelContext, *weights: Sequence[Tensor], chunk: int | None = None
) -> tuple[Tensor, Tensor, list[Late]]:
    """`x` [B, L, d], the same on every rank, or with sequence parallelism this rank's tokens of it, enters a region.

    `weights`: for each map the parameters that it uses. `chunk`: with sequence parallelism and Transformer-XL memory
    `x` is a row of chunks, this rank's `chunk` tokens of each. Returns
        [B, L', d]  the tokens of all ranks, for work that ranks divide: the gradient is summed over ranks
        [B, L', d]  the same values for work that every rank does alike, such as routing: its gradient is already whole
                    and counts once. One collective each way serves both
        a Late for each of `weights`.
    Without a tensor-parallel group it does nothing.
    """
    group = parallel.tensor_group
    if group is None:
        return x, x, [Late(tuple(each)) for each in weights]
    sum_ = _Sum(group, (chunk or x.shape[1]) if parallel.sequence_parallel else None)
    waiting = _Wait.apply(x, sum_)
    late = [late_weights(each) for each in weights]
    if parallel.sequence_parallel:
        divided, alike = _EnterTokens.apply(waiting, sum_)
        return divided, alike, late
    return _Enter.apply(waiting, sum_), x, late


def late_weights(weights: Sequence[Tensor]) -> Late:
    if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        return Late(tuple(weights))
    slot = Slot()
    return Late(_LateWeights.apply(slot, *weights), slot)


class _Sum:
    """The gradient of a region's input on its way from `enter` to `wait`. Nothing may read it in between, so it does
    not pass through autograd."""

    def __init__(self, group: dist.ProcessGroup, chunk: int | None) -> None:
        self.group, self.chunk = group, chunk
        self._work: Any = None
        self._total: Tensor | None = None
        self._source: Tensor | None = None
        self._own: Tensor | None = None

    def begin(self, grad: Tensor | None, alike: Tensor | None = None) -> None:
        """The same gradients exist on every rank, so either all ranks or none call the collective."""
        if grad is not None:
            if self.chunk is None:
                self._total = grad.clone(memory_format=torch.contiguous_format)
                self._work = dist.all_reduce(self._total, group=self.group, async_op=True)
            else:
                self._total, self._source, self._work = begin_scatter(grad, self.group, self.chunk)
        if alike is not None:
            assert self.chunk is not None
            self._own = own_tokens(alike, rank=self.group.rank(), size=self.group.size(), chunk=self.chunk)

    def finish(self) -> Tensor | None:
        if self._work is not None:
            self._work.wait()
        total = self._total
        if self._own is not None:
            total = self._own if total is None else total.add_(self._own)
        self._work = self._total = self._source = self._own = None
        return total


class _LateWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slot: Slot, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.slot = slot
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = ctx.slot.take()
        return (None, *(grads if gradients is None else gradients()))


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sum_: _Sum) -> Tensor:
        ctx.sum = sum_
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: None) -> tuple[Tensor | None, None]:
        return ctx.sum.finish(), None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sum_: _Sum) -> Tensor:
        ctx.sum = sum_
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        ctx.sum.begin(grad)
        return None, None


class _EnterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sum_: _Sum) -> tuple[Tensor, Tensor]:
        ctx.sum = sum_
        ctx.set_materialize_grads(False)
        assert sum_.chunk is not None
        tokens = gathered(x, sum_.group, sum_.chunk)
        return tokens, tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, divided: Tensor | None, alike: Tensor | None) -> tuple[None, None]:
        ctx.sum.begin(divided, alike)
        return None, None


# ------------------------------------------------------------------------------------- tokens of rows of whole chunks


def gathered(x: Tensor, group: dist.ProcessGroup, chunk: int) -> Tensor:
    """This rank's part of a row of chunks, [B, c chunk, d] -> the row of whole chunks [B, c ranks chunk, d]."""
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=group)
    return parts.view(group.size(), x.shape[0], -1, chunk, x.shape[2]).permute(1, 2, 0, 3, 4).flatten(1, 3)


def begin_scatter(x: Tensor, group: dist.ProcessGroup, chunk: int) -> tuple[Tensor, Tensor, Any]:
    """The reverse of `gathered`, with a sum over ranks: the result, what must live until then, and what to wait for."""
    # Always a copy, because the collective may use its input as scratch.
    parts = (
        x.unflatten(1, (-1, group.size(), chunk)).permute(2, 0, 1, 3, 4).clone(memory_format=torch.contiguous_format)
    )
    own = x.new_empty(x.shape[0], x.shape[1] // group.size(), x.shape[2])
    source = parts.view(group.size() * x.shape[0], *own.shape[1:])
    return own, source, dist.reduce_scatter_tensor(own, source, group=group, async_op=True)


def own_tokens(x: Tensor, *, rank: int, size: int, chunk: int) -> Tensor:
    """Rank `rank`'s part of a row of whole chunks `x` [B, c size chunk, d] -> [B, c chunk, d]: what `gathered` puts
    together. Without communication."""
    return x.unflatten(1, (-1, size, chunk))[:, :, rank].flatten(1, 2)
