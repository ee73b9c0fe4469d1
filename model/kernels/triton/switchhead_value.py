"""switchhead_value on GPUs: v[n, h] = sum over e of gate[n, h, e] * x[n] W_V[h, e].

`gated` (2k >= E): see model/kernels/triton/gated_gemm.py. `sorted` (2k < E): model/kernels/triton/sorted_gemm.py; every
slot writes its narrow product, from which the sum over k and the gates' gradients are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.backend import cuda_capability
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
    unrolled_experts,
)
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.sorted_gemm import Rows
from model.kernels.triton.sorted_slots import mix_slots, slot_stride, sum_slots


@triton.jit
def value_forward_kernel(
    x,
    gates,
    experts,
    v,
    N,
    d: tl.constexpr,
    h: tl.constexpr,
    H,
    E: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [N, d], gates [H, E, N] fp32, experts [H, E, d, h] -> v [N, H, h].

    One program per (token tile, head, column tile). A tile of x is read once for UNROLL experts and scaled in
    registers. Heads vary fastest: the programs that read the same tokens run together and share them in L2."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(h, BLOCK_N)
    columns = (program % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    program //= column_tiles
    head = program % H
    rows = (program // H) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask, column_mask = rows < N, columns < h
    tokens = rows.to(tl.int64)[:, None]

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, E, UNROLL):
        pair = head * E + first
        gate = ()
        for u in tl.static_range(UNROLL):
            one = tl.load(gates + (pair + u) * N + rows, mask=row_mask, other=0.0)
            gate = gate + (one,)  # type: ignore[assignment]  # noqa: RUF005  # triton has no starred tuples
        for start in range(0, d, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            inner_mask = inner < d
            a = tl.load(x + tokens * d + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
            for u in tl.static_range(UNROLL):
                weight = experts + (pair + u).to(tl.int64) * d * h + inner[:, None] * h + columns[None, :]
                b = tl.load(weight, mask=inner_mask[:, None] & column_mask[None, :], other=0.0)
                total = tl.dot(scale_rows(a, gate[u]), b, total, input_precision="ieee")
    result = total.to(v.dtype.element_ty)
    tl.store(v + (tokens * H + head) * h + columns[None, :], result, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def value_backward_kernel(
    grad,
    x,
    gates,
    experts,
    grad_x,
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
    """grad_x[n] = sum over h, e of gate * t,  t = grad[n, h] W_V[h, e]^T, and grad_gate[n, h, e] = <x[n], t>.

    grad [N, H, h], x [N, d] -> grad_x [N, d], grad_gates [column tiles, H, E, N] fp32: what each program saw of <x, t>.
    Nothing of the forward pass is saved or computed again: t serves both gradients. One program per (token tile, column
    tile). One loop runs over pairs and, within a pair, over head_dim, so that loads are in flight across pairs."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(d, BLOCK_N)
    column_tile = program % column_tiles
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (program // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask, column_mask = rows < N, columns < d
    tokens = rows.to(tl.int64)[:, None]
    wide_mask = row_mask[:, None] & column_mask[None, :]
    source = tl.load(x + tokens * d + columns[None, :], mask=wide_mask, other=0.0)

    steps = tl.cdiv(h, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(H * E * steps):
        pair, step = i // steps, i % steps
        inner = step * BLOCK_K + tl.arange(0, BLOCK_K)
        narrow = grad + (tokens * H + pair // E) * h + inner[None, :]
        a = tl.load(narrow, mask=row_mask[:, None] & (inner < h)[None, :], other=0.0)
        weight = experts + pair.to(tl.int64) * d * h + columns[None, :] * h + inner[:, None]
        b = tl.load(weight, mask=(inner < h)[:, None] & column_mask[None, :], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
        if step == steps - 1:
            gate = tl.load(gates + pair * N + rows, mask=row_mask, other=0.0)
            total += product * gate[:, None]
            partial = tl.sum(product * source, axis=1)
            place = (column_tile * H * E + pair).to(tl.int64) * N + rows  # may pass 2^31
            tl.store(grad_gates + place, partial, mask=row_mask)
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tl.store(grad_x + tokens * d + columns[None, :], total.to(grad_x.dtype.element_ty), mask=wide_mask)


def forward_tiles(h: int, dtype: torch.dtype) -> GemmTiles:
    if dtype == torch.float32:
        return GemmTiles(
            64, column_tile(h, 64), 16, 8, 2
        )  # no tensor cores: operands live in registers, and 32 of depth with 4 warps spill
    # Rows of 126 elements are read 4 bytes at a time, whose addresses leave no registers for 128 columns (sm_80).
    columns = column_tile(h, 64 if h % 4 else 128)
    return GemmTiles(128, columns, 32, 8 if columns == 128 else 4, 3)


def backward_tiles(h: int, dtype: torch.dtype) -> GemmTiles:
    """Two accumulators and a tile of x: 64 x 128 is the largest that 8 warps hold without spilling."""
    if dtype == torch.float32:
        return GemmTiles(64, 64, 32, 8, 2)
    return GemmTiles(64, 128, column_tile(h, 64), 8, 3)


MAX_UNROLLED = 5
"""Experts that share a tile of x in registers: 5 tiles of W and one of x, twice, are 96 KB of shared memory."""
MAX_WIDE_UNROLLED_ON = {10: 3}
"""With 128 columns, by the major compute capability. Of its 512 columns of tensor memory Triton 3.6 and 3.7 take 128
for each expert that shares; Triton 3.9 takes 256 in all."""


def shared_experts(num_experts: int, columns: int, capability: int = 9) -> int:
    """Experts that share a tile of x, `columns` of each at a time."""
    most = MAX_WIDE_UNROLLED_ON.get(capability, MAX_UNROLLED) if columns == 128 else MAX_UNROLLED
    return unrolled_experts(num_experts, most)


@on_its_device
def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> v [N, H, h]; and with `sorted`, else empty, x W_V of every slot [H N k, h]."""
    x, choice, experts, strategy = inputs
    check_dtypes(x, experts)
    x, experts = x.contiguous(), experts.contiguous()
    scores, index, order, load = (t.contiguous() for t in choice)
    (N, d), (H, E, _, h), k = x.shape, experts.shape, index.shape[2]
    if strategy == "sorted":
        products = sorted_gemm.project(Rows.of_tokens(x, k), order, load, experts, None, k, transposed=False)
        return mix_slots(products, scores)[0], products.flatten(0, 1)
    v = x.new_empty(N, H, h)
    if N > 0:
        gates = dense_gates(scores, index, E)
        tiles = forward_tiles(h, x.dtype)
        value_forward_kernel[(triton.cdiv(N, tiles.rows) * H * triton.cdiv(h, tiles.columns),)](
            x=x,
            gates=gates,
            experts=experts,
            v=v,
            N=N,
            d=d,
            h=h,
            H=H,
            E=E,
            UNROLL=shared_experts(E, tiles.columns, cuda_capability()[0]),
            **tiles.launch,
        )
    return v, x.new_empty(0, h)


def backward(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scores and experts; `saved` is what `forward` gives after v."""
    grad_x, grad_scores, gates = input_gradients(grad, inputs, saved)
    return grad_x, grad_scores, expert_gradient(grad, inputs, saved, gates)


@on_its_device
def input_gradients(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and scores, and the gates for `expert_gradient`: of slots with `sorted`, else of all experts."""
    x, choice, experts, strategy = inputs
    grad, x, experts = (t.contiguous() for t in (grad, x, experts))
    scores, index, order, load = (t.contiguous() for t in choice)
    (N, d), (H, E, _, h), k = x.shape, experts.shape, index.shape[2]
    if strategy == "sorted":
        products = saved[0]
        narrow = Rows.of_tokens(grad, k)
        _, grad_scores = mix_slots(products.view(H, N * k, h), scores, grad, mix=False)
        stride = slot_stride(d)
        slots = sorted_gemm.project(narrow, order, load, experts, scores, k, transposed=True, stride=stride)
        return sum_slots(slots, N, d), grad_scores, scores
    gates = dense_gates(scores, index, E)
    if N == 0:
        return torch.empty_like(x), torch.empty_like(scores), gates
    tiles = backward_tiles(h, x.dtype)
    column_tiles = triton.cdiv(d, tiles.columns)
    grad_x, partial = torch.empty_like(x), gates.new_empty(column_tiles, H, E, N)
    value_backward_kernel[(triton.cdiv(N, tiles.rows) * column_tiles,)](
        grad=grad,
        x=x,
        gates=gates,
        experts=experts,
        grad_x=grad_x,
        grad_gates=partial,
        N=N,
        d=d,
        h=h,
        H=H,
        E=E,
        **tiles.launch,
    )
    return grad_x, gather_gate_gradient(partial, index, scores.dtype), gates


@on_its_device
def expert_gradient(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], gates: Tensor) -> Tensor:
    x, choice, experts, strategy = inputs
    grad, x, experts, k = grad.contiguous(), x.contiguous(), experts.contiguous(), choice.index.shape[2]
    if strategy == "sorted":
        order, load = choice.order.contiguous(), choice.load.contiguous()
        wide, narrow = Rows.of_tokens(x, k), Rows.of_tokens(grad, k)
        return sorted_gemm.sorted_weight_gradient(wide, narrow, order, load, experts, gates, k, narrow_first=False)
    if len(x) == 0:
        return torch.zeros_like(experts)
    return gated_weight_gradient(x, grad, gates, experts, narrow_first=False)
