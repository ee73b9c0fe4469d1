"""Routing on a GPU: two launches forward, two backward, no host sync, no atomics, the same bits every time.

forward   choose   logits = x W^T, sigmoid, top-k, and how many slots of each block of tokens go to each expert
          place    from those counts, where each slot stands in the order by expert: a stable counting sort
backward  gradients  of x, and partial sums of the weight's over chunks of tokens
          add_up     the partial sums, in the order of the chunks

A token chooses an expert at most once, so a slot's place among those of its expert is the number of earlier tokens that
chose it: a running count over tokens, no sort. `place` reads the counts of all blocks in every program instead of a
launch of its own for a prefix sum: 16 KB per program at N = 8192, R E = 32.

Columns of a tile are routers x experts, experts padded to a power of two. Offsets of rows are int64: N d may pass 2^31.
d_model is a constant: of an argument that is no multiple of 16, such as 412, rows would be loaded number by number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.launch import on_its_device
from model.kernels.triton.sorted_slots import sort_slots
from model.kernels.triton.tiles import Tiles, measured

MAX_EXPERTS = 1024
MAX_COLUMNS = 128
"""Routers that share a program's read of x have at most this many padded experts together."""
TILE = 4096
"""Logits of a program, tokens x columns: as 64-bit keys 64 registers a thread at 4 warps."""
MAX_PLACERS = 256
"""Programs of `place` per group of routers; each reads the counts of all blocks."""
MAX_GRADIENT_PROGRAMS = 256
"""Bounds the partial sums of the weight's gradient; a constant, so that sums do not depend on the GPU's size."""
GRADIENT_OPTIONS = {"num_warps": 8, "num_stages": 1}
OPTIONS = {"num_warps": 4, "num_stages": 3}
COUNTS, ADD_UP = 64, 1024
"""Blocks whose counts are read at a time, and elements of a sum per program."""


@dataclass(frozen=True, kw_only=True)
class RouterTiles:
    """What the shapes decide; nothing depends on data."""

    tokens: int
    routers: int
    experts: int
    """Padded."""
    depth: int
    """Elements of d_model per step of the logits."""
    gradient_depth: int
    """Elements of d_model per program of the gradients; with `gradient_tokens`, what fits the registers of sm_80."""
    gradient_tokens: int

    @property
    def options(self) -> dict[str, int]:
        # Of 32 columns, eight routers of four experts spill on sm_100 with 4 warps, and one of 32 experts with 8.
        few = self.routers * self.experts <= 16 or self.experts == 32
        return {"num_warps": 4 if few else 8, "num_stages": 3}

    @classmethod
    def of(cls, num_routers: int, num_experts: int, dtype: torch.dtype) -> RouterTiles:
        experts = triton.next_power_of_2(num_experts)
        routers = min(triton.next_power_of_2(num_routers), max(1, MAX_COLUMNS // experts))
        routers = max(routers, 16 // experts)  # tl.dot takes no fewer than 16 columns
        columns = routers * experts
        return cls(
            tokens=min(16 if dtype == torch.float32 else 64, max(16, TILE // columns)),
            routers=routers,
            experts=experts,
            depth=32 if dtype == torch.float32 else 64,  # twice the tokens or depth, and some of these spill
            gradient_depth=max(16, min(128, 4096 // columns) // (1 if dtype == torch.bfloat16 else 2)),
            # 64 beside 16 columns: 8 bytes of stack on sm_100.
            gradient_tokens=32 if columns == 16 else max(16, min(64, 2048 // columns)),
        )


def forward_tiles(own: RouterTiles, x: Tensor, R: int, E: int, k: int) -> tuple[Tiles, Tiles]:
    """Of the forward pass of `x` [N, d], of choosing and of placing: what was measured, else those that are the
    kernels' own. `place` goes by the blocks of tokens of `choose`, in as many warps."""
    (N, d), options = x.shape, own.options
    launch = {"warps": options["num_warps"], "stages": options["num_stages"]}
    shape = {"d": d, "R": R, "E": E, "k": k}
    choosing = measured("route choose and place", x.dtype, at=N, **shape)
    placing = measured("route place", x.dtype, at=N, **shape)
    return (
        choosing or {"tokens": own.tokens, "depth": own.depth} | launch,
        placing or {"placers": MAX_PLACERS, "counts": COUNTS},
    )


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _columns(group, R, E, ROUTERS: tl.constexpr, EXPERTS: tl.constexpr):
    """-> router and expert of each column of a group of routers, and whether there is one."""
    column = tl.arange(0, ROUTERS * EXPERTS)
    router, expert = group * ROUTERS + column // EXPERTS, column % EXPERTS
    return router, expert, (router < R) & (expert < E)


@triton.jit
def choose_kernel(
    x, weight, keep, logits, scores, index, counts, N, d: tl.constexpr, R, E,
    K: tl.constexpr, K_PADDED: tl.constexpr, DROPOUT: tl.constexpr,
    TOKENS: tl.constexpr, ROUTERS: tl.constexpr, EXPERTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, group of routers). DROPOUT: 0 none, 1 a dropped expert is never preferred, 2 it scores
    zero. counts [blocks, R, E] int32."""
    block, group = tl.program_id(0), tl.program_id(1)
    token = block * TOKENS + tl.arange(0, TOKENS)
    row, in_rows = token.to(tl.int64), token < N
    router, expert, in_columns = _columns(group, R, E, ROUTERS, EXPERTS)

    values = tl.zeros((TOKENS, ROUTERS * EXPERTS), tl.float32)
    for start in range(0, d, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        in_depth = depth < d
        a = tl.load(x + row[:, None] * d + depth[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        w = tl.load(
            weight + (router * E + expert)[:, None] * d + depth[None, :],
            mask=in_columns[:, None] & in_depth[None, :],
            other=0.0,
        )
        values = tl.dot(a, tl.trans(w), values, input_precision="ieee")

    places = row[:, None] * (R * E) + (router * E + expert)[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    tl.store(logits + places, values, mask=inside)
    tail = tl.exp(-tl.abs(values))
    score = tl.where(values >= 0, 1.0, tail) / (1.0 + tail)
    choosing = score
    if DROPOUT > 0:
        kept = tl.load(keep + places, mask=inside, other=0) != 0
        if DROPOUT == 1:
            choosing = tl.where(kept, values, float("-inf"))
        else:
            score = tl.where(kept, score, 0.0)
            choosing = score
    # Integers in the order of the floats, -0 equal to +0, then the lower expert first. Nothing is below `absent`.
    bits = tl.where(choosing == 0.0, 0.0, choosing).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    absent = -(2**63)
    key = (bits.to(tl.int64) << 32) + (EXPERTS - expert)[None, :]
    key = tl.where(in_columns[None, :], key, absent)

    key = tl.reshape(key, (TOKENS, ROUTERS, EXPERTS))
    score = tl.reshape(score, (TOKENS, ROUTERS, EXPERTS))
    picked = tl.zeros((TOKENS, ROUTERS, EXPERTS), tl.int32)
    choice = tl.arange(0, K_PADDED)[None, None, :]
    best_expert = tl.zeros((TOKENS, ROUTERS, K_PADDED), tl.int32)
    best_score = tl.zeros((TOKENS, ROUTERS, K_PADDED), tl.float32)
    for j in tl.static_range(K):
        best = tl.max(key, axis=2)
        here = key == best[:, :, None]
        best_expert = tl.where(choice == j, (EXPERTS - (best & 0xFFFFFFFF)).to(tl.int32)[:, :, None], best_expert)
        best_score = tl.where(choice == j, tl.sum(tl.where(here, score, 0.0), axis=2)[:, :, None], best_score)
        picked = tl.where(here, 1, picked)
        key = tl.where(here, absent, key)

    r = group * ROUTERS + tl.arange(0, ROUTERS)
    present = in_rows[:, None, None] & (r < R)[None, :, None] & (choice < K)
    places = (row[:, None, None] * R + r[None, :, None]) * K + choice
    tl.store(index + places, best_expert.to(tl.int64), mask=present)
    tl.store(scores + places, best_score, mask=present)
    picked = tl.where(in_rows[:, None, None], picked, 0)
    e = tl.arange(0, EXPERTS)
    tl.store(
        counts + (block * R + r)[:, None] * E + e[None, :],
        tl.sum(picked, axis=0),
        mask=(r < R)[:, None] & (e < E)[None, :],
    )


@triton.jit
def place_kernel(
    index, counts, load, order, N, R, E, num_blocks, blocks_per_program,
    K: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, ROUTERS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Program (run of blocks, group of routers); BLOCKS counts are read at a time."""
    run, group = tl.program_id(0), tl.program_id(1)
    first = run * blocks_per_program
    router, expert, in_columns = _columns(group, R, E, ROUTERS, EXPERTS)
    total = tl.zeros((ROUTERS * EXPERTS,), tl.int32)
    before = tl.zeros((ROUTERS * EXPERTS,), tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        count = tl.load(
            counts + block[:, None] * (R * E) + (router * E + expert)[None, :],
            mask=(block < num_blocks)[:, None] & in_columns[None, :],
            other=0,
        )
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((block < first)[:, None], count, 0), axis=0)
    if run == 0:
        tl.store(load + router * E + expert, total.to(tl.int64), mask=in_columns)
    by_router = tl.reshape(total, (ROUTERS, EXPERTS))
    next_place = before + tl.reshape(tl.cumsum(by_router, axis=1) - by_router, (ROUTERS * EXPERTS,))

    for block in range(first, tl.minimum(first + blocks_per_program, num_blocks)):
        token = block * TOKENS + tl.arange(0, TOKENS)
        present = (token < N)[:, None] & in_columns[None, :]
        slots = index + (token.to(tl.int64)[:, None] * R + router[None, :]) * K
        choice = tl.full((TOKENS, ROUTERS * EXPERTS), -1, tl.int32)
        for j in range(K):  # a loop: unrolled, it spills where 8 of 64 experts are chosen
            chosen = tl.load(slots + j, mask=present, other=-1)
            choice = tl.where(chosen == expert[None, :], j, choice)
        picked = (choice >= 0).to(tl.int32)
        place = next_place[None, :] + tl.cumsum(picked, axis=0) - picked
        slot = token.to(tl.int64)[:, None] * K + choice
        tl.store(order + router.to(tl.int64)[None, :] * (N * K) + place, slot, mask=choice >= 0)
        next_place += tl.sum(picked, axis=0)


@triton.jit
def gradients_kernel(
    grad_logits, grad_scores, x, weight, scores, index, grad_x, partial, N, d: tl.constexpr, R, E, blocks_per_chunk,
    K: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_SCORES: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, ROUTERS: tl.constexpr, EXPERTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (chunk, part of d_model, group of routers). grad_x [groups, N, d], partial [chunks, R, E, d] fp32."""
    chunk, group = tl.program_id(0), tl.program_id(2)
    depth = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    in_depth = depth < d
    router, expert, in_columns = _columns(group, R, E, ROUTERS, EXPERTS)
    tile = (router * E + expert)[:, None] * d + depth[None, :]
    in_tile = in_columns[:, None] & in_depth[None, :]
    w = tl.load(weight + tile, mask=in_tile, other=0.0)
    grad_x += group.to(tl.int64) * N * d
    grad_weight = tl.zeros((DEPTH, ROUTERS * EXPERTS), tl.float32)
    first = chunk * blocks_per_chunk
    for block in range(first, tl.minimum(first + blocks_per_chunk, tl.cdiv(N, TOKENS))):
        token = block * TOKENS + tl.arange(0, TOKENS)
        row, in_rows = token.to(tl.int64), token < N
        grad = tl.zeros((TOKENS, ROUTERS * EXPERTS), tl.float32)
        if HAS_LOGITS:
            places = row[:, None] * (R * E) + (router * E + expert)[None, :]
            grad = tl.load(grad_logits + places, mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        if HAS_SCORES:
            present = in_rows[:, None] & in_columns[None, :]
            slots = (row[:, None] * R + router[None, :]) * K
            for j in range(K):  # a loop: unrolled, it spills on sm_80
                chosen = tl.load(index + slots + j, mask=present, other=-1)
                score = tl.load(scores + slots + j, mask=present, other=0.0)
                upstream = tl.load(grad_scores + slots + j, mask=present, other=0.0)
                # 0 for a dropped score of 0 too
                grad += tl.where(chosen == expert[None, :], upstream * score * (1.0 - score), 0.0)
        cells = row[:, None] * d + depth[None, :]
        in_cells = in_rows[:, None] & in_depth[None, :]
        rows = tl.load(x + cells, mask=in_cells, other=0.0)
        # Transposed, so that the long side is the one that tensor cores want long.
        if SPLIT:
            high = grad.to(rows.dtype)
            low = (grad - high.to(tl.float32)).to(rows.dtype)
            back = tl.dot(low, w, tl.dot(high, w))
            grad_weight = tl.dot(tl.trans(rows), low, tl.dot(tl.trans(rows), high, grad_weight))
        else:
            back = tl.dot(grad, w.to(tl.float32), input_precision=PRECISION)
            grad_weight = tl.dot(tl.trans(rows.to(tl.float32)), grad, grad_weight, input_precision=PRECISION)
        tl.store(grad_x + cells, back.to(grad_x.dtype.element_ty), mask=in_cells)
    tl.store(partial + chunk.to(tl.int64) * (R * E * d) + tile, tl.trans(grad_weight), mask=in_tile)


@triton.jit
def add_up_kernel(partial, total, size, num_parts, BLOCK: tl.constexpr):
    """total [size] = sum over parts of partial [parts, size], in fp32, in their order, rounded once."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_parts):
        value += tl.load(partial + place, mask=inside, other=0.0)
        partial += size
    tl.store(
        total + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK),
        value.to(total.dtype.element_ty),
        mask=inside,
    )


# -------------------------------------------------------------------------------------------------------------- host


@on_its_device
def forward(
    x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`x` [N, d], `weight` [R, E, d], `keep` [N, R, E] bool -> logits, scores, index, load, order as in
    `model.kernels.ops.route.Routing`."""
    (N, d), (R, E, _) = x.shape, weight.shape
    x, weight = _common(x, weight)
    logits = x.new_empty(N, R, E, dtype=torch.float32)
    scores, index = logits.new_empty(N, R, k), x.new_empty(N, R, k, dtype=torch.int64)
    load, order = index.new_empty(R, E), index.new_empty(R, N * k)
    if N == 0:
        return logits, scores, index, load.zero_(), order
    tiles = RouterTiles.of(R, E, x.dtype)
    choosing, placing = forward_tiles(tiles, x, R, E, k)
    options = {"num_warps": choosing["warps"], "num_stages": choosing["stages"]}
    blocks, groups = triton.cdiv(N, choosing["tokens"]), triton.cdiv(R, tiles.routers)
    counts = x.new_empty(blocks, R, E, dtype=torch.int32)
    dropout = 0 if keep is None else 2 if drop_scores else 1
    choose_kernel[(blocks, groups)](
        x=x, weight=weight, keep=logits if keep is None else keep.contiguous(),
        logits=logits, scores=scores, index=index, counts=counts, N=N, d=d, R=R, E=E,
        K=k, K_PADDED=triton.next_power_of_2(k), DROPOUT=dropout, TOKENS=choosing["tokens"], ROUTERS=tiles.routers,
        EXPERTS=tiles.experts, DEPTH=choosing["depth"], **options,
    )  # fmt: skip
    blocks_per_program = triton.cdiv(blocks, placing["placers"])
    place_kernel[(triton.cdiv(blocks, blocks_per_program), groups)](
        index=index, counts=counts, load=load, order=order, N=N, R=R, E=E,
        num_blocks=blocks, blocks_per_program=blocks_per_program, K=k, BLOCKS=placing["counts"],
        TOKENS=choosing["tokens"], ROUTERS=tiles.routers, EXPERTS=tiles.experts, **options,
    )  # fmt: skip
    return logits, scores, index, load, order


@on_its_device
def backward(
    grad_logits: Tensor | None, grad_scores: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight. At least one of `grad_logits` [N, R, E] and `grad_scores` [N, R, k] is there."""
    (N, d), (R, E, _), k = x.shape, weight.shape, index.shape[2]
    if N == 0:
        return x.new_empty(x.shape), weight.new_zeros(weight.shape)
    rows, matrix = _common(x, weight)
    tiles = RouterTiles.of(R, E, rows.dtype)
    parts, groups = triton.cdiv(d, tiles.gradient_depth), triton.cdiv(R, tiles.routers)
    blocks = triton.cdiv(N, tiles.gradient_tokens)
    blocks_per_chunk = triton.cdiv(blocks, max(1, MAX_GRADIENT_PROGRAMS // parts))
    chunks = triton.cdiv(blocks, blocks_per_chunk)
    partial = x.new_empty(chunks, R, E, d, dtype=torch.float32)
    grad_x, grad_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    of_groups = grad_x if groups == 1 else x.new_empty(groups, N, d, dtype=torch.float32)
    gradients_kernel[(chunks, parts, groups)](
        grad_logits=scores if grad_logits is None else grad_logits.contiguous(),
        grad_scores=scores if grad_scores is None else grad_scores.contiguous(),
        x=rows, weight=matrix, scores=scores.contiguous(), index=index.contiguous(),
        grad_x=of_groups, partial=partial, N=N, d=d, R=R, E=E, blocks_per_chunk=blocks_per_chunk,
        K=k, HAS_LOGITS=grad_logits is not None, HAS_SCORES=grad_scores is not None, **precision(rows.dtype),
        TOKENS=tiles.gradient_tokens, ROUTERS=tiles.routers, EXPERTS=tiles.experts, DEPTH=tiles.gradient_depth,
        **GRADIENT_OPTIONS,
    )  # fmt: skip
    if groups > 1:
        _add_up(of_groups, grad_x)
    _add_up(partial, grad_weight)
    return grad_x, grad_weight


def group_choices(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """As `model.kernels.ops.route.group_choices`."""
    return sort_slots(index, num_experts)


def _add_up(parts: Tensor, total: Tensor) -> None:
    add_up_kernel[(triton.cdiv(total.numel(), ADD_UP),)](
        partial=parts, total=total, size=total.numel(), num_parts=parts.shape[0], BLOCK=ADD_UP, **OPTIONS
    )


def _common(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and of one dtype; fp32 where they differ."""
    if weight.shape[1] > MAX_EXPERTS:
        raise ValueError(f"kernels.backend=triton routes to at most {MAX_EXPERTS} experts, not {weight.shape[1]}")
    dtype = x.dtype if x.dtype == weight.dtype else torch.float32
    return x.to(dtype).contiguous(), weight.to(dtype).contiguous()


def precision(dtype: torch.dtype) -> dict[str, bool | str]:
    """How gradients in fp32 are multiplied with inputs of `dtype`, so that products are exact to 2^-16 or better.

    bf16: as the sum of two bf16 numbers, on tensor cores. fp16, whose range could not hold them: three products in
    tf32, whose mantissa holds fp16's. fp32: fp32.
    """
    return {"SPLIT": dtype == torch.bfloat16, "PRECISION": "tf32x3" if dtype == torch.float16 else "ieee"}
