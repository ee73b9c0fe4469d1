"""switchhead_output on GPUs: y[n] = sum over h and e of gate[n, h, e] * a[n, h] W_O[h, e].

`gated` (2k >= E): see model/kernels/triton/gated_gemm.py. `sorted` (2k < E): model/kernels/triton/sorted_gemm.py; every
slot writes its wide row, and a second kernel sums those of a token over heads and choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.ops.switchhead import Inputs
from model.kernels.triton import sorted_gemm
from model.kernels.triton.gated_gemm import (
    GemmTiles,
    check_dtypes,
    column_tile,
    dense_gates,
    gated_weight_gradient,
    gather_gate_gradient,
    scale_rows,
)
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.sorted_gemm import Rows
from model.kernels.triton.sorted_slots import mix_slots, slot_stride, sum_slots


@triton.jit
def output_forward_kernel(
    a,
    gates,
    experts,
    y,
    N,
    d: tl.constexpr,
    h: tl.constexpr,
    H,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a [N, H, h], gates [H, E, N] fp32, experts [H, E, h, d] -> y [N, d].

    One program per (token tile, column tile). Its K axis, one loop, runs over heads, experts and head_dim: heads are
    summed in the accumulator."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(d, BLOCK_N)
    columns = (program % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (program // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask, column_mask = rows < N, columns < d
    tokens = rows.to(tl.int64)[:, None]

    steps = tl.cdiv(h, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(H * E * steps):
        pair = i // steps
        inner = (i % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        gate = tl.load(gates + pair * N + rows, mask=row_mask, other=0.0)
        source = a + (tokens * H + pair // E) * h + inner[None, :]
        narrow = tl.load(source, mask=row_mask[:, None] & (inner < h)[None, :], other=0.0)
        weight = experts + pair.to(tl.int64) * h * d + inner[:, None] * d + columns[None, :]
        b = tl.load(weight, mask=(inner < h)[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(scale_rows(narrow, gate), b, total, input_precision="ieee")
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(y + tokens * d + columns[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def output_backward_kernel(
    grad,
    a,
    gates,
    experts,
    grad_a,
    grad_gates,
    N,
    d: tl.constexpr,
    h: tl.constexpr,
    H,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_a[n, h] = sum over e of gate * t,  t = grad[n] W_O[h, e]^T, and grad_gate[n, h, e] = <a[n, h], t>.

    grad [N, d], a [N, H, h] -> grad_a [N, H, h], grad_gates [column tiles, H, E, N] fp32: what each program saw of
    <a, t>. One program per (token tile, head, column tile); t of one expert at a time, whole before it is scaled."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(h, BLOCK_N)
    column_tile = program % column_tiles
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    program //= column_tiles
    head = program % H
    rows = (program // H) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask, column_mask = rows < N, columns < h
    tokens = rows.to(tl.int64)[:, None]
    narrow = (tokens * H + head) * h + columns[None, :]
    narrow_mask = row_mask[:, None] & column_mask[None, :]
    source = tl.load(a + narrow, mask=narrow_mask, other=0.0)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.cdiv(d, BLOCK_K)
    for i in range(E * steps):
        pair, step = head * E + i // steps, i % steps
        inner = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inner_mask = inner < d
        g = tl.load(grad + tokens * d + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
        weight = experts + pair.to(tl.int64) * h * d + columns[None, :] * d + inner[:, None]
        b = tl.load(weight, mask=inner_mask[:, None] & column_mask[None, :], other=0.0)
        product = tl.dot(g, b, product, input_precision="ieee")
        if step == steps - 1:
            gate = tl.load(gates + pair * N + rows, mask=row_mask, other=0.0)
            total += product * gate[:, None]
            partial = tl.sum(product * source, axis=1)
            place = (column_tile * H * E + pair).to(tl.int64) * N + rows  # may pass 2^31
            tl.store(grad_gates + place, partial, mask=row_mask)
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tl.store(grad_a + narrow, total.to(grad_a.dtype.element_ty), mask=narrow_mask)


def forward_tiles(h: int, dtype: torch.dtype) -> GemmTiles:
    if dtype == torch.float32:
        return GemmTiles(64, 64, 32, 4, 2)
    # Rows of 126 elements are read 4 bytes at a time, whose addresses leave no registers for 128 rows (sm_80).
    return GemmTiles(64 if h % 4 else 128, 128, column_tile(h, 64), 8, 3)


def backward_tiles(h: int, dtype: torch.dtype) -> GemmTiles:
    """Two accumulators and a tile of a: 64 x 128 is the largest that 8 warps hold without spilling."""
    if dtype == torch.float32:
        return GemmTiles(64, column_tile(h, 64), 32, 8, 2)
    columns = column_tile(h)
    return GemmTiles(64 if columns == 128 else 128, columns, 64, 8, 3)


@on_its_device
def forward(inputs: Inputs) -> tuple[Tensor]:
    """-> y [N, d]; nothing is saved."""
    a, choice, experts, strategy = inputs
    check_dtypes(a, experts)
    a, experts = a.contiguous(), experts.contiguous()
    scores, index, order, load = (t.contiguous() for t in choice)
    (N, _, h), (H, E, _, d), k = a.shape, experts.shape, index.shape[2]
    if strategy == "sorted":
        narrow, stride = Rows.of_tokens(a, k), slot_stride(d)
        wide = sorted_gemm.project(narrow, order, load, experts, scores, k, transposed=False, stride=stride)
        return (sum_slots(wide, N, d),)
    y = a.new_empty(N, d)
    if N > 0:
        gates = dense_gates(scores, index, E)
        tiles = forward_tiles(h, a.dtype)
        output_forward_kernel[(triton.cdiv(N, tiles.rows) * triton.cdiv(d, tiles.columns),)](
            a=a, gates=gates, experts=experts, y=y, N=N, d=d, h=h, H=H, E=E, **tiles.launch
        )
    return (y,)


@on_its_device
def backward(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, scores and experts."""
    a, choice, experts, strategy = inputs
    grad, a, experts = (t.contiguous() for t in (grad, a, experts))
    scores, index, order, load = (t.contiguous() for t in choice)
    (N, _, h), (H, E, _, d), k = a.shape, experts.shape, index.shape[2]
    if strategy == "sorted":
        wide, narrow = Rows.of_tokens(grad, k), Rows.of_tokens(a, k)
        products = sorted_gemm.project(wide, order, load, experts, None, k, transposed=True)
        grad_a, grad_scores = mix_slots(products, scores, a)
        grad_experts = sorted_gemm.sorted_weight_gradient(
            wide, narrow, order, load, experts, scores, k, narrow_first=True
        )
        return grad_a, grad_scores, grad_experts
    if N == 0:
        return torch.empty_like(a), torch.empty_like(scores), torch.zeros_like(experts)
    gates = dense_gates(scores, index, E)
    tiles = backward_tiles(h, a.dtype)
    column_tiles = triton.cdiv(h, tiles.columns)
    grad_a, partial = torch.empty_like(a), gates.new_empty(column_tiles, H, E, N)
    output_backward_kernel[(triton.cdiv(N, tiles.rows) * H * column_tiles,)](
        grad=grad,
        a=a,
        gates=gates,
        experts=experts,
        grad_a=grad_a,
        grad_gates=partial,
        N=N,
        d=d,
        h=h,
        H=H,
        E=E,
        **tiles.launch,
    )
    grad_experts = gated_weight_gradient(grad, a, gates, experts, narrow_first=True)
    return grad_a, gather_gate_gradient(partial, index, scores.dtype), grad_experts
