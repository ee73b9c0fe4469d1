"""Rows of slots sorted by expert, on CPU: what the ops over single experts (sigma_moe, expert_linear) share.

A slot n*k + j is the j-th choice of token n; `order` [R] lists the slots grouped by expert (see ops/route.py).
R = N*k, or less where a tensor-parallel rank holds some of the experts: the other slots count as zero rows.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu.workers import scratch

TILE_STEP = 32
"""Rows. Of 512 rows on average an expert wastes 3%."""


def expert_segments(counts: list[int]) -> list[slice]:
    """The rows of every expert in the sorted order."""
    ends = itertools.accumulate(counts)
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def sorted_gates(scores: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1]: the gate of every sorted row."""
    return scores.flatten()[order, None].to(dtype)


def inverse(order: Tensor, num_slots: int) -> Tensor:
    """[num_slots]: where each slot is in the sorted order; R, the row after the last, for a slot that is not in it."""
    rows = torch.arange(order.shape[0], device=order.device)
    return order.new_full((num_slots,), order.shape[0]).scatter_(0, order, rows)


def slot_rows(order: Tensor, num_slots: int, width: int, dtype: torch.dtype) -> Tensor:
    """Scratch [R, width], a row for every sorted slot; a row of zeros follows if slots are missing."""
    num_rows = order.shape[0]
    if num_rows == num_slots:
        return scratch("rows", (num_rows, width), dtype)
    rows = scratch("rows", (num_rows + 1, width), dtype)
    rows[num_rows].zero_()
    return rows


def sum_slots(rows: Tensor, order: Tensor, k: int, x: Tensor) -> Tensor:
    """Sum over the k slots of each token of `slot_rows`, sorted by expert, in the shape and dtype of `x` [N, d].

    Gathers and sums in one pass with fp32 sums, on the threads of the operator, which writes its result once. Blocks on
    the workers, each copied to its place, are slower, and index_select and sum apart slower still (docs/kernels.md).
    """
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    places = inverse(order, x.shape[0] * k).view(-1, k)
    return F.embedding_bag(places, rows, mode="sum").to(x.dtype)


def tile_rows(count: int, dtype: torch.dtype) -> int:
    """Rows of the tile for an expert's `count` rows: in bf16 some rows of zeros follow, so that few shapes occur.

    oneDNN builds a program for every shape that it multiplies in bf16, which takes longer than the product, and the
    experts have other counts in every step.
    """
    return count if dtype != torch.bfloat16 else -(-count // TILE_STEP) * TILE_STEP


def gather(name: str, source: Tensor, rows: Tensor) -> Tensor:
    """A tile `name` of scratch with the `rows` of `source` [_, width]."""
    tile = scratch(name, (tile_rows(len(rows), source.dtype), source.shape[1]), source.dtype)
    torch.index_select(source, 0, rows, out=tile[: len(rows)])
    tile[len(rows) :].zero_()
    return tile


def filled(name: str, rows: Tensor) -> Tensor:
    """A tile `name` of scratch with the `rows`, or these where nothing fills them up."""
    if tile_rows(len(rows), rows.dtype) == len(rows):
        return rows
    tile = empty_tile(name, len(rows), rows.shape[1], rows.dtype)
    tile[: len(rows)] = rows
    return tile


def empty_tile(name: str, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """A tile `name` of scratch for `count` rows that are not written yet; those that fill it up are zero."""
    tile = scratch(name, (tile_rows(count, dtype), width), dtype)
    tile[count:].zero_()
    return tile


def mm_rows(tile: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, _] = the first n rows of `tile` @ `weight`."""
    if len(tile) == len(out):
        torch.mm(tile, weight, out=out)
    else:
        product = scratch("product", (len(tile), out.shape[1]), tile.dtype)
        out.copy_(torch.mm(tile, weight, out=product)[: len(out)])


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, rounded once where `out` is narrower."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def clear_unused(counts: list[int], *gradients: Tensor) -> None:
    """Zero gradient for the experts that no token chose."""
    for expert, count in enumerate(counts):
        if count == 0:
            for gradient in gradients:
                gradient[expert].zero_()
