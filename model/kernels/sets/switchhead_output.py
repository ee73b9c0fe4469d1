"""switchhead_output, tokens grouped by the set of their chosen experts (model/kernels/triton/set_gemm.py).

    forward     gated = gated spread of a, all experts      y = gated W_O, all experts, by cuBLAS: its sum goes over
                                                            heads, whose sets differ
    backward    products = grad W_O^T of the set's experts  grad_a = their sum by the gates, grad_scores = <a, products>
                gated again                                 grad_W = gated^T grad of the tokens that chose the expert

Shape legend as in model/kernels/triton/set_gemm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.dense import switchhead_output as dense
from model.kernels.dense.gemms import check_dtypes
from model.kernels.ops.switchhead import Inputs
from model.kernels.triton import set_gemm
from model.kernels.triton.gated_rows import gated_spread


def forward(inputs: Inputs) -> tuple[Tensor]:
    """-> y [N, d]; nothing is kept."""
    check_dtypes(inputs, "sets")
    return dense.forward(inputs)


def backward(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, scores and experts."""
    a, choice, experts, _ = inputs.contiguous()
    grad, (N, H, h), (E, k) = grad.contiguous(), a.shape, (experts.shape[1], choice.index.shape[2])
    groups = set_gemm.group(choice.index, E)
    grad_a, products = set_gemm.project(grad, groups, choice, experts, transposed=True)
    gated, grad_scores = a.new_empty(N, H, E, h), torch.empty_like(choice.scores)
    if N > 0:
        wide, dot = gated.view(N * H, E, h), (products.view(N * H, k, h), grad_scores)
        gated_spread(a.view(N * H, h), choice.scores, choice.index, wide, dot=dot)
    return grad_a, grad_scores, set_gemm.expert_gradient(grad, gated, choice, experts, narrow_first=True)
