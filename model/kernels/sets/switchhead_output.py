"""switchhead_output, tokens grouped by the set of their chosen experts.

    forward     gated = gated spread of a                   y = sum over heads of gated W_O, of the set's experts
    backward    products = grad W_O^T                       grad_a = gated sum of products, grad_scores = <a, products>
                gated again                                 grad_W = gated^T grad

Shape legend as in model/kernels/sets/groups.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.dense.gemms import rows_module
from model.kernels.ops.switchhead import Inputs
from model.kernels.sets.groups import (
    Groups,
    grouped,
    in_order_of_choices,
    multiply,
    multiply_transposed,
    positions,
    stacked,
    unstacked,
)


def forward(inputs: Inputs) -> tuple[Tensor]:
    """-> y [N, d]; nothing is kept."""
    a, choice, experts, _ = inputs
    groups, k = grouped(inputs), choice.index.shape[2]
    gated = _gated(inputs, groups)
    y = a.new_zeros(a.shape[0], experts.shape[3], dtype=torch.float32)
    for head, of_head in enumerate(experts):
        rows = gated[groups.order[head], head].flatten(1)
        products = multiply(rows, stacked(of_head, k, by_column=False), groups.ends[head])
        y += products[groups.place[head]]
    return (y.to(a.dtype),)


def backward(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, scores and experts."""
    a, choice, experts, strategy = inputs
    groups, grad, a = grouped(inputs), grad.contiguous(), a.contiguous()
    (N, H, k), h = choice.index.shape, a.shape[2]
    gated, products = _gated(inputs, groups), a.new_empty(N, H, k, h)
    grad_experts = torch.empty_like(experts, memory_format=torch.contiguous_format)
    for head, of_head in enumerate(experts):
        order, ends = groups.order[head], groups.ends[head]
        rows, weight = grad[order], stacked(of_head, k, by_column=False)
        found = multiply(rows, weight.transpose(1, 2), ends)
        products[:, head] = found[groups.place[head]].view(N, k, h)
        of_sets = multiply_transposed(gated[order, head].flatten(1), rows, ends)
        grad_experts[head] = unstacked(of_sets, experts.shape[1], k, by_column=False)
    grad_a = torch.empty_like(a)
    grad_scores = torch.empty_like(groups.scores, memory_format=torch.contiguous_format)
    of_pairs = products.view(N * H, k, h), groups.scores.flatten(0, 1), positions(groups), grad_a.view(N * H, h)
    rows_module(strategy).gated_sum(*of_pairs, dot=(a.view(N * H, h), grad_scores.view(N * H, k)))
    return grad_a, in_order_of_choices(grad_scores, groups), grad_experts


def _gated(inputs: Inputs, groups: Groups) -> Tensor:
    """[N, H, k, h]: each row of a at the experts of its set."""
    a, choice, _, strategy = inputs
    (N, H, k), h = choice.index.shape, a.shape[2]
    gated = a.new_empty(N, H, k, h)
    of_pairs = a.contiguous().view(N * H, h), groups.scores.flatten(0, 1), positions(groups), gated.view(N * H, k, h)
    rows_module(strategy).gated_spread(*of_pairs)
    return gated
