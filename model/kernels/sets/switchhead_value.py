"""switchhead_value, tokens grouped by the set of their chosen experts (model/kernels/triton/set_gemm.py).

    forward     products = x W_V of the set's experts       v = their sum by the gates; products are kept
    backward    gated = gated spread of grad, all experts   grad_x = gated W_V^T, all experts, by cuBLAS: its sum goes
                                                            over heads, whose sets differ
                                                            grad_W = x^T gated of the tokens that chose the expert
                                                            grad_scores = <grad, kept>

Shape legend as in model/kernels/triton/set_gemm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.dense.gemms import check_dtypes
from model.kernels.gemm import add_product
from model.kernels.ops.switchhead import Inputs
from model.kernels.triton import set_gemm
from model.kernels.triton.gated_rows import gated_spread


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> v [N, H, h], and the products of the choices [N H k, h] for the backward pass."""
    check_dtypes(inputs, "sets")
    x, choice, experts, _ = inputs.contiguous()
    groups = set_gemm.group(choice.index, experts.shape[1])
    v, products = set_gemm.project(x, groups, choice, experts, transposed=False)
    return v, products.view(-1, v.shape[2])


def backward(
    grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], total: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, added to `total` [N, d] if it is given, scores and experts; `saved` is what `forward` gives after
    v."""
    grad_x, grad_scores, gated = input_gradients(grad, inputs, saved, total)
    return grad_x, grad_scores, expert_gradient(grad, inputs, saved, gated)


def input_gradients(
    grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], total: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, added to `total` if it is given, and scores, and the gated gradient [N, H, E, h], which
    `expert_gradient` needs."""
    x, choice, experts, _ = inputs.contiguous()
    (N, H, k), (_, E, d, h) = choice.index.shape, experts.shape
    gated, grad_scores = x.new_empty(N, H, E, h), torch.empty_like(choice.scores)
    if N == 0:
        return torch.empty_like(x) if total is None else total, grad_scores, gated
    rows, dot = grad.contiguous().view(N * H, h), (saved[0].view(N * H, k, h), grad_scores)
    gated_spread(rows, choice.scores, choice.index, gated.view(N * H, E, h), dot=dot)
    weight = experts.transpose(2, 3).reshape(H * E * h, d)
    return add_product(gated.view(N, H * E * h), weight, total), grad_scores, gated


def expert_gradient(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], gated: Tensor) -> Tensor:
    x, choice, experts, _ = inputs.contiguous()
    return set_gemm.expert_gradient(x, gated, choice, experts, narrow_first=False)
