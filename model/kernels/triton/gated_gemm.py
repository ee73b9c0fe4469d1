"""Parts that the gate-scaled GEMMs of SwitchHead share: dense gates, their gradient, the gradient of the experts.

Where at least half of the experts are chosen (2k >= E) a head's mixture is one GEMM whose K axis runs over all experts:
a row is multiplied by its gate, 0 where the expert is not chosen, and one accumulator takes the sum over experts (and,
for the output, heads). E / k times the useful flops, but no sort, no permutation, no row ever written for a slot, and
nothing depends on the routing: the same programs run in the same order whatever was chosen.

Widths are constants of the kernels: the compiler then proves the widest load that rows allow, 16 bytes where a row is a
multiple of them, 8 bytes for d_model 412 and head_dim 76; of an argument it would know nothing and load 2 bytes.

Shape legend: N tokens, d d_model (wide), H heads, h head_dim (narrow), E experts of a head, k chosen experts; a pair is
(head, expert), number head * E + expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.backend import TRITON_DTYPES


class GemmTiles(NamedTuple):
    """One launch configuration of a GEMM."""

    rows: int
    columns: int
    depth: int
    """Elements of the K axis per step."""
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        """The arguments of a launch that these are."""
        blocks = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages}


def check_dtypes(rows: Tensor, experts: Tensor) -> None:
    """ValueError where the kernels cannot multiply `rows` by `experts`."""
    if rows.dtype not in TRITON_DTYPES or experts.dtype != rows.dtype:
        raise ValueError(
            f"kernels.backend=triton multiplies float32, bfloat16 or float16 rows by experts of the same dtype, not "
            f"{rows.dtype} by {experts.dtype}"
        )


def column_tile(width: int, largest: int = 128) -> int:
    """Columns of a tile over `width`: the widest of `largest`, 64, 32 that pads to at most 1.3 times, else the one that
    pads least. 112 -> 128 (1.14 times), 76 -> 32 (1.26), 132 -> 32 (1.21), 64 -> 64."""
    padded = {tile: -(-width // tile) * tile for tile in (128, 64, 32) if tile <= largest}
    fitting = [tile for tile, size in padded.items() if size <= 1.3 * width]
    return fitting[0] if fitting else min(padded, key=lambda tile: (padded[tile], -tile))


def padded_experts(num_experts: int) -> int:
    """Lanes for one number per expert."""
    return max(2, triton.next_power_of_2(num_experts))


def unrolled_experts(num_experts: int, largest: int) -> int:
    """Experts that one step multiplies with the same rows: the largest divisor of `num_experts` up to `largest`."""
    return max(n for n in range(1, largest + 1) if num_experts % n == 0)


@triton.jit
def scale_rows(rows, gate):
    """`rows` [M, K] times `gate` [M] fp32, rounded to the rows' dtype: the A operand of a gate-scaled GEMM."""
    return (rows * gate[:, None]).to(rows.dtype)


# --------------------------------------------------------------------------------------------------------------- gates


@triton.jit
def dense_gates_kernel(scores, index, gates, N, E, K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK: tl.constexpr):
    """scores, index [N, H, K] -> gates [H, E, N] fp32. Token-minor: what a GEMM reads of it are runs of tokens."""
    H = tl.num_programs(1)
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.arange(0, PADDED_K)
    mask = (tokens < N)[:, None] & (choice < K)[None, :]
    slots = (tokens * H + head)[:, None] * K + choice[None, :]
    score = tl.load(scores + slots, mask=mask, other=0.0).to(tl.float32)
    chosen = tl.load(index + slots, mask=mask, other=-1).to(tl.int32)
    for expert in range(E):
        gate = tl.sum(tl.where(chosen == expert, score, 0.0), axis=1)
        tl.store(gates + (head * E + expert) * N + tokens, gate, mask=tokens < N)


@triton.jit
def gate_gradient_kernel(
    partial, index, grad_scores, N, E, parts, K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK: tl.constexpr
):
    """partial [parts, H, E, N] fp32, one part per column tile -> grad_scores [N, H, K] of the chosen experts."""
    H = tl.num_programs(1)
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.arange(0, PADDED_K)
    mask = (tokens < N)[:, None] & (choice < K)[None, :]
    slots = (tokens * H + head)[:, None] * K + choice[None, :]
    chosen = tl.load(index + slots, mask=mask, other=0).to(tl.int32)
    total = tl.zeros((BLOCK, PADDED_K), dtype=tl.float32)
    for part in range(parts):
        places = ((part * H + head) * E + chosen).to(tl.int64) * N + tokens[:, None]  # may pass 2^31
        total += tl.load(partial + places, mask=mask, other=0.0)
    tl.store(grad_scores + slots, total.to(grad_scores.dtype.element_ty), mask=mask)


GATE_BLOCK = 128


def dense_gates(scores: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """[H, E, N] fp32: the score of a chosen expert, else 0."""
    N, H, k = index.shape
    gates = scores.new_empty(H, num_experts, N, dtype=torch.float32)
    grid = (triton.cdiv(N, GATE_BLOCK), H)
    padded = triton.next_power_of_2(k)
    dense_gates_kernel[grid](
        scores=scores, index=index, gates=gates, N=N, E=num_experts, K=k, PADDED_K=padded, BLOCK=GATE_BLOCK, num_warps=4
    )
    return gates


def gather_gate_gradient(partial: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """`partial` [parts, H, E, N] fp32 -> [N, H, k]: summed over the parts, taken at the chosen experts."""
    N, H, k = index.shape
    parts, _, num_experts, _ = partial.shape
    grad_scores = partial.new_empty(N, H, k, dtype=dtype)
    grid = (triton.cdiv(N, GATE_BLOCK), H)
    padded = triton.next_power_of_2(k)
    gate_gradient_kernel[grid](
        partial=partial,
        index=index,
        grad_scores=grad_scores,
        N=N,
        E=num_experts,
        parts=parts,
        K=k,
        PADDED_K=padded,
        BLOCK=GATE_BLOCK,
        num_warps=4,
    )
    return grad_scores


# ---------------------------------------------------------------------------------------------- gradient of the experts


@triton.jit
def store_expert_gradient(
    grad_experts, pair, total, rows, columns, d: tl.constexpr, h: tl.constexpr, NARROW_FIRST: tl.constexpr
):
    """`total`, the tile at `rows` of d and `columns` of h, to the expert number `pair` of grad_experts: [d, h], or [h,
    d] if NARROW_FIRST."""
    out = grad_experts + pair.to(tl.int64) * d * h
    result = total.to(grad_experts.dtype.element_ty)
    row_mask, column_mask = rows < d, columns < h
    if NARROW_FIRST:
        mask = column_mask[:, None] & row_mask[None, :]
        tl.store(out + columns[:, None] * d + rows[None, :], tl.trans(result), mask=mask)
    else:
        tl.store(out + rows[:, None] * h + columns[None, :], result, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def gated_weight_gradient_kernel(
    wide,
    narrow,
    gates,
    grad_experts,
    N,
    d: tl.constexpr,
    h: tl.constexpr,
    H,
    E,
    NARROW_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_experts[pair] = sum over n of gate[pair, n] * wide[n]^T narrow[n, head]: [d, h], or [h, d] if NARROW_FIRST.

    wide [N, d], narrow [N, H, h], gates [H, E, N]. One program owns (pair, tile) over all tokens. Experts vary fastest,
    so that the programs which read the same rows run at the same time and find them in L2. The wide rows are the A
    operand, scaled in registers: its tile has always at least 64 rows, as the tensor cores of sm_90 want, and the
    narrow width, seldom a power of two, may be cut into narrower tiles."""
    program = tl.program_id(0)
    expert = program % E
    program //= E
    head = program % H
    program //= H
    narrow_tiles = tl.cdiv(h, BLOCK_N)
    columns = (program % narrow_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (program // narrow_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = head * E + expert
    row_mask, column_mask = rows < d, columns < h

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, N, BLOCK_K):
        tokens = start + tl.arange(0, BLOCK_K)
        mask = tokens < N
        token = tokens.to(tl.int64)[:, None]
        gate = tl.load(gates + pair * N + tokens, mask=mask, other=0.0)
        a = tl.load(wide + token * d + rows[None, :], mask=mask[:, None] & row_mask[None, :], other=0.0)
        b = tl.load(
            narrow + (token * H + head) * h + columns[None, :], mask=mask[:, None] & column_mask[None, :], other=0.0
        )
        total = tl.dot(tl.trans(scale_rows(a, gate)), b, total, input_precision="ieee")
    store_expert_gradient(grad_experts, pair, total, rows, columns, d, h, NARROW_FIRST)


def gradient_tiles(h: int, dtype: torch.dtype) -> GemmTiles:
    """Of `gated_weight_gradient`: d x h tiles, `depth` tokens per step."""
    if dtype == torch.float32:
        return GemmTiles(64, column_tile(h, 64), 32, 4, 2)
    columns = column_tile(h)
    # With 4 warps, rows of 146, which no load of 8 bytes fits, spill on sm_80.
    return GemmTiles(128, columns, 64, 4 if columns == 32 and h % 4 == 0 else 8, 3)


def gated_weight_gradient(wide: Tensor, narrow: Tensor, gates: Tensor, like: Tensor, *, narrow_first: bool) -> Tensor:
    """`wide` [N, d], `narrow` [N, H, h], `gates` [H, E, N] -> [H, E, d, h], or `narrow_first` [H, E, h, d]: contiguous,
    in the dtype of `like`."""
    (N, H, h), d, E = narrow.shape, wide.shape[1], gates.shape[1]
    grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    tiles = gradient_tiles(h, wide.dtype)
    gated_weight_gradient_kernel[(E * H * triton.cdiv(h, tiles.columns) * triton.cdiv(d, tiles.rows),)](
        wide=wide,
        narrow=narrow,
        gates=gates,
        grad_experts=grad,
        N=N,
        d=d,
        h=h,
        H=H,
        E=E,
        NARROW_FIRST=narrow_first,
        **tiles.launch,
    )
    return grad
