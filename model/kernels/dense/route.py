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
from model.kernels.gemm import add_product, multiply


def forward(
    x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logits, scores, index, load, order as in `model.kernels.ops.route.Routing`."""
    own = implementation("route", "triton" if x.device.type == "cuda" else "cpu")
    return own.forward(x, weight, keep, k, drop_scores)


def backward(
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    index: Tensor,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight, that of x added to `total` [N, d] of the dtype of x if it is given. At least one of
    `grad_logits` [N, R, E] and `grad_scores` [N, R, k] is there."""
    if x.dtype == weight.dtype == torch.bfloat16:
        parts = _in_two_parts(grad_logits, grad_scores, scores, index, weight.shape[1])
        return _gradients_of_parts(parts, x, weight, total)
    flat = _grad_of_logits(grad_logits, grad_scores, scores, index, weight.shape[1]).flatten(1)
    grad_x = torch.mm(flat, weight.reshape(-1, weight.shape[2]).to(flat.dtype))
    grad_weight = torch.mm(flat.t(), x.to(flat.dtype))
    grad_x = grad_x.to(x.dtype) if total is None else total.add_(grad_x)
    return grad_x, grad_weight.view(weight.shape).to(weight.dtype)


def _grad_of_logits(
    grad_logits: Tensor | None, grad_scores: Tensor | None, scores: Tensor, index: Tensor, num_experts: int
) -> Tensor:
    """[N, R, E]."""
    grad = scores.new_zeros(*index.shape[:2], num_experts)
    if grad_scores is not None:
        # s (1 - s) is 0 for a dropped score of 0 too. The k indices of a row differ: one addend per element.
        grad.scatter_(-1, index, grad_scores * scores * (1.0 - scores))
    if grad_logits is not None:
        grad += grad_logits
    return grad


def _in_two_parts(
    grad_logits: Tensor | None, grad_scores: Tensor | None, scores: Tensor, index: Tensor, num_experts: int
) -> Tensor:
    """[N, 2, R, E] bf16, the high and the low part."""
    if scores.device.type == "cuda":
        from model.kernels.triton import logit_gradient

        return logit_gradient.in_two_parts(grad_logits, grad_scores, scores, index, num_experts)
    grad = _grad_of_logits(grad_logits, grad_scores, scores, index, num_experts)
    parts = grad.new_empty(len(grad), 2, *grad.shape[1:], dtype=torch.bfloat16)
    parts[:, 0] = grad
    parts[:, 1] = grad - parts[:, 0]
    return parts


def _gradients_of_parts(parts: Tensor, x: Tensor, weight: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of `x` [N, d], added to `total` if it is given, and `weight` [R, E, d]. The parts stand side by side,
    so that either gradient is one product whose sums are in fp32."""
    both, matrix = parts.flatten(1), weight.reshape(-1, weight.shape[2])
    grad_x = add_product(both, torch.cat([matrix, matrix]), total)
    wide = torch.empty(both.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    multiply(both.t(), x, wide)
    high, low = wide.chunk(2)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    torch.add(high, low, out=grad_weight.view(matrix.shape))  # rounds once, without a launch of its own
    return grad_x, grad_weight
