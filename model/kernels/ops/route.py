"""Routing: from tokens to the chosen experts, their scores, the load of every expert and the order that groups slots.

    logits = x weight^T (fp32),  scores = sigmoid(logits),  index = the k best experts of every token and router
                                                      (SwitchHead section 2.2; sigma-MoE, arXiv 2310.10837, eq. 11)

Shapes: N tokens, R independent routers (heads; 1 for the feed-forward), E experts, k choices, d d_model. A slot
n*k + j of a router is the j-th choice of token n. Everything is fp32 whatever the storage dtype (fp64 stays fp64).

Measured (N=4096, d=512, R=1, E=16, k=4, forward): 2.9 ms on one thread, 3.3 on two, of which top-k 1.7, the sort 0.13.
Next to busy processes, two threads: 8 ms in blocks on the workers, 49 with threads inside every operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.cpu.workers import run_blocks
from model.kernels.cuda import route as cuda


class Routing(NamedTuple):
    """What one selection decides. Gradients flow through `logits` (all experts) and `scores` (the chosen ones)."""

    logits: Tensor
    """[N, R, E] fp32, before expert dropout."""
    scores: Tensor
    """[N, R, k] fp32: sigmoid of the chosen logits, best first; no softmax, no renormalisation."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """[N, R, k] int64: the chosen experts, best first; of equal ones the lowest."""
    load: Tensor
    """[R, E] int64: how many slots chose each expert."""
    order: Tensor
    """[R, N*k] int64: the slots of each router grouped by expert, in token order (a stable counting sort)."""


def route(
    x: Tensor, weight: Tensor, k: int, *, keep: Tensor | None = None, drop_scores: bool = False, backend: str
) -> Routing:
    """`x` [N, d], `weight` [R, E, d]; `keep` [N, R, E] bool marks the experts that expert dropout leaves.

    With `drop_scores` (sigma-MoE) a dropped expert scores 0 for choosing and for weighting; without (SwitchHead) it is
    only never preferred in choosing and its weight is the true score. `backend` is a resolved one.
    """
    if not 1 <= k <= weight.shape[1]:
        raise ValueError(f"{k} active experts of {weight.shape[1]}: k must be in 1..{weight.shape[1]}")
    if backend == "reference":
        return route_reference(x, weight, k, keep=keep, drop_scores=drop_scores)
    return Routing(*_route(x, weight, keep, k, drop_scores, backend))


def route_reference(
    x: Tensor, weight: Tensor, k: int, *, keep: Tensor | None = None, drop_scores: bool = False
) -> Routing:
    """The specification, in operators that autograd, torch.compile and meta tensors know."""
    E = weight.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = torch.einsum("nd,red->nre", x.to(wide), weight.to(wide))
    scores = torch.sigmoid(logits)
    if keep is not None and drop_scores:
        scores = scores * keep
    choosing = scores if keep is None or drop_scores else logits.masked_fill(~keep, float("-inf"))
    index = choosing.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return Routing(logits, scores.gather(-1, index), index, *_grouped(index, E))


def with_choice(routing: Routing, index: Tensor, *, keep: Tensor | None = None, drop_scores: bool = False) -> Routing:
    """`routing` with another choice, `index` [N, R, k] int64, whoever made it: the same logits, and the scores, load
    and order of the experts that it names. `keep` and `drop_scores` are those of `route`. Plain operators."""
    scores = torch.sigmoid(routing.logits.gather(-1, index))
    if keep is not None and drop_scores:
        scores = scores * keep.gather(-1, index)
    return Routing(routing.logits, scores, index, *_grouped(index, routing.logits.shape[-1]))


def _grouped(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`index` [N, R, k] -> load [R, E] and order [R, N*k], both int64."""
    slots = index.transpose(0, 1).flatten(1)
    load = slots.new_zeros(slots.shape[0], num_experts).scatter_add_(1, slots, torch.ones_like(slots))
    return load, slots.sort(dim=-1, stable=True).indices


# ---------------------------------------------------------------------------------------------------------------- op


@torch.library.custom_op("switchall::route", mutates_args=())
def _route(
    x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logits, scores, index, load, order as in `Routing`."""
    return _implementation(backend)[0](x, weight, keep, k, drop_scores)


@_route.register_fake
def _(x, weight, keep, k, drop_scores, backend):
    N, (R, E, _) = x.shape[0], weight.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(N, R, E, dtype=wide),
        x.new_empty(N, R, k, dtype=wide),
        x.new_empty(N, R, k, dtype=torch.int64),
        x.new_empty(R, E, dtype=torch.int64),
        x.new_empty(R, N * k, dtype=torch.int64),
    )


@torch.library.custom_op("switchall::route_backward", mutates_args=())
def _route_backward(
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    index: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight."""
    return _implementation(backend)[1](grad_logits, grad_scores, x, weight, scores, index)


@_route_backward.register_fake
def _(grad_logits, grad_scores, x, weight, scores, index, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))


def _implementation(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward."""
    if backend == "triton":
        from model.kernels.triton import route as kernels

        return kernels.forward_triton, kernels.backward_triton
    return {"cpu": (_forward_cpu, _backward_cpu), "cuda": (cuda.forward, cuda.backward)}[backend]


def _setup_context(ctx, inputs, output):
    x, weight, _, _, _, ctx.backend = inputs
    _, scores, index, load, order = output
    ctx.save_for_backward(x, weight, scores, index)
    ctx.mark_non_differentiable(index, load, order)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_logits, grad_scores, *_):
    if grad_logits is None and grad_scores is None:
        return (None,) * 6
    grad_x, grad_weight = _route_backward(grad_logits, grad_scores, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_weight, None, None, None, None


_route.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchall.route)
def route_flop(x_shape, weight_shape, *args, **kwargs) -> int:
    """The logits; sigmoid, selection and sort are not counted."""
    R, E, d = weight_shape
    return 2 * x_shape[0] * R * E * d


@register_flop_formula(torch.ops.switchall.route_backward)
def route_backward_flop(grad_logits_shape, grad_scores_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    """Gradients of x and of weight."""
    R, E, d = weight_shape
    return 2 * 2 * x_shape[0] * R * E * d


# --------------------------------------------------------------------------------------------------------------- CPU


def _forward_cpu(
    x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, (R, E, d) = x.shape[0], weight.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    columns = weight.to(wide).reshape(R * E, d).t()
    logits = x.new_empty(N, R, E, dtype=wide)
    scores, index = x.new_empty(N, R, k, dtype=wide), x.new_empty(N, R, k, dtype=torch.int64)

    def compute(block: slice) -> None:
        block_logits = logits[block]
        torch.mm(x[block].to(wide), columns, out=block_logits.view(-1, R * E))
        all_scores = torch.sigmoid(block_logits)
        choosing = all_scores
        if keep is not None and drop_scores:
            all_scores.mul_(keep[block])
        elif keep is not None:
            choosing = block_logits.masked_fill(~keep[block], -torch.inf)
        index[block] = top_k(choosing, k)
        scores[block] = all_scores.gather(-1, index[block])

    run_blocks(N, compute)
    load, order = counting_sort(index, E)
    return logits, scores, index, load, order


def top_k(values: Tensor, k: int) -> Tensor:
    """Indices [..., k] (int64) of the k largest of `values` [..., E], best first; ties go to the lowest index.

    torch.topk promises nothing about ties, so it is given values without any: an fp32 number leaves 29 bits of an fp64
    one free, which take the index. One thread, [4096, 16] k=4 and [4096, 64] k=8: 1.7 and 5.9 ms; the full stable sort
    2.0 and 12.1, k rounds of argmax 1.7 and 7.9, torch.topk alone (wrong in ties) 1.3 and 4.5.
    """
    num_experts = values.shape[-1]
    if values.dtype == torch.float64:  # no bits are free; fp64 is for tests
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    # -inf would become a NaN with an index in its lowest bits: a power of two below every fp32 number stands for it.
    # Adding 0.0 turns -0.0, which ties with 0.0, into it.
    key = values.double().clamp_min_(-(2.0**200)).add_(0.0).view(torch.int64)
    mask = (1 << (num_experts - 1).bit_length()) - 1
    ascending = torch.arange(num_experts, device=values.device)
    # More low bits make a positive number larger and a negative one smaller.
    key |= torch.where(key < 0, ascending, mask - ascending)
    best = key.view(torch.float64).topk(k, dim=-1).values.view(torch.int64)
    return torch.where(best < 0, best, ~best).bitwise_and_(mask)


def counting_sort(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`index` [N, R, k] -> load [R, E] and order [R, N*k], both int64.

    numpy sorts keys of 16 bits by counting, torch.sort only 32768 or more of them: 16384 slots of 16 experts take
    0.13 ms, torch.sort 0.95, nonzero of a one-hot matrix 1.2; 32768 of 32 take 0.28, 0.36 (int16) and 4.3.
    """
    N, R, k = index.shape
    slots = index.transpose(0, 1).reshape(R, N * k)
    offset = torch.arange(0, R * num_experts, num_experts, device=index.device)[:, None]
    load = torch.bincount((slots + offset).flatten(), minlength=R * num_experts).view(R, num_experts)
    narrow = slots.to(torch.int16 if num_experts <= 1 << 15 else torch.int32)
    order = torch.from_numpy(numpy.argsort(narrow.numpy(), axis=-1, kind="stable"))
    return load, order


def _backward_cpu(
    grad_logits: Tensor | None, grad_scores: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    N, (R, E, d) = x.shape[0], weight.shape
    rows = weight.to(scores.dtype).reshape(R * E, d)
    grad_x = x.new_empty(x.shape)
    partial_sums: dict[int, Tensor] = {}

    def compute(block: slice) -> None:
        grad = scores.new_zeros(block.stop - block.start, R, E)
        if grad_scores is not None:
            # s (1 - s) is 0 for a dropped score of 0 too. The k indices of a row differ: one addend per element.
            s = scores[block]
            grad.scatter_(-1, index[block], grad_scores[block] * s * (1.0 - s))
        if grad_logits is not None:
            grad += grad_logits[block]
        flat = grad.view(-1, R * E)
        if x.dtype == flat.dtype:
            torch.mm(flat, rows, out=grad_x[block])
        else:
            grad_x[block] = flat @ rows
        partial_sums[block.start] = flat.t() @ x[block].to(flat.dtype)

    run_blocks(N, compute)
    grad_weight = rows.new_zeros(rows.shape)
    for start in sorted(partial_sums):
        grad_weight += partial_sums[start]
    return grad_x, grad_weight.view(R, E, d).to(weight.dtype)
