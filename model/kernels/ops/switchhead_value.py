"""SwitchHead value projection: v[n, h] = sum over j of scores[n, h, j] * x[n] W_V[h, index[n, h, j]]."""

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


def switchhead_value(x: Tensor, scores: Tensor, index: Tensor, experts: Tensor, backend: str = "cpu") -> Tensor:
    """Per-head mixture of value experts (SwitchHead, arXiv 2312.07987, section 2.2).

    `x` [N, d]; `scores` [N, H, k] fp32, sigmoid of the chosen logits; `index` [N, H, k] int64, distinct along k;
    `experts` [H, E, d, h]. Returns [N, H, h] in the dtype of `x`. Gradients: x, scores, experts.
    """
    return torch.ops.switchall.switchhead_value(x, scores, index, experts, backend)[0]


def reference(x: Tensor, scores: Tensor, index: Tensor, experts: Tensor) -> Tensor:
    """The equation as a masked einsum over all experts."""
    gates = dense_gates(scores, index, experts.shape[1]).to(x.dtype)
    return torch.einsum("nkeh,nke->nkh", torch.einsum("nd,kedh->nkeh", x, experts), gates).contiguous()


def reference_backward(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference` by the chain rule: autograd is off inside a custom op."""
    gates = dense_gates(scores, index, experts.shape[1]).to(x.dtype)
    grad_gates = torch.einsum("nkeh,nkh->nke", torch.einsum("nd,kedh->nkeh", x, experts), grad)
    gated = torch.einsum("nke,nkh->nkeh", gates, grad)
    grad_x, grad_experts = torch.einsum("nkeh,kedh->nd", gated, experts), torch.einsum("nd,nkeh->kedh", x, gated)
    return grad_x.contiguous(), grad_gates.to(scores.dtype).gather(2, index), grad_experts.contiguous()


def forward_cpu(
    x: Tensor, scores: Tensor, index: Tensor, experts: Tensor, strategy: Strategy
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(v [N, H, h], products x W_V of every row and member [H R W, h], token, place and ends of the grouping)."""
    H, E, _, h = experts.shape
    dtype = compute_dtype(x.dtype)
    grouping = group_tokens(index, E, strategy)
    shape = (H, grouping.num_rows, grouping.num_members, h)
    products = x.new_empty(shape) if x.dtype == dtype else scratch("products", shape, dtype)

    def project(part: int, heads: range) -> None:
        wide = WideRows(x, grouping)
        for head in heads:
            weights = experts[head].to(dtype).unbind()
            tokens, results = (grouping.split(head, t[head]) for t in (grouping.token, products))
            for group, token, result in zip(grouping.groups[head], tokens, results, strict=True):
                rows = wide.read(group, token)
                # Joined weights do not pay here: 9.6 against 8.2 ms a head.
                for expert, member in zip(group.experts, result.unbind(1), strict=True):
                    torch.mm(rows, weights[expert], out=member)

    over_heads(project, H, len(x))
    v = combine(products, grouping, scores, x.dtype)
    return v, products.view(-1, h).to(x.dtype), *grouping.saved


def backward_cpu(
    grad: Tensor, x: Tensor, scores: Tensor, experts: Tensor, products: Tensor, grouping: Grouping
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scores and experts; `products` and `grouping` are of `forward_cpu`."""
    H, d, h = experts.shape[0], experts.shape[2], experts.shape[3]
    dtype = compute_dtype(x.dtype)
    gates = compute_gates(scores, grouping, dtype)
    products = products.view(*gates.shape, h)
    grad_gates, grad_experts = torch.empty_like(gates), torch.empty_like(experts)

    totals = WideSum.parts(grouping, d, dtype)

    def project(part: int, heads: range) -> None:
        wide, narrow = WideRows(x, grouping), NarrowRows(grad, grouping, gates)
        total = WideSum(grouping, totals[part], heads)
        for head in heads:
            rows, gated = narrow.read(head)
            score_gradient(products[head].to(dtype), rows, grad_gates[head])
            weights = HeadWeights(experts[head].transpose(1, 2), dtype)
            gradient = WeightGradient(grad_experts[head].transpose(1, 2), dtype)
            rows_of = (grouping.token[head], total.rows(head), gated)
            parts = zip(grouping.groups[head], *(grouping.split(head, t) for t in rows_of), strict=True)
            for group, token, target, factor in parts:
                total.add(head, group, target, factor, weights.join(group.experts))
                gradient.add(group, factor, wide.read(group, token))
            gradient.finish()

    over_heads(project, H, len(x))
    grad_scores = grad_gates.flatten()[grouping.place].to(scores.dtype)
    return add_up(grouping, totals).to(x.dtype), grad_scores, grad_experts


@torch.library.custom_op("switchall::switchhead_value", mutates_args=())
def _forward(
    x: Tensor, scores: Tensor, index: Tensor, experts: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> v, and for backward: the products and `Grouping.saved`, empty where `backend` is the reference. Backend triton
    returns the order of slots for the token, and the load of experts for the ends."""
    if backend == "reference":
        return reference(x, scores, index, experts), x.new_empty(0, experts.shape[3]), *no_grouping(index)
    if on_gpu := triton_strategy(backend, index.shape[2], experts.shape[1]):
        from model.kernels.triton.switchhead_value import forward_triton

        v, products, order, load = forward_triton(x, scores, index, experts, on_gpu)
        return v, products, order, index.new_empty(0), load
    strategy = resolve_strategy(backend, index.shape, experts.shape[1])
    return forward_cpu(x, scores, index, experts.contiguous(), strategy)


@torch.library.custom_op("switchall::switchhead_value_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    index: Tensor,
    experts: Tensor,
    products: Tensor,
    token: Tensor,
    place: Tensor,
    ends: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return reference_backward(grad, x, scores, index, experts)
    if on_gpu := triton_strategy(backend, index.shape[2], experts.shape[1]):
        from model.kernels.triton.switchhead_value import backward_triton

        return backward_triton(grad, x, scores, index, experts, (products, token, ends), on_gpu)
    strategy = resolve_strategy(backend, index.shape, experts.shape[1])
    grouping = Grouping.restore((token, place, ends), experts.shape[1], strategy)
    return backward_cpu(grad, x, scores, experts.contiguous(), products, grouping)


@_forward.register_fake
def _(
    x: Tensor, scores: Tensor, index: Tensor, experts: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, H, k), (E, h) = index.shape, experts.shape[1::2]
    if on_gpu := triton_strategy(backend, k, E):
        per_token = k if on_gpu == "sorted" else 0
    elif backend == "reference":
        per_token = 0
    else:
        per_token = E if resolve_strategy(backend, index.shape, E) == "all" else k
    return x.new_empty(N, H, h), x.new_empty(N * H * per_token, h), *fake_grouping(index, E, backend)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, scores: Tensor, index: Tensor, experts: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scores.new_empty(scores.shape), experts.new_empty(experts.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    backward = torch.ops.switchall.switchhead_value_backward
    grad_x, grad_scores, grad_experts = backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_scores, None, grad_experts, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchall.switchhead_value)
def _forward_flops(x: Any, scores: Any, index: Any, experts: Any, *args: Any, **kwargs: Any) -> int:
    """Useful flops: k experts per token and head, whatever the strategy computes."""
    return 2 * math.prod(index) * math.prod(experts[2:])


@register_flop_formula(torch.ops.switchall.switchhead_value_backward)
def _backward_flops(grad: Any, x: Any, scores: Any, index: Any, experts: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(index) * math.prod(experts[2:])
