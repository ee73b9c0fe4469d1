"""SwitchHead output projection: y[n] = sum over h and j of scores[n, h, j] * a[n, h] W_O[h, index[n, h, j]]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.cpu.grouped_passes import (
    HeadWeights,
    NarrowRows,
    WeightGradient,
    WideRows,
    WideSum,
    add_up,
    combine,
    compute_gates,
    over_heads,
    score_gradient,
)
from model.kernels.cpu.grouping import (
    Grouping,
    Strategy,
    compute_dtype,
    dense_gates,
    fake_grouping,
    group_tokens,
    no_grouping,
    resolve_strategy,
    triton_strategy,
)
from model.kernels.cpu.workers import scratch


def switchhead_output(a: Tensor, scores: Tensor, index: Tensor, experts: Tensor, backend: str = "cpu") -> Tensor:
    """Sum over heads of a mixture of output experts (SwitchHead, arXiv 2312.07987, section 2.2).

    `a` [N, H, h]: attention's result per head; `scores` [N, H, k] fp32, sigmoid of the chosen logits; `index` [N, H, k]
    int64, distinct along k; `experts` [H, E, h, d]. Returns [N, d] in the dtype of `a`. Gradients: a, scores, experts.
    """
    return torch.ops.switchall.switchhead_output(a, scores, index, experts, backend)[0]


def reference(a: Tensor, scores: Tensor, index: Tensor, experts: Tensor) -> Tensor:
    """The equation as a masked einsum over all experts."""
    gates = dense_gates(scores, index, experts.shape[1]).to(a.dtype)
    return torch.einsum("nkeh,kehd->nd", torch.einsum("nke,nkh->nkeh", gates, a), experts).contiguous()


def reference_backward(
    grad: Tensor, a: Tensor, scores: Tensor, index: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference` by the chain rule: autograd is off inside a custom op."""
    gates = dense_gates(scores, index, experts.shape[1]).to(a.dtype)
    products = torch.einsum("nd,kehd->nkeh", grad, experts)
    grad_gates = torch.einsum("nkeh,nkh->nke", products, a)
    grad_experts = torch.einsum("nkeh,nd->kehd", torch.einsum("nke,nkh->nkeh", gates, a), grad)
    grad_a = torch.einsum("nkeh,nke->nkh", products, gates)
    return grad_a.contiguous(), grad_gates.to(scores.dtype).gather(2, index), grad_experts.contiguous()


def forward_cpu(
    a: Tensor, scores: Tensor, index: Tensor, experts: Tensor, strategy: Strategy
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [N, d], token, place and ends of the grouping)."""
    H, E, _, d = experts.shape
    dtype = compute_dtype(a.dtype)
    grouping = group_tokens(index, E, strategy)
    gates = compute_gates(scores, grouping, dtype)

    totals = WideSum.parts(grouping, d, dtype)

    def project(part: int, heads: range) -> None:
        narrow, total = NarrowRows(a, grouping, gates), WideSum(grouping, totals[part], heads)
        for head in heads:
            _, gated = narrow.read(head)
            weights = HeadWeights(experts[head], dtype)
            targets, factors = grouping.split(head, total.rows(head)), grouping.split(head, gated)
            for group, target, factor in zip(grouping.groups[head], targets, factors, strict=True):
                total.add(head, group, target, factor, weights.join(group.experts))

    over_heads(project, H, len(a))
    return add_up(grouping, totals).to(a.dtype), *grouping.saved


def backward_cpu(
    grad: Tensor, a: Tensor, scores: Tensor, experts: Tensor, grouping: Grouping
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, scores and experts. One gather of `grad` serves both wide products."""
    H, h = experts.shape[0], experts.shape[2]
    dtype = compute_dtype(a.dtype)
    gates = compute_gates(scores, grouping, dtype)
    products = scratch("products", (*gates.shape, h), dtype)  # grad W_O^T
    grad_gates, grad_experts = torch.empty_like(gates), torch.empty_like(experts)

    def project(part: int, heads: range) -> None:
        wide, narrow = WideRows(grad, grouping), NarrowRows(a, grouping, gates)
        for head in heads:
            rows, gated = narrow.read(head)
            weights = HeadWeights(experts[head], dtype)
            gradient = WeightGradient(grad_experts[head], dtype)
            rows_of = (grouping.token[head], gated, products[head].flatten(1))
            parts = zip(grouping.groups[head], *(grouping.split(head, t) for t in rows_of), strict=True)
            for group, token, factor, result in parts:
                block = wide.read(group, token)
                torch.mm(block, weights.join(group.experts).t(), out=result)
                gradient.add(group, factor, block)
            score_gradient(products[head], rows, grad_gates[head])
            gradient.finish()

    over_heads(project, H, len(a))
    grad_scores = grad_gates.flatten()[grouping.place].to(scores.dtype)
    return combine(products, grouping, scores, a.dtype), grad_scores, grad_experts


@torch.library.custom_op("switchall::switchhead_output", mutates_args=())
def _forward(
    a: Tensor, scores: Tensor, index: Tensor, experts: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y, and for backward `Grouping.saved`, empty where `backend` is the reference. Backend triton returns the order
    of slots for the token, and the load of experts for the ends."""
    if backend == "reference":
        return reference(a, scores, index, experts), *no_grouping(index)
    if on_gpu := triton_strategy(backend, index.shape[2], experts.shape[1]):
        from model.kernels.triton.switchhead_output import forward_triton

        y, order, load = forward_triton(a, scores, index, experts, on_gpu)
        return y, order, index.new_empty(0), load
    return forward_cpu(a, scores, index, experts.contiguous(), resolve_strategy(backend, index.shape, experts.shape[1]))


@torch.library.custom_op("switchall::switchhead_output_backward", mutates_args=())
def _backward(
    grad: Tensor,
    a: Tensor,
    scores: Tensor,
    index: Tensor,
    experts: Tensor,
    token: Tensor,
    place: Tensor,
    ends: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return reference_backward(grad, a, scores, index, experts)
    if on_gpu := triton_strategy(backend, index.shape[2], experts.shape[1]):
        from model.kernels.triton.switchhead_output import backward_triton

        return backward_triton(grad, a, scores, index, experts, (token, ends), on_gpu)
    strategy = resolve_strategy(backend, index.shape, experts.shape[1])
    grouping = Grouping.restore((token, place, ends), experts.shape[1], strategy)
    return backward_cpu(grad, a, scores, experts.contiguous(), grouping)


@_forward.register_fake
def _(a: Tensor, scores: Tensor, index: Tensor, experts: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape[0], experts.shape[3]), *fake_grouping(index, experts.shape[1], backend)


@_backward.register_fake
def _(
    grad: Tensor, a: Tensor, scores: Tensor, index: Tensor, experts: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), scores.new_empty(scores.shape), experts.new_empty(experts.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    backward = torch.ops.switchall.switchhead_output_backward
    grad_a, grad_scores, grad_experts = backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_a, grad_scores, None, grad_experts, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchall.switchhead_output)
def _forward_flops(a: Any, scores: Any, index: Any, experts: Any, *args: Any, **kwargs: Any) -> int:
    """Useful flops: k experts per token and head, whatever the strategy computes."""
    return 2 * math.prod(index) * math.prod(experts[2:])


@register_flop_formula(torch.ops.switchall.switchhead_output_backward)
def _backward_flops(grad: Any, a: Any, scores: Any, index: Any, experts: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(index) * math.prod(experts[2:])
