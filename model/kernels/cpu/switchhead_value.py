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
    return _gradients(grad, inputs, saved, of_inputs=True, of_experts=True)


def input_gradients(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, None]:
    """Gradients of x and scores; nothing is kept for `expert_gradient`."""
    return *_gradients(grad, inputs, saved, of_inputs=True, of_experts=False)[:2], None


def expert_gradient(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], kept: None) -> Tensor:
    return _gradients(grad, inputs, saved, of_inputs=False, of_experts=True)[2]


def _gradients(
    grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], *, of_inputs: bool, of_experts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scores and experts; what was not asked for is not filled."""
    (x, choice, experts, strategy), (products, token, place, ends) = inputs, saved
    experts, scores = experts.contiguous(), choice.scores
    grouping = Grouping.restore((token, place, ends), experts.shape[1], strategy)
    H, d, h = experts.shape[0], experts.shape[2], experts.shape[3]
    dtype = cpu_gemm_dtype(x.dtype, accumulates=True)
    gates = compute_gates(scores, grouping, dtype)
    products = products.view(*gates.shape, h)
    grad_gates, grad_experts = torch.empty_like(gates), torch.empty_like(experts)
    totals = WideSum.parts(grouping, d if of_inputs else 0, dtype)

    def project(part: int, heads: range) -> None:
        wide, narrow = WideRows(x, grouping), NarrowRows(grad, grouping, gates)
        total = WideSum(grouping, totals[part], heads)
        for head in heads:
            rows, gated = narrow.read(head)
            groups, factors = grouping.groups[head], grouping.split(head, gated)
            if of_inputs:
                score_gradient(products[head].to(dtype), rows, grad_gates[head])
                weights = HeadWeights(experts[head].transpose(1, 2), dtype)
                for group, target, factor in zip(groups, grouping.split(head, total.rows(head)), factors, strict=True):
                    total.add(head, group, target, factor, weights.join(group.experts))
            if of_experts:
                gradient = WeightGradient(grad_experts[head].transpose(1, 2), dtype)
                for group, own, factor in zip(groups, grouping.split(head, grouping.token[head]), factors, strict=True):
                    gradient.add(group, factor, wide.read(group, own))
                gradient.finish()

    over_heads(project, H, len(x))
    if not of_inputs:
        return x.new_empty(0), scores.new_empty(0), grad_experts
    grad_scores = grad_gates.flatten()[grouping.place].to(scores.dtype)
    return add_up(grouping, totals).to(x.dtype), grad_scores, grad_experts
