"""switchhead_output as a gated spread of attention's rows over all experts, and one GEMM.

    forward     gated = gated spread of a          y = gated W_O, all experts
    backward    products = grad W_O^T              grad_a = gated sum of products, grad_scores = <a, products>
                gated again                        grad_W = gated^T grad

Shape legend as in model/kernels/dense/gemms.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.dense.gemms import WeightGradient, check_dtypes, chunks, rows_module
from model.kernels.ops.switchhead import Inputs


def forward(inputs: Inputs) -> tuple[Tensor]:
    """-> y [N, d]; nothing is kept."""
    a, choice, experts, strategy = inputs
    check_dtypes(inputs)
    a, N, (H, E, h, d) = a.contiguous(), a.shape[0], experts.shape
    weight, gated_spread = experts.reshape(H * E * h, d), rows_module(strategy).gated_spread
    y = a.new_empty(N, d)
    for chunk in chunks(N, H * E * h, a.itemsize):
        gated = a.new_empty(len(chunk) * H, E, h)
        gated_spread(chunk.pairs(a), *chunk.choices(choice), gated)
        torch.mm(gated.view(len(chunk), H * E * h), weight, out=y[chunk.tokens])
    return (y,)


def backward(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, scores and experts."""
    a, choice, experts, strategy = inputs
    grad, a = grad.contiguous(), a.contiguous()
    N, (H, E, h, d), rows = a.shape[0], experts.shape, rows_module(strategy)
    weight, parts = experts.reshape(H * E * h, d), chunks(N, H * E * h, a.itemsize)
    grad_a, grad_scores = torch.empty_like(a), choice.scores.new_empty(choice.scores.shape)
    grad_weight = WeightGradient(H * E * h, d, experts, len(parts))
    for chunk in parts:
        narrow, choices = chunk.pairs(a), chunk.choices(choice)
        columns = torch.mm(grad[chunk.tokens], weight.t())
        wide = columns.view(len(chunk) * H, E, h)
        rows.gated_sum(wide, *choices, chunk.pairs(grad_a), dot=(narrow, grad_scores[chunk.tokens]))
        rows.gated_spread(narrow, *choices, wide)  # into the same memory: the products have been read
        grad_weight.add(columns, grad[chunk.tokens])
    return grad_a, grad_scores, grad_weight.total.view(H, E, h, d).to(experts.dtype)
