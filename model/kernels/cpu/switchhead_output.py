"""switchhead_output on CPU: gated rows go through the joined experts of their group and are summed over heads.

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


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y [N, d] and `Grouping.saved`."""
    a, choice, experts, strategy = inputs
    experts, scores = experts.contiguous(), choice.scores
    H, E, _, d = experts.shape
    dtype = cpu_gemm_dtype(a.dtype, accumulates=True)
    grouping = group_tokens(choice, E, strategy)
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


def backward(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, scores and experts; `saved` is what `forward` gives after y.

    One gather of `grad` serves both wide products."""
    (a, choice, experts, strategy), (token, place, ends) = inputs, saved
    experts, scores = experts.contiguous(), choice.scores
    grouping = Grouping.restore((token, place, ends), experts.shape[1], strategy)
    H, h = experts.shape[0], experts.shape[2]
    dtype = cpu_gemm_dtype(a.dtype, accumulates=True)
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
