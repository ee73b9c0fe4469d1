"""Routing on CPU: blocks of tokens on the workers, top-k without ties, a counting sort by numpy."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from model.kernels.cpu.workers import run_blocks
from model.kernels.dtypes import wide_dtype


def forward(
    x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logits, scores, index, load, order as in `model.kernels.ops.route.Routing`."""
    N, (R, E, d) = x.shape[0], weight.shape
    wide = wide_dtype(x.dtype)
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

    torch.topk does not say which of two equal values it takes, so it gets values that are never equal: an fp32 number
    leaves 29 bits of an fp64 one free, and they hold the index. A full stable sort and k rounds of argmax are slower
    (docs/kernels.md).
    """
    num_experts = values.shape[-1]
    if values.dtype == torch.float64:  # no bits are free; fp64 is for tests
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    # An index in the lowest bits would make -inf a NaN: a power of two below every fp32 number stands for it.
    # -0.0 and 0.0 are equal; adding 0.0 makes both of them 0.0.
    key = values.double().clamp_min_(-(2.0**200)).add_(0.0).view(torch.int64)
    mask = (1 << (num_experts - 1).bit_length()) - 1
    ascending = torch.arange(num_experts, device=values.device)
    # More low bits make a positive number larger and a negative one smaller.
    key |= torch.where(key < 0, ascending, mask - ascending)
    best = key.view(torch.float64).topk(k, dim=-1).values.view(torch.int64)
    return torch.where(best < 0, best, ~best).bitwise_and_(mask)


def counting_sort(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`index` [N, R, k] -> load [R, E] and order [R, N*k], both int64.

    numpy sorts keys of 16 bits by counting; torch.sort does so only for 32768 keys or more (docs/kernels.md).
    """
    N, R, k = index.shape
    slots = index.transpose(0, 1).reshape(R, N * k)
    offset = torch.arange(0, R * num_experts, num_experts, device=index.device)[:, None]
    load = torch.bincount((slots + offset).flatten(), minlength=R * num_experts).view(R, num_experts)
    narrow = slots.to(torch.int16 if num_experts <= 1 << 15 else torch.int32)
    order = torch.from_numpy(numpy.argsort(narrow.numpy(), axis=-1, kind="stable"))
    return load, order


def backward(
    grad_logits: Tensor | None, grad_scores: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight. At least one of `grad_logits` [N, R, E] and `grad_scores` [N, R, k] is there."""
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


def group_choices(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """As `model.kernels.ops.route.group_choices`."""
    load, order = counting_sort(index, num_experts)
    return order, load
