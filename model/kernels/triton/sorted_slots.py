"""The counting sort of slots by expert, where no router gives it; sums over k and dot products, which read slots in
token order.

A slot n*k + j is the j-th choice of token n; every router (head) has its own N*k slots. Sorted GEMMs
(model/kernels/triton/sorted_gemm.py) take rows in the order of experts and write them back to their slots, so that
whoever sums over a token's choices reads k neighbouring rows: no inverse permutation exists, and nothing is added
atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.gated_gemm import padded_experts
from model.kernels.triton.launch import on_its_device

SORT_TILE = 1 << 14
"""Counters of one program of the sort, slots x experts: 64 a thread."""
COUNT_BLOCK = 32
"""Blocks whose counts a program of `place_slots_kernel` reads at a time."""


# ---------------------------------------------------------------------------------------------------------------- sort


@triton.jit
def chosen_experts(index, N, K: tl.constexpr, PADDED_K: tl.constexpr, TOKENS: tl.constexpr):
    """index [N, R, K] -> slot numbers and experts [TOKENS * PADDED_K] of this program's tokens at its router, in the
    order of the slots; the expert is -1 where there is none."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    choice = tl.arange(0, PADDED_K)[None, :]
    address = (tokens * tl.num_programs(1) + tl.program_id(1)) * K + choice
    chosen = tl.load(index + address, mask=(tokens < N) & (choice < K), other=-1).to(tl.int32)
    return tl.reshape(tokens * K + choice, TOKENS * PADDED_K), tl.reshape(chosen, TOKENS * PADDED_K)


@triton.jit
def count_slots_kernel(
    index, counts, N, E, K: tl.constexpr, PADDED_K: tl.constexpr, PADDED_E: tl.constexpr, TOKENS: tl.constexpr
):
    """counts [R, blocks, E] int32: slots of each expert in each block of tokens."""
    _, chosen = chosen_experts(index, N, K, PADDED_K, TOKENS)
    experts = tl.arange(0, PADDED_E)
    count = tl.sum((chosen[:, None] == experts[None, :]).to(tl.int32), axis=0)
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + block * E + experts, count, mask=experts < E)


@triton.jit
def place_slots_kernel(
    index,
    counts,
    order,
    load,
    N,
    E,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_E: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """order [R, N*K]: the slots by expert, in token order within one; load [R, E]. Every program adds up
    the counts of the blocks before its own, in the same order: no atomics, and no launch for the prefix sums."""
    block, router = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    experts = tl.arange(0, PADDED_E)
    total = tl.zeros((PADDED_E,), dtype=tl.int32)
    before = tl.zeros((PADDED_E,), dtype=tl.int32)
    for first in range(0, blocks, COUNTS):
        others = first + tl.arange(0, COUNTS)
        address = (router * blocks + others)[:, None] * E + experts[None, :]
        count = tl.load(counts + address, mask=(others < blocks)[:, None] & (experts < E)[None, :], other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((others < block)[:, None], count, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total + before
    slots, chosen = chosen_experts(index, N, K, PADDED_K, TOKENS)
    is_chosen = (chosen[:, None] == experts[None, :]).to(tl.int32)
    rank = tl.cumsum(is_chosen, axis=0) - 1
    place = tl.sum(is_chosen * (rank + start[None, :]), axis=1)
    tl.store(order + router * N * K + place, slots, mask=chosen >= 0)
    if block == 0:
        tl.store(load + router * E + experts, total, mask=experts < E)


@on_its_device
def sort_slots(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`index` [N, R, k] -> order [R, N*k] (a stable counting sort) and load [R, E], both int64 like a router's. Two
    launches, no host sync."""
    N, R, k = index.shape
    order, load = (index.new_empty(R, size, dtype=torch.int64) for size in (N * k, num_experts))
    if N == 0:
        return order, load.zero_()
    padded_k, padded_e = triton.next_power_of_2(k), padded_experts(num_experts)
    tokens = max(1, SORT_TILE // (padded_k * padded_e))
    blocks = triton.cdiv(N, tokens)
    counts = index.new_empty(R, blocks, num_experts, dtype=torch.int32)
    shape = {"N": N, "E": num_experts, "K": k, "PADDED_K": padded_k, "PADDED_E": padded_e, "TOKENS": tokens}
    count_slots_kernel[(blocks, R)](index=index, counts=counts, **shape, num_warps=8)
    place_slots_kernel[(blocks, R)](
        index=index, counts=counts, order=order, load=load, **shape, COUNTS=COUNT_BLOCK, num_warps=8
    )
    return order, load


# ----------------------------------------------------------------------------------------------------- sums over slots


@triton.jit
def sum_slots_kernel(
    rows,
    y,
    N,
    width: tl.constexpr,
    stride: tl.constexpr,
    routers,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """rows [R, N*K, stride] -> y [N, width]: the sum over routers and choices, in fp32."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(width, BLOCK_N)
    columns = (program % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = (program // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (tokens < N)[:, None] & (columns < width)[None, :]
    readable = (tokens < N)[:, None] & (columns < stride)[None, :]  # what is beyond the width is not stored
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for router in range(routers):
        for choice in tl.static_range(K):
            slots = (router * N + tokens).to(tl.int64) * K + choice
            total += tl.load(rows + slots[:, None] * stride + columns[None, :], mask=readable, other=0.0).to(tl.float32)
    target = y + tokens.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def mix_slots_kernel(
    products,
    scores,
    rows,
    mixed,
    grad_scores,
    N,
    width: tl.constexpr,
    K: tl.constexpr,
    MIX: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """products [R, N*K, width], scores [N, R, K], rows [N, R, width], both for every choice of a token at a router:

    MIX   mixed [N, R, width]    = sum over choices of score * product
    DOT   grad_scores [N, R, K]  = <row, product>
    """
    routers = tl.num_programs(1)
    router = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_mask = tokens < N
    pairs = tokens.to(tl.int64) * routers + router
    for choice in tl.static_range(K):
        if DOT:
            similarity = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for start in range(0, width, BLOCK_N):
                columns = start + tl.arange(0, BLOCK_N)
                mask = token_mask[:, None] & (columns < width)[None, :]
                slots = (router * N + tokens).to(tl.int64) * K + choice
                product = tl.load(products + slots[:, None] * width + columns[None, :], mask=mask, other=0.0)
                row = tl.load(rows + pairs[:, None] * width + columns[None, :], mask=mask, other=0.0)
                similarity += tl.sum(product.to(tl.float32) * row.to(tl.float32), axis=1)
            tl.store(grad_scores + pairs * K + choice, similarity.to(grad_scores.dtype.element_ty), mask=token_mask)
    if MIX:
        for start in range(0, width, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            mask = token_mask[:, None] & (columns < width)[None, :]
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for choice in tl.static_range(K):
                slots = (router * N + tokens).to(tl.int64) * K + choice
                product = tl.load(products + slots[:, None] * width + columns[None, :], mask=mask, other=0.0)
                score = tl.load(scores + pairs * K + choice, mask=token_mask, other=0.0).to(tl.float32)
                total += product.to(tl.float32) * score[:, None]
            target = mixed + pairs[:, None] * width + columns[None, :]
            tl.store(target, total.to(mixed.dtype.element_ty), mask=mask)


SUM_TILE = (16, 128)
"""Tokens and columns of one program of the sums: 16 bytes a thread and load at 4 warps."""


def slot_stride(width: int) -> int:
    """Elements from one wide slot row to the next: n * 16 bytes in bf16, so that `sum_slots` loads 16 bytes."""
    return -(-width // 8) * 8


def sum_slots(rows: Tensor, num_tokens: int, width: int) -> Tensor:
    """`rows` [R, N*k, stride >= width] -> [N, width], summed over routers and choices."""
    R, num_slots, stride = rows.shape
    y = rows.new_empty(num_tokens, width)
    grid = (triton.cdiv(num_tokens, SUM_TILE[0]) * triton.cdiv(width, SUM_TILE[1]),)
    if num_tokens > 0:
        sum_slots_kernel[grid](
            rows=rows,
            y=y,
            N=num_tokens,
            width=width,
            stride=stride,
            routers=R,
            K=num_slots // num_tokens,
            BLOCK_M=SUM_TILE[0],
            BLOCK_N=SUM_TILE[1],
            num_warps=4,
        )
    return y


def mix_slots(
    products: Tensor, scores: Tensor, rows: Tensor | None = None, *, mix: bool = True
) -> tuple[Tensor, Tensor]:
    """`products` [R, N*k, width], `scores` [N, R, k], `rows` [N, R, width] -> mixed [N, R, width] (with
    `mix`) and, for given `rows`, the gradient of the scores [N, R, k]; what was not asked for is empty."""
    (N, R, k), width = scores.shape, products.shape[-1]
    mixed = products.new_empty((N, R, width) if mix else (0,))
    grad_scores = torch.empty_like(scores) if rows is not None else mixed
    given = products if rows is None else rows
    if N > 0:
        mix_slots_kernel[(triton.cdiv(N, SUM_TILE[0]), R)](
            products=products,
            scores=scores,
            rows=given,
            mixed=mixed,
            grad_scores=grad_scores,
            N=N,
            width=width,
            K=k,
            MIX=mix,
            DOT=rows is not None,
            BLOCK_M=SUM_TILE[0],
            BLOCK_N=SUM_TILE[1],
            num_warps=4,
        )
    return mixed, grad_scores
