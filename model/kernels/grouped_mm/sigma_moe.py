"""sigma-MoE by torch.nn.functional.grouped_mm over rows sorted by expert, on CPU and CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.activation import activate, activate_kept, activation_gradient, is_swiglu
from model.kernels.backend import grouped_mm_limit
from model.kernels.cpu.sorted_rows import inverse
from model.kernels.ops.sigma_moe import Inputs


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> output [N, d] and hidden layer, as `model.kernels.ops.sigma_moe`'s op."""
    x, scores, order, load, up_experts, down_experts, first_expert = inputs
    assert first_expert == 0, "F.grouped_mm takes the slots of its own experts alone"
    _check_grouped_mm(x, up_experts)
    k, offsets = scores.shape[1], load.cumsum(0, dtype=torch.int32)
    gates = scores.flatten()[order, None].to(x.dtype)
    hidden = F.grouped_mm(x[order // k], up_experts, offs=offsets)
    activated = activate_kept(hidden, swiglu=is_swiglu(up_experts, down_experts))
    rows = F.grouped_mm(activated * gates, down_experts, offs=offsets)
    return _sum_rows(rows, order, scores, x), hidden


def backward(grad: Tensor, inputs: Inputs, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_scores, kept = input_gradients(grad, inputs, hidden)
    return grad_x, grad_scores, *expert_gradients(grad, inputs, hidden, kept)


def input_gradients(
    grad: Tensor, inputs: Inputs, hidden: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """-> gradients of x and scores; and, in the order of the slots, that of the hidden layer before its activation, the
    activated one times its gate and the rows of `grad`."""
    x, scores, order, load, up_experts, down_experts, _ = inputs
    offsets, gates = load.cumsum(0, dtype=torch.int32), scores.flatten()[order, None].to(x.dtype)
    rows = grad.contiguous()[order // scores.shape[1]]
    grad_gated = F.grouped_mm(rows, down_experts.transpose(1, 2), offs=offsets)
    swiglu = is_swiglu(up_experts, down_experts)
    activated = activate(hidden, swiglu=True) if swiglu else hidden
    grad_scores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    grad_scores.view(-1)[order] = (grad_gated * activated).sum(1, dtype=torch.float32).to(scores.dtype)
    grad_hidden = activation_gradient(grad_gated * gates, hidden, swiglu=swiglu)
    grad_x = _sum_rows(F.grouped_mm(grad_hidden, up_experts.transpose(1, 2), offs=offsets), order, scores, x)
    return grad_x, grad_scores, (grad_hidden, activated * gates, rows)


def expert_gradients(
    grad: Tensor, inputs: Inputs, hidden: Tensor, kept: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """-> gradients of up_experts and down_experts; `kept` is what `input_gradients` gave for them."""
    (grad_hidden, gated, rows), offsets = kept, inputs.load.cumsum(0, dtype=torch.int32)
    tokens = inputs.order // inputs.scores.shape[1]
    grad_up = F.grouped_mm(inputs.x[tokens].t(), grad_hidden, offs=offsets)
    return grad_up, F.grouped_mm(gated.t(), rows, offs=offsets)


def _sum_rows(rows: Tensor, order: Tensor, scores: Tensor, x: Tensor) -> Tensor:
    """As `sum_slots`, on any device, in the dtype of `x`: a gather and a sum in one pass, deterministic."""
    if scores.numel() == 0:
        return torch.zeros_like(x)
    if len(order) < scores.numel():
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return F.embedding_bag(inverse(order, scores.numel()).view(scores.shape), rows, mode="sum").to(x.dtype)


def _check_grouped_mm(x: Tensor, up_experts: Tensor) -> None:
    reason = grouped_mm_limit(x.device.type, x.dtype, up_experts.shape[1:])
    if reason is not None:
        raise ValueError(
            f"kernels.backend=grouped_mm cannot compute sigma_moe: {reason}. Possible: auto, cpu, reference"
        )
