"""sigma-MoE feed-forward: all experts of one layer, both matrices, as one op.

    y[n] = sum over j of scores[n, j] * ReLU(x[n] W_1[e]) W_2[e],  e = index[n, j]      (arXiv 2310.10837, eq. 10-12)

or with SwiGLU in the place of the ReLU (model/kernels/activation.py).

Shapes: N tokens, d d_model, E experts, G expert width, W columns of W_1 (G, or 2 G with SwiGLU), k experts per token. A
slot n*k + j is one (token, choice) pair.

Measured (N=4096, d=512, E=16, k=4, G=128, forward + backward, share of torch.mm's rate at 2048^3 in the same run):
2 threads 59% in fp32, 1 thread 68%; the GEMMs alone reach 95%, gathers take 10%, the sum over k 5%, ReLU and gates 4%.
bf16 is computed in fp32 where the CPU cannot multiply it: 90-120% of torch.mm's bf16 rate. Other designs, forward on
one thread in one run: gather into the rows that are summed at the end 66% (this one: into a tile that stays in cache,
69%), index_add_ per expert 64%, blocks of 1024 tokens through all experts 60%.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.activation import activate, is_swiglu
from model.kernels.backend import implementation
from model.kernels.dtypes import cpu_gemm_dtype, wide_dtype
from model.kernels.op import op
from model.kernels.ops.route import Choice
from model.parallel.overlap import Slot


class HeldExperts(NamedTuple):
    """The experts that this rank computes, E of them."""

    up: Tensor
    """[E, d, W]"""
    down: Tensor
    """[E, G, d]"""
    first: int = 0
    """Which of the router's experts the first one is, where `order` and `load` are those of all (see `sigma_moe`)."""


class Inputs(NamedTuple):
    """What every backend takes of a call, forward and backward."""

    x: Tensor
    scores: Tensor
    order: Tensor
    load: Tensor
    up_experts: Tensor
    down_experts: Tensor
    first_expert: int


FUSES_ADDITION = ("triton",)
"""Backends whose sum over k adds the residual stream in its pass."""


def sigma_moe(
    x: Tensor,
    choice: Choice,
    experts: HeldExperts,
    *,
    backend: str,
    slot: Slot | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`x` [N, d], `choice` of one router (`scores` and `index` [N, k], `order` [N*k], `load` [E]) and `experts` ->
    [N, d] in the dtype of `x`; with `residual` [N, d] its sum with that.

    A tensor-parallel rank that holds some of the experts gives its own: the part of `order` with their slots, their
    `load`, and `index` counted from its first expert; what others chose (below 0, or E and above) adds nothing here.
    How many slots those are only the device knows: with the backend `triton` it gives all of `order` and `load`, and
    `experts.first`, and need not wait for it.

    Differentiable in `x`, the choice's scores (any float dtype), both matrices of the experts and `residual`. `backend`
    is a resolved one (model/kernels/backend.py). With `slot` the gradients of the experts are left to it
    (model/parallel/overlap.py), but by the reference, which gives them at once.
    """
    is_fused = backend in FUSES_ADDITION and slot is None and residual is not None and residual.dtype == x.dtype
    if residual is not None and not is_fused:
        return residual + sigma_moe(x, choice, experts, backend=backend, slot=slot)
    if backend == "reference":
        return sigma_moe_reference(x, choice, experts)
    inputs = (x, choice.scores, choice.order, choice.load, experts.up, experts.down, backend, experts.first)
    return _sigma_moe(*inputs, residual)[0] if slot is None else _LateExperts.apply(slot, *inputs)


def sigma_moe_reference(x: Tensor, choice: Choice, experts: HeldExperts) -> Tensor:
    """The specification: every expert computes every token, the gate of an expert that was not chosen is zero.

    E / k times the arithmetic of the op, but no data-dependent shape. Half precision is computed in fp32.
    """
    wide, scores, index = wide_dtype(x.dtype), choice.scores, choice.index
    num_experts = experts.up.shape[0]
    column = torch.where((index >= 0) & (index < num_experts), index, num_experts)  # one more for absent experts
    gates = scores.new_zeros(x.shape[0], num_experts + 1).scatter_add(1, column, scores)[:, :-1].to(wide)  # [N, E]
    products = torch.einsum("nd,edw->new", x.to(wide), experts.up.to(wide))
    hidden = activate(products, swiglu=is_swiglu(experts.up, experts.down))
    return torch.einsum("neg,egd->nd", hidden * gates[:, :, None], experts.down.to(wide)).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------- op
# A custom op takes tensors, no record of them; the first thing that it does is to make one.


@op("sigma_moe")
def _sigma_moe(
    x: Tensor,
    scores: Tensor,
    order: Tensor,
    load: Tensor,
    up_experts: Tensor,
    down_experts: Tensor,
    backend: str,
    first_expert: int = 0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> output [N, d], added to `residual` if given (FUSES_ADDITION), and the hidden layer [N*k, W] for backward:
    grouped by expert, before the gate; after ReLU, but before SwiGLU."""
    inputs = Inputs(x, scores, order, load, up_experts, down_experts, first_expert)
    added = () if residual is None else (residual,)
    return implementation("sigma_moe", backend).forward(inputs, *added)


@_sigma_moe.register_fake
def _(x, scores, order, load, up_experts, down_experts, backend, first_expert=0, residual=None):
    hidden_dtype = cpu_gemm_dtype(x.dtype) if backend == "cpu" else x.dtype
    y = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    return y, x.new_empty(order.shape[0], up_experts.shape[2], dtype=hidden_dtype)


@op("sigma_moe_backward")
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
    inputs = Inputs(x, scores, order, load, up_experts, down_experts, first_expert)
    return implementation("sigma_moe", backend).backward(grad, inputs, hidden)


@_sigma_moe_backward.register_fake
def _(grad, x, scores, order, load, up_experts, down_experts, hidden, backend, first_expert=0):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, scores, up_experts, down_experts)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend, ctx.first_expert, residual = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    settings = ctx.backend, ctx.first_expert
    grad_x, grad_scores, grad_up, grad_down = _sigma_moe_backward(grad, *ctx.saved_tensors, *settings)
    return grad_x, grad_scores, None, None, grad_up, grad_down, None, None, grad if ctx.has_residual else None


_sigma_moe.register_autograd(_autograd, setup_context=_setup_context)


class _LateExperts(torch.autograd.Function):
    """The op, whose backward pass computes the gradients of `x` and `scores` and leaves those of the experts."""

    @staticmethod
    def forward(ctx, slot, *inputs):
        *tensors, backend, ctx.first_expert = inputs
        ctx.slot, ctx.module = slot, implementation("sigma_moe", backend)
        y, hidden = torch.ops.switchall.sigma_moe(*inputs)
        ctx.save_for_backward(*tensors, hidden)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, scores, order, load, up_experts, down_experts, hidden = ctx.saved_tensors
        arguments = grad, Inputs(x, scores, order, load, up_experts, down_experts, ctx.first_expert), hidden
        grad_x, grad_scores, kept = ctx.module.input_gradients(*arguments)
        ctx.slot.leave(partial(ctx.module.expert_gradients, *arguments, kept))
        return None, grad_x, grad_scores, *[None] * 6


@register_flop_formula(torch.ops.switchall.sigma_moe)
def sigma_moe_flop(x_shape, scores_shape, order_shape, load_shape, up_shape, down_shape, *args, **kwargs) -> int:
    """2 flops per multiply-add, two matrices, k experts per token; a rank's share where it was given all slots."""
    (E, d, W), G = up_shape, down_shape[1]
    return 2 * (order_shape[0] * E // load_shape[0]) * d * (W + G)


@register_flop_formula(torch.ops.switchall.sigma_moe_backward)
def sigma_moe_backward_flop(
    grad_shape, x_shape, scores_shape, order_shape, load_shape, up_shape, down_shape, *args, **kwargs
) -> int:
    """Input and weight gradient of both matrices: twice the forward pass."""
    return 2 * sigma_moe_flop(x_shape, scores_shape, order_shape, load_shape, up_shape, down_shape)
