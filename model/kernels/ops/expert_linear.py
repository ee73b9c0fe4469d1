"""The expert projections of Mixture of Attention Heads: one matrix per expert, from tokens to slots and back.

    expert_linear      y[n, j] = x[n] W[e],                               e = index[n, j]         (the queries)
    expert_linear_sum  y[n]    = sum over j of gates[n, j] * a[n, j] W[e]                         (the output)
                                                                        (MoA, arXiv 2210.05144, section 3)

Shapes: N tokens, d d_model (wide), h head_dim (narrow), E experts, k experts per token. A slot n*k + j is one (token,
choice) pair. Wide rows belong to tokens and narrow ones to slots: each op is the other's input gradient.

Measured (N=2048, d=416, h=88, E=10, k=4, both ops forward + backward, one thread on a busy machine, share of torch.mm's
rate at 2048^3 in the same run): 51% in fp32; F.grouped_mm 33%, a loop over experts with index_add 34%, reference 31%.
bf16 is computed in fp32 where the CPU cannot multiply it: 88% of torch.mm's bf16 rate, the others 52-60%.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.backend import implementation
from model.kernels.dtypes import wide_dtype
from model.kernels.op import op
from model.kernels.ops.route import Choice
from model.parallel.overlap import Slot


def expert_linear(x: Tensor, choice: Choice, experts: Tensor, *, backend: str, slot: Slot | None = None) -> Tensor:
    """`x` [N, d], `choice` of one router (`index` [N, k], `order` [N*k], `load` [E]; its scores are not used),
    `experts` [E, d, h] -> [N, k, h] in the dtype of `x`.

    Differentiable in `x` and `experts`. `backend` is a resolved one (model/kernels/backend.py). With `slot` the
    gradient of the experts is left to it (model/parallel/overlap.py), but by the reference, which gives it at once.
    """
    if backend == "reference":
        return expert_linear_reference(x, choice.index, experts)
    inputs = (x, choice.order, choice.load, experts, choice.index.shape[1], backend)
    return _expert_linear(*inputs) if slot is None else _LateExperts.apply(slot, *inputs)


def expert_linear_sum(a: Tensor, choice: Choice, experts: Tensor, *, backend: str) -> Tensor:
    """`a` [N, k, h], `choice` as above, whose scores [N, k] are the gates, `experts` [E, h, d] -> [N, d] in the dtype
    of `a`. Differentiable in `a`, the gates (any float dtype) and `experts`."""
    if backend == "reference":
        return expert_linear_sum_reference(a, choice.scores, choice.index, experts)
    return _expert_linear_sum(a, choice.scores, choice.order, choice.load, experts, backend)


def expert_linear_reference(x: Tensor, index: Tensor, experts: Tensor) -> Tensor:
    """The specification: every expert computes every token, the chosen results are gathered. Half precision is
    computed in fp32."""
    wide = wide_dtype(x.dtype)
    products = torch.einsum("nd,edh->neh", x.to(wide), experts.to(wide))
    return products.gather(1, index[:, :, None].expand(-1, -1, experts.shape[2])).to(x.dtype)


def expert_linear_sum_reference(a: Tensor, gates: Tensor, index: Tensor, experts: Tensor) -> Tensor:
    """The specification: the gated row of a slot stands at its expert, all others are zero."""
    wide = wide_dtype(a.dtype)
    gated = a.to(wide) * gates.to(wide)[:, :, None]
    by_expert = gated.new_zeros(a.shape[0], experts.shape[0], a.shape[2])
    by_expert = by_expert.scatter(1, index[:, :, None].expand_as(a), gated)
    return torch.einsum("neh,ehd->nd", by_expert, experts.to(wide)).to(a.dtype)


# --------------------------------------------------------------------------------------------------------------- ops


@op("expert_linear")
def _expert_linear(x: Tensor, order: Tensor, load: Tensor, experts: Tensor, k: int, backend: str) -> Tensor:
    return implementation("expert_linear", backend).forward(x, order, load, experts, k)


@op("expert_linear_backward")
def _expert_linear_backward(
    grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and experts for the output's gradient `grad` [N, k, h]."""
    return implementation("expert_linear", backend).backward(grad, x, order, load, experts)


@op("expert_linear_sum")
def _expert_linear_sum(a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor, backend: str) -> Tensor:
    return implementation("expert_linear", backend).sum_forward(a, gates, order, load, experts)


@op("expert_linear_sum_backward")
def _expert_linear_sum_backward(
    grad: Tensor, a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of a, gates and experts for the output's gradient `grad` [N, d]."""
    return implementation("expert_linear", backend).sum_backward(grad, a, gates, order, load, experts)


@_expert_linear.register_fake
def _(x, order, load, experts, k, backend):
    return x.new_empty(x.shape[0], k, experts.shape[2])


@_expert_linear_sum.register_fake
def _(a, gates, order, load, experts, backend):
    return a.new_empty(a.shape[0], experts.shape[2])


@_expert_linear_backward.register_fake
def _(grad, x, order, load, experts, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, experts))


@_expert_linear_sum_backward.register_fake
def _(grad, a, gates, order, load, experts, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, gates, experts))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*(t for t in tensors if isinstance(t, Tensor)))


def _linear_autograd(ctx, grad):
    grad_x, grad_experts = _expert_linear_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, None, None, grad_experts, None, None


def _sum_autograd(ctx, grad):
    grad_a, grad_gates, grad_experts = _expert_linear_sum_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_a, grad_gates, None, None, grad_experts, None


_expert_linear.register_autograd(_linear_autograd, setup_context=_setup_context)
_expert_linear_sum.register_autograd(_sum_autograd, setup_context=_setup_context)


class _LateExperts(torch.autograd.Function):
    """expert_linear, whose backward pass computes the gradient of `x` and leaves that of the experts."""

    @staticmethod
    def forward(ctx, slot, x, order, load, experts, k, backend):
        ctx.slot, ctx.module = slot, implementation("expert_linear", backend)
        ctx.save_for_backward(x, order, load, experts)
        return torch.ops.switchall.expert_linear(x, order, load, experts, k, backend)

    @staticmethod
    def backward(ctx, grad):
        arguments = grad, *ctx.saved_tensors
        grad_x = ctx.module.input_gradient(*arguments)
        ctx.slot.leave(lambda: (ctx.module.expert_gradient(*arguments),))
        return None, grad_x, *[None] * 5


@register_flop_formula(torch.ops.switchall.expert_linear)
def linear_flop(x_shape, order_shape, load_shape, experts_shape, *args, **kwargs) -> int:
    """2 flops per multiply-add, k experts per token."""
    return 2 * order_shape[0] * experts_shape[1] * experts_shape[2]


@register_flop_formula(torch.ops.switchall.expert_linear_backward)
def linear_backward_flop(grad_shape, x_shape, order_shape, load_shape, experts_shape, *args, **kwargs) -> int:
    """Input and weight gradient: twice the forward pass."""
    return 2 * linear_flop(x_shape, order_shape, load_shape, experts_shape)


@register_flop_formula(torch.ops.switchall.expert_linear_sum)
def sum_flop(a_shape, gates_shape, order_shape, load_shape, experts_shape, *args, **kwargs) -> int:
    """2 flops per multiply-add, k experts per token."""
    return 2 * order_shape[0] * experts_shape[1] * experts_shape[2]


@register_flop_formula(torch.ops.switchall.expert_linear_sum_backward)
def sum_backward_flop(grad_shape, a_shape, gates_shape, order_shape, load_shape, experts_shape, *args, **kwargs) -> int:
    """Input and weight gradient: twice the forward pass."""
    return 2 * sum_flop(a_shape, gates_shape, order_shape, load_shape, experts_shape)
