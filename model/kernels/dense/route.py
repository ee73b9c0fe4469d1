"""Routing whose backward pass is the gradient of all logits, dense, and two GEMMs of torch; forward it is that of the
device's own backend, `triton` or `cpu`.

The Triton kernel of the gradients keeps the dense gradient on the chip, and reads scores again for every 64 columns of
d_model. Here it is written once, R E numbers of fp32 a token, and cuBLAS multiplies it: beside bf16 as the sum of two
bf16 numbers, exact to 2^-16 and on tensor cores; beside other dtypes in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.backend import implementation
from model.kernels.gemm import multiply


def forward(
    x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logits, scores, index, load, order as in `model.kernels.ops.route.Routing`."""
    own = implementation("route", "triton" if x.device.type == "cuda" else "cpu")
    return own.forward(x, weight, keep, k, drop_scores)


def backward(
    grad_logits: Tensor | None, grad_scores: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight. At least one of `grad_logits` [N, R, E] and `grad_scores` [N, R, k] is there."""
    N, (R, E, d) = x.shape[0], weight.shape
    grad = scores.new_zeros(N, R, E)
    if grad_scores is not None:
        # s (1 - s) is 0 for a dropped score of 0 too. The k indices of a row differ: one addend per element.
        grad.scatter_(-1, index, grad_scores * scores * (1.0 - scores))
    if grad_logits is not None:
        grad += grad_logits
    flat, matrix = grad.view(N, R * E), weight.reshape(R * E, d)
    if x.dtype == weight.dtype == torch.bfloat16:
        return _in_two_parts(flat, x, matrix, weight.shape)
    grad_x = torch.mm(flat, matrix.to(flat.dtype))
    grad_weight = torch.mm(flat.t(), x.to(flat.dtype))
    return grad_x.to(x.dtype), grad_weight.view(R, E, d).to(weight.dtype)


def _in_two_parts(grad: Tensor, x: Tensor, matrix: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Gradients of `x` [N, d] bf16 and of `matrix` [c, d] bf16, the latter in `shape`, for `grad` [N, c] fp32. The high
    and the low part stand side by side, so that either gradient is one product whose sums are in fp32."""
    N, c = grad.shape
    parts = x.new_empty(N, 2, c)
    parts[:, 0] = grad
    parts[:, 1] = grad - parts[:, 0]
    both = parts.view(N, 2 * c)
    grad_x = torch.mm(both, torch.cat([matrix, matrix]))
    wide = grad.new_empty(2 * c, x.shape[1])
    multiply(both.t(), x, wide)
    return grad_x, (wide[:c] + wide[c:]).view(shape).to(x.dtype)
