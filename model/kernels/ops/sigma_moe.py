"""sigma-MoE feed-forward: all experts of one layer, both matrices, as one op.

    y[n] = sum over j of scores[n, j] * ReLU(x[n] W_1[e]) W_2[e],  e = index[n, j]      (arXiv 2310.10837, eq. 10-12)

Shapes: N tokens, d d_model, E experts, G expert width, k experts per token. A slot n*k + j is one (token, choice) pair.

Measured (N=4096, d=512, E=16, k=4, G=128, forward + backward, share of torch.mm's rate at 2048^3 in the same run):
2 threads 59% in fp32, 1 thread 68%; the GEMMs alone reach 95%, gathers take 10%, the sum over k 5%, ReLU and gates 4%.
bf16 is computed in fp32 where the CPU has no AMX: 90-120% of torch.mm's bf16 rate. Shares of other designs, forward on
one thread in one run: gather into the rows that are summed at the end 66% (this one: into a tile that stays in cache,
69%), index_add_ per expert 64%, blocks of 1024 tokens through all experts 60%.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.backend import gemm_dtype, grouped_mm_limit
from model.kernels.cpu.sorted_rows import expert_segment, inverse, mm_into, slot_rows, sorted_gates, sum_slots
from model.kernels.cpu.workers import run_tasks, scratch


def sigma_moe(
    x: Tensor,
    scores: Tensor,
    index: Tensor,
    order: Tensor,
    load: Tensor,
    up_experts: Tensor,
    down_experts: Tensor,
    *,
    backend: str,
    first_expert: int = 0,
) -> Tensor:
    """`x` [N, d], `scores` and `index` [N, k], `order` [N*k] (slots grouped by expert, in token order), `load` [E],
    `up_experts` [E, d, G], `down_experts` [E, G, d] -> [N, d] in the dtype of `x`.

    A tensor-parallel rank that holds some of the experts gives its own: the part of `order` with their slots, their
    `load`, and `index` counted from its first expert; what others chose (below 0, or E and above) adds nothing here.
    How many slots those are only the device knows: with the backend `triton` it gives all of `order` and `load`, and
    `first_expert`, and need not wait for it.

    Differentiable in `x`, `scores` (any float dtype), `up_experts` and `down_experts`. `order` and `load` are those of
    `model.kernels.ops.route` for `index`. `backend` is a resolved one (model/kernels/backend.py).
    """
    if backend == "reference":
        return sigma_moe_reference(x, scores, index, up_experts, down_experts)
    return _sigma_moe(x, scores, order, load, up_experts, down_experts, backend, first_expert)[0]


def sigma_moe_reference(x: Tensor, scores: Tensor, index: Tensor, up_experts: Tensor, down_experts: Tensor) -> Tensor:
    """The specification: every expert computes every token, the gate of an expert that was not chosen is zero.

    E / k times the arithmetic of the op, but no data-dependent shape. Half precision is computed in fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    num_experts = up_experts.shape[0]
    column = torch.where((index >= 0) & (index < num_experts), index, num_experts)  # one more for absent experts
    gates = scores.new_zeros(x.shape[0], num_experts + 1).scatter_add(1, column, scores)[:, :-1].to(wide)  # [N, E]
    hidden = F.relu(torch.einsum("nd,edg->neg", x.to(wide), up_experts.to(wide)))
    return torch.einsum("neg,egd->nd", hidden * gates[:, :, None], down_experts.to(wide)).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------- op


@torch.library.custom_op("switchall::sigma_moe", mutates_args=())
def _sigma_moe(
    x: Tensor,
    scores: Tensor,
    order: Tensor,
    load: Tensor,
    up_experts: Tensor,
    down_experts: Tensor,
    backend: str,
    first_expert: int = 0,
) -> tuple[Tensor, Tensor]:
    """-> output [N, d] and the hidden layer [N*k, G] (after ReLU, before the gate, grouped by expert) for backward."""
    return _implementation(backend, first_expert)[0](x, scores, order, load, up_experts, down_experts)


@_sigma_moe.register_fake
def _(x, scores, order, load, up_experts, down_experts, backend, first_expert=0):
    hidden_dtype = gemm_dtype(x.dtype) if backend == "cpu" else x.dtype
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        order.shape[0], up_experts.shape[2], dtype=hidden_dtype
    )


@torch.library.custom_op("switchall::sigma_moe_backward", mutates_args=())
def _sigma_moe_backward(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    order: Tensor,
    load: Tensor,
    up_experts: Tensor,
    down_experts: Tensor,
    hidden: Tensor,
    backend: str,
    first_expert: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, scores, up_experts, down_experts for the output's gradient `grad` [N, d]."""
    return _implementation(backend, first_expert)[1](grad, x, scores, order, load, up_experts, down_experts, hidden)


@_sigma_moe_backward.register_fake
def _(grad, x, scores, order, load, up_experts, down_experts, hidden, backend, first_expert=0):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, scores, up_experts, down_experts)
    )


def _implementation(backend: str, first_expert: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward."""
    if backend == "triton":
        from model.kernels.triton import sigma_moe as kernels

        return (
            partial(kernels.forward_triton, first_expert=first_expert),
            partial(kernels.backward_triton, first_expert=first_expert),
        )
    assert first_expert == 0, f"backend {backend} takes the slots of its own experts alone"
    return {"cpu": (_forward_cpu, _backward_cpu), "grouped_mm": (_forward_grouped_mm, _backward_grouped_mm)}[backend]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend, ctx.first_expert = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    settings = ctx.backend, ctx.first_expert
    grad_x, grad_scores, grad_up, grad_down = _sigma_moe_backward(grad, *ctx.saved_tensors, *settings)
    return grad_x, grad_scores, None, None, grad_up, grad_down, None, None


_sigma_moe.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchall.sigma_moe)
def sigma_moe_flop(x_shape, scores_shape, order_shape, load_shape, up_shape, *args, **kwargs) -> int:
    """2 flops per multiply-add, two matrices, k experts per token; a rank's share where it was given all slots."""
    E, d, G = up_shape
    return 2 * 2 * (order_shape[0] * E // load_shape[0]) * d * G


@register_flop_formula(torch.ops.switchall.sigma_moe_backward)
def sigma_moe_backward_flop(
    grad_shape, x_shape, scores_shape, order_shape, load_shape, up_shape, *args, **kwargs
) -> int:
    """Input and weight gradient of both matrices: twice the forward pass."""
    E, d, G = up_shape
    return 4 * 2 * (order_shape[0] * E // load_shape[0]) * d * G


# --------------------------------------------------------------------------------------------------------------- CPU


def _forward_cpu(
    x: Tensor, scores: Tensor, order: Tensor, load: Tensor, up_experts: Tensor, down_experts: Tensor
) -> tuple[Tensor, Tensor]:
    (N, d), G, k = x.shape, up_experts.shape[2], scores.shape[1]
    dtype, counts = gemm_dtype(x.dtype), load.tolist()
    source, gates, tokens = x.to(dtype), sorted_gates(scores, order, dtype), order // k
    rows, hidden = slot_rows(order, N * k, d, dtype), x.new_empty(order.shape[0], G, dtype=dtype)

    def compute(expert: int) -> None:
        segment = expert_segment(counts, expert)
        gathered = scratch("gathered", (counts[expert], d), dtype)
        gated = scratch("gated", (counts[expert], G), dtype)
        torch.index_select(source, 0, tokens[segment], out=gathered)
        expert_hidden = torch.mm(gathered, up_experts[expert].to(dtype), out=hidden[segment]).relu_()
        # The gate multiplies the hidden layer, which is narrower than the output: the same product, fewer bytes.
        torch.mul(expert_hidden, gates[segment], out=gated)
        torch.mm(gated, down_experts[expert].to(dtype), out=rows[segment])

    run_tasks(counts, compute)
    return sum_slots(rows, order, k, x), hidden


def _backward_cpu(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    order: Tensor,
    load: Tensor,
    up_experts: Tensor,
    down_experts: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, d), G, k = x.shape, up_experts.shape[2], scores.shape[1]
    dtype, counts = hidden.dtype, load.tolist()
    source, grad = x.to(dtype), grad.to(dtype).contiguous()
    gates, tokens = sorted_gates(scores, order, dtype), order // k
    rows, grad_gates = slot_rows(order, N * k, d, dtype), x.new_empty(order.shape[0], dtype=dtype)
    grad_up, grad_down = (w.new_empty(w.shape) for w in (up_experts, down_experts))

    def compute(expert: int) -> None:
        segment = expert_segment(counts, expert)
        expert_hidden, expert_gates = hidden[segment], gates[segment]
        gathered = scratch("gathered", (counts[expert], d), dtype)
        gated = scratch("gated", (counts[expert], G), dtype)
        grad_hidden = scratch("grad_hidden", (counts[expert], G), dtype)
        torch.index_select(grad, 0, tokens[segment], out=gathered)
        torch.mul(expert_hidden, expert_gates, out=gated)
        mm_into(grad_down[expert], gated.t(), gathered)
        torch.mm(gathered, down_experts[expert].to(dtype).t(), out=grad_hidden)
        torch.linalg.vecdot(grad_hidden, expert_hidden, out=grad_gates[segment])
        grad_hidden.mul_(expert_gates)
        torch.ops.aten.threshold_backward.grad_input(grad_hidden, expert_hidden, 0, grad_input=grad_hidden)
        torch.index_select(source, 0, tokens[segment], out=gathered)
        mm_into(grad_up[expert], gathered.t(), grad_hidden)
        torch.mm(grad_hidden, up_experts[expert].to(dtype).t(), out=rows[segment])

    run_tasks(counts, compute)
    for expert, count in enumerate(counts):
        if count == 0:
            grad_up[expert].zero_()
            grad_down[expert].zero_()
    grad_scores = scores.new_zeros(N * k)
    grad_scores[order] = grad_gates.to(scores.dtype)
    return sum_slots(rows, order, k, x), grad_scores.view(N, k), grad_up, grad_down


# -------------------------------------------------------------------------------------------------------- grouped_mm


def _forward_grouped_mm(
    x: Tensor, scores: Tensor, order: Tensor, load: Tensor, up_experts: Tensor, down_experts: Tensor
) -> tuple[Tensor, Tensor]:
    _check_grouped_mm(x, up_experts)
    k, offsets = scores.shape[1], load.cumsum(0, dtype=torch.int32)
    gates = scores.flatten()[order, None].to(x.dtype)
    hidden = F.grouped_mm(x[order // k], up_experts, offs=offsets).relu_()
    rows = F.grouped_mm(hidden * gates, down_experts, offs=offsets)
    return _sum_rows(rows, order, scores, x), hidden


def _backward_grouped_mm(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    order: Tensor,
    load: Tensor,
    up_experts: Tensor,
    down_experts: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, offsets = scores.shape[1], load.cumsum(0, dtype=torch.int32)
    tokens, gates = order // k, scores.flatten()[order, None].to(x.dtype)
    rows = grad.contiguous()[tokens]
    grad_gated = F.grouped_mm(rows, down_experts.transpose(1, 2), offs=offsets)
    grad_down = F.grouped_mm((hidden * gates).t(), rows, offs=offsets)
    grad_scores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    grad_scores.view(-1)[order] = (grad_gated * hidden).sum(1, dtype=torch.float32).to(scores.dtype)
    grad_hidden = torch.ops.aten.threshold_backward(grad_gated * gates, hidden, 0)
    grad_up = F.grouped_mm(x[tokens].t(), grad_hidden, offs=offsets)
    grad_x = _sum_rows(F.grouped_mm(grad_hidden, up_experts.transpose(1, 2), offs=offsets), order, scores, x)
    return grad_x, grad_scores, grad_up, grad_down


def _sum_rows(rows: Tensor, order: Tensor, scores: Tensor, x: Tensor) -> Tensor:
    """As `sum_slots`, on any device, in the dtype of `x`: a gather and a sum in fp32, deterministic."""
    if len(order) < scores.numel():
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return rows[inverse(order, scores.numel())].view(*scores.shape, x.shape[1]).sum(1, dtype=torch.float32).to(x.dtype)


def _check_grouped_mm(x: Tensor, up_experts: Tensor) -> None:
    reason = grouped_mm_limit(x.device.type, x.dtype, up_experts.shape[1:])
    if reason is not None:
        raise ValueError(
            f"kernels.backend=grouped_mm cannot compute sigma_moe: {reason}. Possible: auto, cpu, reference"
        )
