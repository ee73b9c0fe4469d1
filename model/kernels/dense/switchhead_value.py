"""switchhead_value as one GEMM of x by all experts, and a gated sum of its columns.

    forward     products = x W_V, all experts     v = gated sum of products; those of the choices are kept
    backward    gated = gated spread of grad      grad_x = gated W_V^T, grad_W = x^T gated, grad_scores = <grad, kept>

Shape legend as in model/kernels/dense/gemms.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.dense.gemms import WeightGradient, check_dtypes, chunks, rows_module
from model.kernels.gemm import multiply
from model.kernels.ops.switchhead import Inputs


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> v [N, H, h], and the products of the choices [N H k, h] for the backward pass."""
    x, choice, experts, strategy = inputs
    check_dtypes(inputs)
    (N, _), (H, E, _, h), k = x.shape, experts.shape, choice.index.shape[2]
    weight, gated_sum = stacked(experts), rows_module(strategy).gated_sum
    v, kept = x.new_empty(N, H, h), x.new_empty(N, H, k, h)
    for chunk in chunks(N, H * E * h, x.itemsize):
        products = torch.mm(x[chunk.tokens], weight).view(len(chunk) * H, E, h)
        gated_sum(products, *chunk.choices(choice), chunk.pairs(v), chosen=chunk.pairs(kept))
    return v, kept.view(N * H * k, h)


def backward(
    grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], total: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, added to `total` [N, d] if it is given, scores and experts; `saved` is what `forward` gives after
    v."""
    return _gradients(grad, inputs, saved, of_inputs=True, of_experts=True, total=total)


def input_gradients(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, None]:
    """Gradients of x and scores; nothing is kept for `expert_gradient`, which spreads the gradient again: as wide as
    all experts, it would wait in memory."""
    grad_x, grad_scores, _ = _gradients(grad, inputs, saved, of_inputs=True, of_experts=False)
    return grad_x, grad_scores, None


def expert_gradient(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], kept: None) -> Tensor:
    return _gradients(grad, inputs, saved, of_inputs=False, of_experts=True)[2]


def _gradients(
    grad: Tensor,
    inputs: Inputs,
    saved: tuple[Tensor, ...],
    *,
    of_inputs: bool,
    of_experts: bool,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scores and experts; what was not asked for is not filled."""
    x, choice, experts, strategy = inputs
    grad, (N, d), (H, E, _, h), k = grad.contiguous(), x.shape, experts.shape, choice.index.shape[2]
    weight, gated_spread = stacked(experts).t() if of_inputs else experts, rows_module(strategy).gated_spread
    kept, parts = saved[0].view(N, H, k, h), chunks(N, H * E * h, x.itemsize)
    grad_scores = choice.scores.new_empty(choice.scores.shape)
    grad_x = x.new_empty((N, d) if of_inputs else (0,)) if total is None else total
    grad_weight = WeightGradient(d, H * E * h if of_experts else 0, experts, len(parts))
    for chunk in parts:
        gated = x.new_empty(len(chunk) * H, E, h)
        dot = (chunk.pairs(kept), grad_scores[chunk.tokens]) if of_inputs else None
        gated_spread(chunk.pairs(grad), *chunk.choices(choice), gated, dot=dot)
        columns = gated.view(len(chunk), H * E * h)
        if of_inputs:
            multiply(columns, weight, grad_x[chunk.tokens], add=total is not None)
        if of_experts:
            grad_weight.add(x[chunk.tokens], columns)
    if not of_experts:
        return grad_x, grad_scores, grad_weight.total
    grad_experts = grad_weight.total.view(d, H, E, h).permute(1, 2, 0, 3)
    return grad_x, grad_scores, grad_experts.to(experts.dtype, copy=True, memory_format=torch.contiguous_format)


def stacked(experts: Tensor) -> Tensor:
    """[H, E, d, h] -> [d, H * E * h], a copy: 1 / N of what the GEMM's result takes, times d."""
    return experts.permute(2, 0, 1, 3).reshape(experts.shape[2], -1)
