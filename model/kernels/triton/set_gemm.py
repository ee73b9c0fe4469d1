"""GEMMs over tokens in the order of the set of experts that they chose: the chosen experts and no others, for k < E.

    project    products = row W[expert], of the set's experts       mixed = their sum by the gates
    gradient   grad_W[e] = sum over the tokens that chose e of wide^T gated[e]

The tokens of a set need the same k experts, so a tile of their rows, gathered where they stand, is loaded once and
multiplied by k experts into k accumulators. Neither operand passes through registers, and gates multiply the fp32 sums.
Grouping is the counting sort of model/kernels/triton/sorted_slots.py by the bits of the chosen experts, so a head has
2^E numbers of sets, of which C(E, k) may have tokens. Nothing is added atomically, no grid depends on data.

Shape legend: N tokens, d d_model (wide), H heads, h head_dim (narrow), E experts of a head, k chosen experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.backend import cuda_capability
from model.kernels.ops.route import Choice
from model.kernels.triton.gated_gemm import GemmTiles, column_tile, padded_experts, store_expert_gradient
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.sorted_gemm import find_segment
from model.kernels.triton.sorted_slots import sort_slots
from model.kernels.triton.tiles import measured


class Groups(NamedTuple):
    """The tokens of every head by the set of experts that they chose."""

    order: Tensor
    """[H, N] int64: the tokens, set by set; within a set in their own order."""
    load: Tensor
    """[H, 2^E] int64: tokens of each set; bit e of its number says whether expert e is in it."""


def group(index: Tensor, num_experts: int) -> Groups:
    """`index` [N, H, k] of the chosen experts. Five launches, no host sync."""
    bits = torch.ones_like(index).bitwise_left_shift_(index).sum(-1, keepdim=True)
    return Groups(*sort_slots(bits, 1 << num_experts))


@triton.jit
def find_set(load, tile, SETS: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> (set, first row, row after the last) of a tile of one head; no tile: the last two are equal.

    Tiles are counted in rounds: the first tile of every set, then the second of every set that has one, and so on. Sets
    keep the order of the tokens, so tiles that run at the same time, of all heads, gather their rows from the same part
    of the batch, and find them in L2."""
    sets = tl.arange(0, SETS)
    count = tl.load(load + sets).to(tl.int32)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    low, high = 0, tl.max(tiles, axis=0)
    while low + 1 < high:  # the last round that begins at this tile or before it
        middle = (low + high) // 2
        before = tl.sum(tl.minimum(tiles, middle), axis=0)
        low = tl.where(before <= tile, middle, low)
        high = tl.where(before <= tile, high, middle)
    has_tile = tiles > low
    place = tile - tl.sum(tl.minimum(tiles, low), axis=0)
    is_mine = has_tile & (tl.cumsum(has_tile.to(tl.int32), axis=0) == place + 1)
    stop = tl.cumsum(count, axis=0)
    number = tl.sum(tl.where(is_mine, sets, 0), axis=0)
    first = tl.sum(tl.where(is_mine, stop - count + low * BLOCK_M, 0), axis=0)
    return number, first, tl.sum(tl.where(is_mine, stop, 0), axis=0)


@triton.jit
def expert_at(number, place: tl.constexpr, E: tl.constexpr):
    """The expert at `place` of set `number`, in rising order."""
    found, before = 0, 0
    for expert in tl.static_range(E):
        is_in = (number >> expert) & 1
        found += expert * ((before == place) & (is_in == 1)).to(tl.int32)
        before += is_in
    return found


@triton.jit
def set_project_kernel(
    rows,
    order,
    load,
    scores,
    index,
    experts,
    mixed,
    products,
    N,
    d: tl.constexpr,
    h: tl.constexpr,
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rows [N, d], experts [H, E, d, h] or if TRANSPOSED [H, E, h, d], scores and index [N, H, K] -> products of the
    choices [N, H, K, h], and mixed [N, H, h], their sum by the scores before they are rounded.

    One program per (column tile, head, tile of a set); heads vary fastest but for columns."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(h, BLOCK_N)
    column_tile = program % column_tiles
    program //= column_tiles
    head = program % H
    number, first, stop = find_set(load + head * (1 << E), program // H, 1 << E, BLOCK_M)
    if first < stop:
        position = first + tl.arange(0, BLOCK_M)
        inside = position < stop
        tokens = tl.load(order + head.to(tl.int64) * N + position, mask=inside, other=0)
        source = rows + tokens[:, None] * d

        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = columns < h
        weights = experts + head.to(tl.int64) * E * d * h
        totals = ()
        for _ in tl.static_range(K):
            totals = totals + (tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        for start in range(0, d, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            inner_mask = inner < d
            a = tl.load(source + inner[None, :], mask=inside[:, None] & inner_mask[None, :], other=0.0)
            if TRANSPOSED:
                address = columns[None, :] * d + inner[:, None]
            else:
                address = inner[:, None] * h + columns[None, :]
            sums = ()
            for j in tl.static_range(K):
                weight = weights + expert_at(number, j, E) * d * h
                b = tl.load(weight + address, mask=inner_mask[:, None] & column_mask[None, :], other=0.0)
                sums = sums + (tl.dot(a, b, totals[j], input_precision="ieee"),)  # type: ignore[assignment]  # noqa: RUF005
            totals = sums

        choice = tl.arange(0, PADDED_K)
        pairs = tokens * H + head
        slots, present = pairs[:, None] * K + choice[None, :], inside[:, None] & (choice < K)[None, :]
        score = tl.load(scores + slots, mask=present, other=0.0).to(tl.float32)
        chosen = tl.load(index + slots, mask=present, other=-1).to(tl.int32)
        mask = inside[:, None] & column_mask[None, :]
        target = pairs[:, None] * h + columns[None, :]
        result = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for j in tl.static_range(K):
            is_it = chosen == expert_at(number, j, E)
            slot = pairs * K + tl.sum(tl.where(is_it, choice[None, :], 0), axis=1)  # which choice of the token it is
            address = products + slot[:, None] * h + columns[None, :]
            tl.store(address, totals[j].to(products.dtype.element_ty), mask=mask)
            result += totals[j] * tl.sum(tl.where(is_it, score, 0.0), axis=1)[:, None]
        tl.store(mixed + target, result.to(mixed.dtype.element_ty), mask=mask)


@triton.jit
def set_gradient_kernel(
    wide,
    gated,
    order,
    load,
    grad_experts,
    N,
    d: tl.constexpr,
    h: tl.constexpr,
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    PADDED_E: tl.constexpr,
    NARROW_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """wide [N, d], gated [N, H, E, h], a router's order [H, N*K] and load [H, E] -> grad_experts [H, E, d, h], or [H,
    E, h, d] if NARROW_FIRST. One program owns (head, expert, tile) and walks over the tokens that chose the expert.
    Pairs of head and expert vary fastest: at any time all programs walk over the same part of the batch."""
    program = tl.program_id(0)
    pair = program % (H * E)
    program //= H * E
    head, expert = pair // E, pair % E
    narrow_tiles = tl.cdiv(h, BLOCK_N)
    columns = (program % narrow_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = (program // narrow_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature_mask, column_mask = features < d, columns < h
    start, stop = find_segment(load + head * E, expert, E, PADDED_E)
    order += head.to(tl.int64) * N * K

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, stop, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        mask = position < stop
        tokens = tl.load(order + position, mask=mask, other=0) // K
        a = tl.load(wide + tokens[:, None] * d + features[None, :], mask=mask[:, None] & feature_mask[None, :], other=0)
        row = gated + (tokens * H * E + pair)[:, None] * h
        b = tl.load(row + columns[None, :], mask=mask[:, None] & column_mask[None, :], other=0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    store_expert_gradient(grad_experts, pair, total, features, columns, d, h, NARROW_FIRST)


WIDE_TILES_ON = ((9, 0),)
"""Compute capabilities on which 128 sums a thread, addresses and what follows the loop fit the registers of 8 warps,
with every Triton that torch brings: benchmarks/compiled.py."""


def project_tiles(h: int, k: int, dtype: torch.dtype, capability: tuple[int, int] | None = None) -> GemmTiles:
    """`columns` are those of one expert; a program multiplies k times as many. `capability`: this GPU's if None."""
    padded = triton.next_power_of_2(k)
    if dtype == torch.float32:
        return GemmTiles(32, max(16, column_tile(h, 64) // padded), 16, 4, 2)
    is_wide = k <= 2 and (capability or cuda_capability()) in WIDE_TILES_ON
    return GemmTiles(128, max(16, min(column_tile(h), (256 if is_wide else 128) // padded)), 64, 8, 3)


def gradient_tiles(
    d: int, h: int, pairs: int, dtype: torch.dtype, capability: tuple[int, int] | None = None
) -> GemmTiles:
    """d x h tiles, `depth` tokens a step; wide ones where there are as many as SMs of an H100 nevertheless."""
    if dtype == torch.float32:
        return GemmTiles(64, column_tile(h, 64), 16, 4, 2)
    columns = column_tile(h)
    many = pairs * triton.cdiv(h, columns) * triton.cdiv(d, 256) >= 128
    is_wide = many and (capability or cuda_capability()) in WIDE_TILES_ON
    # Tokens are loaded before their rows, so a tile in flight takes two stages: of 5, three are.
    return GemmTiles(256 if is_wide else 128, columns, 64, 8, 5 if is_wide else 4)


@on_its_device
def project(
    rows: Tensor,
    groups: Groups,
    choice: Choice,
    experts: Tensor,
    *,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """`rows` [N, d], `experts` [H, E, d, h], or `transposed` [H, E, h, d]: -> mixed [N, H, h], and the products of the
    choices [N, H, k, h]. All are contiguous."""
    (N, H, k), E = choice.index.shape, experts.shape[1]
    d, h = experts.shape[:1:-1] if transposed else experts.shape[2:]
    tiles, shape = project_tiles(h, k, rows.dtype), {"d": d, "H": H, "E": E, "k": k, "h": h}
    if found := measured("set_gemm project", rows.dtype, at=N, **shape, transposed=int(transposed)):
        tiles = GemmTiles(**found)
    column_tiles = triton.cdiv(h, tiles.columns)
    mixed, products = rows.new_empty(N, H, h), rows.new_empty(N, H, k, h)
    if N > 0:
        set_project_kernel[((triton.cdiv(N, tiles.rows) + math.comb(E, k)) * H * column_tiles,)](
            rows=rows,
            order=groups.order,
            load=groups.load,
            scores=choice.scores,
            index=choice.index,
            experts=experts,
            mixed=mixed,
            products=products,
            N=N,
            d=d,
            h=h,
            H=H,
            E=E,
            K=k,
            PADDED_K=triton.next_power_of_2(k),
            TRANSPOSED=transposed,
            **tiles.launch,
        )
    return mixed, products


@on_its_device
def expert_gradient(wide: Tensor, gated: Tensor, choice: Choice, like: Tensor, *, narrow_first: bool) -> Tensor:
    """`wide` [N, d], `gated` [N, H, E, h]: the gradient of experts of the shape of `like`, [H, E, d, h], or
    `narrow_first` [H, E, h, d]. All are contiguous."""
    (N, H, E, h), d, k = gated.shape, wide.shape[1], choice.index.shape[2]
    grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    if N == 0:
        return grad.zero_()
    tiles, shape = gradient_tiles(d, h, H * E, wide.dtype), {"d": d, "H": H, "E": E, "k": k, "h": h}
    if found := measured("set_gemm gradient", wide.dtype, at=N, **shape, narrow_first=int(narrow_first)):
        tiles = GemmTiles(**found)
    set_gradient_kernel[(H * E * triton.cdiv(d, tiles.rows) * triton.cdiv(h, tiles.columns),)](
        wide=wide,
        gated=gated,
        order=choice.order,
        load=choice.load,
        grad_experts=grad,
        N=N,
        d=d,
        h=h,
        H=H,
        E=E,
        K=k,
        PADDED_E=padded_experts(E),
        NARROW_FIRST=narrow_first,
        **tiles.launch,
    )
    return grad
