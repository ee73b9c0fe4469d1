"""switchhead_value on CPU: rows of tokens, grouped by their experts, go through each expert of the group.

Shape legend as in model/kernels/cpu/grouping.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
from model.kernels.cpu.grouping import Grouping, group_tokens
from model.kernels.cpu.workers import scratch
from model.kernels.dtypes import cpu_gemm_dtype
from model.kernels.ops.switchhead import Inputs


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> v [N, H, h], products x W_V of every row and member [H R W, h], and `Grouping.saved`."""
    x, choice, experts, strategy = inputs
    experts, scores = experts.contiguous(), choice.scores
    H, E, _, h = experts.shape
    dtype = cpu_gemm_dtype(x.dtype, accumulates=True)
    grouping = group_tokens(choice, E, strategy)
    shape = (H, grouping.num_rows, grouping.num_members, h)
    products = x.new_empty(shape) if x.dtype == dtype else scratch("products", shape, dtype)

    def project(part: int, heads: range) -> None:
        wide = WideRows(x, grouping)
        for head in heads:
            weights = experts[head].to(dtype).unbind()
            tokens, results = (grouping.split(head, t[head]) for t in (grouping.token, products))
            for group, token, result in zip(grouping.groups[head], tokens, results, strict=True):
                rows = wide.read(group, token)
                # Joined weights do not pay here (measured).
                for expert, member in zip(group.experts, result.unbind(1), strict=True):
                    torch.mm(rows, weights[expert], out=member)

    over_heads(project, H, len(x))
    v = combine(products, grouping, scores, x.dtype)
    return v, products.view(-1, h).to(x.dtype), *grouping.saved


def backward(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scores and experts; `saved` is what `forward` gives after v."""
    (x, choice, experts, strategy), (products, token, place, ends) = inputs, saved
    experts, scores = experts.contiguous(), choice.scores
    grouping = Grouping.restore((token, place, ends), experts.shape[1], strategy)
    H, d, h = experts.shape[0], experts.shape[2], experts.shape[3]
    dtype = cpu_gemm_dtype(x.dtype, accumulates=True)
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


# `backward` in two parts: tensor-parallel ranks communicate between them (model/parallel/overlap.py).


def input_gradients(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and scores, and the gates of rows and members."""
    (x, choice, experts, strategy), (products, token, place, ends) = inputs, saved
    experts, scores = experts.contiguous(), choice.scores
    grouping = Grouping.restore((token, place, ends), experts.shape[1], strategy)
    H, d, h = experts.shape[0], experts.shape[2], experts.shape[3]
    dtype = cpu_gemm_dtype(x.dtype, accumulates=True)
    gates = compute_gates(scores, grouping, dtype)
    products = products.view(*gates.shape, h)
    grad_gates, totals = torch.empty_like(gates), WideSum.parts(grouping, d, dtype)

    def project(part: int, heads: range) -> None:
        narrow, total = NarrowRows(grad, grouping, gates), WideSum(grouping, totals[part], heads)
        for head in heads:
            rows, gated = narrow.read(head)
            score_gradient(products[head].to(dtype), rows, grad_gates[head])
            weights = HeadWeights(experts[head].transpose(1, 2), dtype)
            targets, factors = grouping.split(head, total.rows(head)), grouping.split(head, gated)
            for group, target, factor in zip(grouping.groups[head], targets, factors, strict=True):
                total.add(head, group, target, factor, weights.join(group.experts))

    over_heads(project, H, len(x))
    grad_scores = grad_gates.flatten()[grouping.place].to(scores.dtype)
    return add_up(grouping, totals).to(x.dtype), grad_scores, gates


def expert_gradient(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], gates: Tensor) -> Tensor:
    """Gradient of the experts; `gates` are those that `input_gradients` gave."""
    (x, _, experts, strategy), (_, token, place, ends) = inputs, saved
    grouping = Grouping.restore((token, place, ends), experts.shape[1], strategy)
    grad_experts = torch.empty_like(experts, memory_format=torch.contiguous_format)

    def project(part: int, heads: range) -> None:
        wide, narrow = WideRows(x, grouping), NarrowRows(grad, grouping, gates)
        for head in heads:
            _, gated = narrow.read(head)
            gradient = WeightGradient(grad_experts[head].transpose(1, 2), gates.dtype)
            tokens, factors = grouping.split(head, grouping.token[head]), grouping.split(head, gated)
            for group, token, factor in zip(grouping.groups[head], tokens, factors, strict=True):
                gradient.add(group, factor, wide.read(group, token))
            gradient.finish()

    over_heads(project, len(experts), len(x))
    return grad_experts
