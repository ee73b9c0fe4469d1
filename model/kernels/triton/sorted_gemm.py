"""GEMMs over slots sorted by expert, for routers that choose fewer than half of the experts (2k < E).

    project   out[slot] = gate[slot] * row[slot] W[expert of slot]         rows gathered, results written to their slots
    gradient  grad_W[e] = sum over the slots of e of gate[slot] * wide[slot]^T narrow[slot]

Only useful rows are computed: k of E experts, and up to one tile of padding per expert. The grid does not depend on the
data: ceil(slots / rows) + E tiles per router, and a program finds its expert by adding up the loads (E numbers); those
left over leave at once. Every element is written by one program.

Shape legend: R routers (heads; 1 for expert_linear), N tokens, k choices, E experts; a slot n*k + j is the j-th choice
of token n at its router. Rows of tokens [N, width] or [N, R, width] serve all k slots of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.gated_gemm import (
    GemmTiles,
    column_tile,
    gradient_tiles,
    padded_experts,
    scale_rows,
    store_expert_gradient,
)


class Rows(NamedTuple):
    """One row for every slot: row slot // divide of `tensor`, `offset` elements further for each router."""

    tensor: Tensor
    stride: int
    router_stride: int
    divide: int

    @classmethod
    def of_tokens(cls, tensor: Tensor, k: int) -> Rows:
        """[N, width], shared by the routers, or [N, R, width]."""
        if tensor.dim() == 2:
            return cls(tensor, tensor.shape[1], 0, k)
        return cls(tensor, tensor.shape[1] * tensor.shape[2], tensor.shape[2], k)

    @classmethod
    def of_slots(cls, tensor: Tensor) -> Rows:
        """[N, k, width] of one router."""
        return cls(tensor, tensor.shape[2], 0, 1)


@triton.jit
def find_tile(load, tile, E, PADDED_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> (expert, first row, row after the last) of a tile of the sorted slots of one router; expert >= E: no tile."""
    experts = tl.arange(0, PADDED_E)
    count = tl.load(load + experts, mask=experts < E, other=0).to(tl.int32)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles, axis=0)
    stop = tl.cumsum(count, axis=0)
    expert = tl.sum((last_tile <= tile).to(tl.int32), axis=0)
    is_mine = experts == expert
    first = tl.sum(tl.where(is_mine, stop - count + (tile - last_tile + tiles) * BLOCK_M, 0), axis=0)
    return expert, first, tl.sum(tl.where(is_mine, stop, 0), axis=0)


@triton.jit
def find_segment(load, expert, E, PADDED_E: tl.constexpr):
    """-> (first row, row after the last) of an expert in the sorted slots of one router."""
    experts = tl.arange(0, PADDED_E)
    count = tl.load(load + experts, mask=experts < E, other=0).to(tl.int32)
    start = tl.sum(tl.where(experts < expert, count, 0), axis=0)
    return start, start + tl.sum(tl.where(experts == expert, count, 0), axis=0)


@triton.jit
def gate_address(slots, router, routers, k: tl.constexpr):
    """Of scores [N, R, k]."""
    return ((slots // k) * routers + router) * k + slots % k


@triton.jit
def sorted_project_kernel(
    rows,
    row_stride: tl.constexpr,
    router_stride: tl.constexpr,
    divide: tl.constexpr,
    gates,
    k: tl.constexpr,
    order,
    load,
    weights,
    out,
    num_slots,
    inner_width: tl.constexpr,
    width: tl.constexpr,
    out_stride: tl.constexpr,
    routers,
    E,
    TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [R, slots, out_stride] = gate * rows weights[router, expert].

    weights [R, E, inner_width, width], or if TRANSPOSED [R, E, width, inner_width]; gates [N, R, k] multiply the
    accumulator, in fp32. Column tiles vary fastest: the gathered rows are read from memory once, then from L2."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(width, BLOCK_N)
    columns = (program % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < width
    tiles = tl.cdiv(num_slots, BLOCK_M) + E
    program //= column_tiles
    router = program // tiles
    expert, first, stop = find_tile(load + router * E, program % tiles, E, PADDED_E, BLOCK_M)
    if expert < E:
        position = first + tl.arange(0, BLOCK_M)
        row_mask = position < stop
        slots = tl.load(order + router * num_slots + position, mask=row_mask, other=0).to(tl.int64)
        source = rows + router * router_stride + (slots // divide)[:, None] * row_stride
        weight = weights + (router * E + expert).to(tl.int64) * inner_width * width
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, inner_width, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            inner_mask = inner < inner_width
            a = tl.load(source + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
            if TRANSPOSED:
                address = columns[None, :] * inner_width + inner[:, None]
            else:
                address = inner[:, None] * width + columns[None, :]
            b = tl.load(weight + address, mask=inner_mask[:, None] & column_mask[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        if GATED:
            gate = tl.load(gates + gate_address(slots, router, routers, k), mask=row_mask, other=0.0)
            total *= gate.to(tl.float32)[:, None]
        target = out + (router.to(tl.int64) * num_slots + slots)[:, None] * out_stride + columns[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def sorted_weight_gradient_kernel(
    wide,
    wide_stride: tl.constexpr,
    wide_router_stride: tl.constexpr,
    wide_divide: tl.constexpr,
    narrow,
    narrow_stride: tl.constexpr,
    narrow_router_stride: tl.constexpr,
    narrow_divide: tl.constexpr,
    gates,
    k: tl.constexpr,
    order,
    load,
    grad_weights,
    num_slots,
    d: tl.constexpr,
    h: tl.constexpr,
    routers,
    E,
    NARROW_FIRST: tl.constexpr,
    GATED: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_weights[router, expert] = sum over the expert's slots of gate * wide^T narrow: [d, h], or [h, d] if
    NARROW_FIRST. One program owns (router, expert, tile) and walks its segment: zero where nobody chose the expert."""
    program = tl.program_id(0)
    narrow_tiles, wide_tiles = tl.cdiv(h, BLOCK_N), tl.cdiv(d, BLOCK_M)
    columns = (program % narrow_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    program //= narrow_tiles
    features = (program % wide_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = program // wide_tiles
    router, expert = pair // E, pair % E
    feature_mask, column_mask = features < d, columns < h
    start, stop = find_segment(load + router * E, expert, E, PADDED_E)
    wide += router * wide_router_stride
    narrow += router * narrow_router_stride

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, stop, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        mask = position < stop
        slots = tl.load(order + router * num_slots + position, mask=mask, other=0).to(tl.int64)
        a_address = (slots // wide_divide)[:, None] * wide_stride + features[None, :]
        a = tl.load(wide + a_address, mask=mask[:, None] & feature_mask[None, :], other=0.0)
        b_address = (slots // narrow_divide)[:, None] * narrow_stride + columns[None, :]
        b = tl.load(narrow + b_address, mask=mask[:, None] & column_mask[None, :], other=0.0)
        if GATED:
            gate = tl.load(gates + gate_address(slots, router, routers, k), mask=mask, other=0.0).to(tl.float32)
            a = scale_rows(a, gate)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    store_expert_gradient(grad_weights, pair, total, features, columns, d, h, NARROW_FIRST)


def project_tiles(width: int, dtype: torch.dtype) -> GemmTiles:
    if dtype == torch.float32:
        return GemmTiles(64, column_tile(width, 64), 16, 4, 2)
    # 76 columns with 4 warps: 8 bytes of stack on sm_100.
    return GemmTiles(64, column_tile(width), 64, 8 if width % 8 else 4, 3)


def project(
    rows: Rows,
    order: Tensor,
    load: Tensor,
    weights: Tensor,
    scores: Tensor | None,
    k: int,
    *,
    transposed: bool,
    stride: int | None = None,
) -> Tensor:
    """[R, N*k, stride] in slot order, the columns beyond `width` undefined; the stride is the width if not given.

    `weights` [R, E, inner, width], or `transposed` [R, E, width, inner]; `scores` [N, R, k] multiply the results where
    given."""
    R, E = weights.shape[:2]
    inner, width = (weights.shape[i] for i in ((3, 2) if transposed else (2, 3)))
    num_slots = order.shape[-1]
    out = rows.tensor.new_empty(R, num_slots, stride or width)
    tiles = project_tiles(width, rows.tensor.dtype)
    grid = (R * (triton.cdiv(num_slots, tiles.rows) + E) * triton.cdiv(width, tiles.columns),)
    if num_slots > 0:
        sorted_project_kernel[grid](
            rows=rows.tensor,
            row_stride=rows.stride,
            router_stride=rows.router_stride,
            divide=rows.divide,
            gates=rows.tensor if scores is None else scores,
            k=k,
            order=order,
            load=load,
            weights=weights,
            out=out,
            num_slots=num_slots,
            inner_width=inner,
            width=width,
            out_stride=out.shape[2],
            routers=R,
            E=E,
            TRANSPOSED=transposed,
            GATED=scores is not None,
            PADDED_E=padded_experts(E),
            **tiles.launch,
        )
    return out


def sorted_weight_gradient(
    wide: Rows,
    narrow: Rows,
    order: Tensor,
    load: Tensor,
    like: Tensor,
    scores: Tensor | None,
    k: int,
    *,
    narrow_first: bool,
) -> Tensor:
    """The gradient of weights of the shape of `like`: [R, E, d, h], or `narrow_first` [R, E, h, d]."""
    R, E = like.shape[:2]
    d, h = (like.shape[i] for i in ((3, 2) if narrow_first else (2, 3)))
    grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    tiles = gradient_tiles(h, wide.tensor.dtype)
    sorted_weight_gradient_kernel[(R * E * triton.cdiv(d, tiles.rows) * triton.cdiv(h, tiles.columns),)](
        wide=wide.tensor,
        wide_stride=wide.stride,
        wide_router_stride=wide.router_stride,
        wide_divide=wide.divide,
        narrow=narrow.tensor,
        narrow_stride=narrow.stride,
        narrow_router_stride=narrow.router_stride,
        narrow_divide=narrow.divide,
        gates=wide.tensor if scores is None else scores,
        k=k,
        order=order,
        load=load,
        grad_weights=grad,
        num_slots=order.shape[-1],
        d=d,
        h=h,
        routers=R,
        E=E,
        NARROW_FIRST=narrow_first,
        GATED=scores is not None,
        PADDED_E=padded_experts(E),
        **tiles.launch,
    )
    return grad
