"""sigma-MoE on CPU: an expert's whole MLP is one task, over rows that are gathered into tiles that stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.activation import activate, activate_kept, activation_gradient, is_swiglu
from model.kernels.cpu.sorted_rows import (
    clear_unused,
    empty_tile,
    expert_segments,
    filled,
    gather,
    mm_into,
    mm_rows,
    slot_rows,
    sorted_gates,
    sum_slots,
)
from model.kernels.cpu.workers import run_tasks, scratch
from model.kernels.dtypes import cpu_gemm_dtype
from model.kernels.ops.sigma_moe import Inputs


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> output [N, d] and hidden layer, as `model.kernels.ops.sigma_moe`'s op."""
    x, scores, order, load, up_experts, down_experts, first_expert = inputs
    assert first_expert == 0, "the CPU takes the slots of its own experts alone"
    (N, d), (_, G, _), k = x.shape, down_experts.shape, scores.shape[1]
    swiglu, W = is_swiglu(up_experts, down_experts), up_experts.shape[2]
    dtype, counts = cpu_gemm_dtype(x.dtype), load.tolist()
    source, gates, tokens = x.to(dtype), sorted_gates(scores, order, dtype), order // k
    rows, hidden = slot_rows(order, N * k, d, dtype), x.new_empty(order.shape[0], W, dtype=dtype)
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment = segments[expert]
        gated = empty_tile("gated", counts[expert], G, dtype)
        mm_rows(gather("gathered", source, tokens[segment]), up_experts[expert].to(dtype), hidden[segment])
        # The gate multiplies the hidden layer, which is narrower than the output: the same product, fewer bytes.
        activated = activate_kept(hidden[segment], swiglu=swiglu)
        torch.mul(activated, gates[segment], out=gated[: counts[expert]])
        mm_rows(gated, down_experts[expert].to(dtype), rows[segment])

    run_tasks(counts, compute)
    return sum_slots(rows, order, k, x), hidden


def backward(grad: Tensor, inputs: Inputs, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, scores, order, load, up_experts, down_experts, _ = inputs
    (N, d), (_, G, _), k = x.shape, down_experts.shape, scores.shape[1]
    swiglu, W = is_swiglu(up_experts, down_experts), up_experts.shape[2]
    dtype, counts = hidden.dtype, load.tolist()
    source, grad = x.to(dtype), grad.to(dtype).contiguous()
    gates, tokens = sorted_gates(scores, order, dtype), order // k
    rows, grad_gates = slot_rows(order, N * k, d, dtype), x.new_empty(order.shape[0], dtype=dtype)
    grad_up, grad_down = (w.new_empty(w.shape) for w in (up_experts, down_experts))
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment, count = segments[expert], counts[expert]
        expert_hidden, expert_gates = hidden[segment], gates[segment]
        activated = activate(expert_hidden, swiglu=True) if swiglu else expert_hidden
        gated = empty_tile("gated", count, G, dtype)
        torch.mul(activated, expert_gates, out=gated[:count])
        gathered = gather("gathered", grad, tokens[segment])
        mm_into(grad_down[expert], gated.t(), gathered)
        tile = scratch("grad_activated", (len(gathered), G), dtype)
        grad_activated = torch.mm(gathered, down_experts[expert].to(dtype).t(), out=tile)[:count]
        torch.linalg.vecdot(grad_activated, activated, out=grad_gates[segment])
        grad_hidden = empty_tile("grad_hidden", count, W, dtype) if swiglu else tile
        grad_activated.mul_(expert_gates)
        activation_gradient(grad_activated, expert_hidden, swiglu=swiglu, out=grad_hidden[:count])
        mm_into(grad_up[expert], gather("gathered", source, tokens[segment]).t(), grad_hidden)
        mm_rows(grad_hidden, up_experts[expert].to(dtype).t(), rows[segment])

    run_tasks(counts, compute)
    clear_unused(counts, grad_up, grad_down)
    grad_scores = scores.new_zeros(N * k)
    grad_scores[order] = grad_gates.to(scores.dtype)
    return sum_slots(rows, order, k, x), grad_scores.view(N, k), grad_up, grad_down


# `backward` in two parts: tensor-parallel ranks communicate between them (model/parallel/overlap.py). In one part it is
# faster: a gathered tile and the hidden layer's gradient serve both while they are in cache (docs/parallelism.md).


def input_gradients(grad: Tensor, inputs: Inputs, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x and scores, and that of the hidden layer before its activation [slots, W]."""
    x, scores, order, load, up_experts, down_experts, _ = inputs
    (N, d), (_, G, _), k = x.shape, down_experts.shape, scores.shape[1]
    swiglu = is_swiglu(up_experts, down_experts)
    dtype, counts = hidden.dtype, load.tolist()
    grad, gates, tokens = grad.to(dtype).contiguous(), sorted_gates(scores, order, dtype), order // k
    rows, grad_gates = slot_rows(order, N * k, d, dtype), x.new_empty(order.shape[0], dtype=dtype)
    grad_hidden = torch.empty_like(hidden)
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment, count = segments[expert], counts[expert]
        gathered, expert_hidden = gather("gathered", grad, tokens[segment]), hidden[segment]
        activated = activate(expert_hidden, swiglu=True) if swiglu else expert_hidden
        tile = scratch("grad_activated", (len(gathered), G), dtype)
        grad_activated = torch.mm(gathered, down_experts[expert].to(dtype).t(), out=tile)[:count]
        torch.linalg.vecdot(grad_activated, activated, out=grad_gates[segment])
        grad_rows = grad_hidden[segment]
        activation_gradient(grad_activated.mul_(gates[segment]), expert_hidden, swiglu=swiglu, out=grad_rows)
        mm_rows(filled("grad_hidden", grad_rows), up_experts[expert].to(dtype).t(), rows[segment])

    run_tasks(counts, compute)
    grad_scores = scores.new_zeros(N * k)
    grad_scores[order] = grad_gates.to(scores.dtype)
    return sum_slots(rows, order, k, x), grad_scores.view(N, k), grad_hidden


def expert_gradients(grad: Tensor, inputs: Inputs, hidden: Tensor, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of up_experts and down_experts."""
    x, scores, order, load, up_experts, down_experts, _ = inputs
    G, k = down_experts.shape[1], scores.shape[1]
    swiglu = is_swiglu(up_experts, down_experts)
    dtype, counts = hidden.dtype, load.tolist()
    source, grad = x.to(dtype), grad.to(dtype).contiguous()
    gates, tokens = sorted_gates(scores, order, dtype), order // k
    grad_up, grad_down = (w.new_empty(w.shape) for w in (up_experts, down_experts))
    segments = expert_segments(counts)

    def compute(expert: int) -> None:
        segment = segments[expert]
        gated = empty_tile("gated", counts[expert], G, dtype)
        activated = activate(hidden[segment], swiglu=True) if swiglu else hidden[segment]
        torch.mul(activated, gates[segment], out=gated[: counts[expert]])
        mm_into(grad_down[expert], gated.t(), gather("gathered", grad, tokens[segment]))
        narrow = filled("grad_hidden", grad_hidden[segment])
        mm_into(grad_up[expert], gather("gathered", source, tokens[segment]).t(), narrow)

    run_tasks(counts, compute)
    clear_unused(counts, grad_up, grad_down)
    return grad_up, grad_down
