"""expert_linear and expert_linear_sum on CPU.

The slots of one expert are one task: gathered into a tile that stays in cache, multiplied, and written to the slots
they belong to (disjoint ones: nothing depends on which worker takes which).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.cpu.sorted_rows import (
    clear_unused,
    expert_segments,
    gather,
    mm_into,
    mm_rows,
    sorted_gates,
    sum_slots,
)
from model.kernels.cpu.workers import run_tasks, scratch
from model.kernels.dtypes import cpu_gemm_dtype


def forward(x: Tensor, order: Tensor, load: Tensor, experts: Tensor, k: int) -> Tensor:
    """x [N, d], experts [E, d, h] -> [N, k, h]: every slot's own expert."""
    N, h = x.shape[0], experts.shape[2]
    dtype, counts, tokens = cpu_gemm_dtype(x.dtype), load.tolist(), order // k
    source, y = x.to(dtype), x.new_empty(N * k, h)
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment = segments[expert]
        wide = gather("gathered", source, tokens[segment])
        narrow = torch.mm(wide, experts[expert].to(dtype), out=scratch("narrow", (len(wide), h), dtype))
        y.index_copy_(0, order[segment], narrow[: counts[expert]].to(y.dtype))

    run_tasks(counts, compute)
    return y.view(N, k, h)


def backward(grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and experts for `grad` [N, k, h]."""
    arguments = grad, x, order, load, experts
    return input_gradient(*arguments), expert_gradient(*arguments)


def input_gradient(grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> Tensor:
    (_, k, h), d = grad.shape, x.shape[1]
    dtype, counts = cpu_gemm_dtype(x.dtype), load.tolist()
    narrow_source, rows = grad.reshape(-1, h).to(dtype), scratch("rows", (order.shape[0], d), dtype)
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment = segments[expert]
        narrow = gather("narrow", narrow_source, order[segment])
        mm_rows(narrow, experts[expert].to(dtype).t(), rows[segment])

    run_tasks(counts, compute)
    return sum_slots(rows, order, k, x)


def expert_gradient(grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> Tensor:
    k, h = grad.shape[1:]
    dtype, counts, tokens = cpu_gemm_dtype(x.dtype), load.tolist(), order // k
    source, narrow_source, grad_experts = x.to(dtype), grad.reshape(-1, h).to(dtype), experts.new_empty(experts.shape)
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment = segments[expert]
        wide, narrow = gather("gathered", source, tokens[segment]), gather("narrow", narrow_source, order[segment])
        mm_into(grad_experts[expert], wide.t(), narrow)

    run_tasks(counts, compute)
    clear_unused(counts, grad_experts)
    return grad_experts


def sum_forward(a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> Tensor:
    """a [N, k, h], gates [N, k], experts [E, h, d] -> [N, d]: summed over k."""
    (N, k, h), d = a.shape, experts.shape[2]
    dtype, counts = cpu_gemm_dtype(a.dtype), load.tolist()
    source, gate_column = a.reshape(N * k, h).to(dtype), sorted_gates(gates, order, dtype)
    rows = scratch("rows", (N * k, d), dtype)
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment = segments[expert]
        narrow = gather("narrow", source, order[segment])
        # The gate multiplies the narrow side: the same product, fewer bytes.
        narrow[: counts[expert]].mul_(gate_column[segment])
        mm_rows(narrow, experts[expert].to(dtype), rows[segment])

    run_tasks(counts, compute)
    return sum_slots(rows, order, k, a.new_empty(N, d))


def sum_backward(
    grad: Tensor, a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, gates and experts for `grad` [N, d]."""
    (N, k, h), slots = a.shape, order.shape[0]
    dtype, counts, tokens = cpu_gemm_dtype(a.dtype), load.tolist(), order // k
    source, wide_source = a.reshape(slots, h).to(dtype), grad.to(dtype)
    gate_column, gate_rows = sorted_gates(gates, order, dtype), a.new_empty(slots, dtype=dtype)
    grad_a, grad_experts = a.new_empty(slots, h), experts.new_empty(experts.shape)
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment, count = segments[expert], counts[expert]
        wide, narrow = gather("gathered", wide_source, tokens[segment]), gather("narrow", source, order[segment])
        tile = scratch("grad_narrow", (len(wide), h), dtype)
        grad_narrow = torch.mm(wide, experts[expert].to(dtype).t(), out=tile)[:count]
        torch.linalg.vecdot(grad_narrow, narrow[:count], out=gate_rows[segment])
        grad_a.index_copy_(0, order[segment], grad_narrow.mul_(gate_column[segment]).to(a.dtype))
        narrow[:count].mul_(gate_column[segment])
        mm_into(grad_experts[expert], narrow.t(), wide)

    run_tasks(counts, compute)
    clear_unused(counts, grad_experts)
    grad_gates = gates.new_empty(slots)
    grad_gates[order] = gate_rows.to(gates.dtype)
    return grad_a.view(N, k, h), grad_gates.view(N, k), grad_experts
