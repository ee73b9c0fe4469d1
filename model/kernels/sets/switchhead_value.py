"""switchhead_value, tokens grouped by the set of their chosen experts.

    forward     products = x W_V of the set's experts       v = gated sum of products, which are kept
    backward    gated = gated spread of grad                grad_x = gated W_V^T, grad_W = x^T gated,
                                                            grad_scores = <grad, kept>

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

Kept = tuple[Groups, Tensor]
"""The groups, and the gated gradient [N, H, k, h]."""


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> v [N, H, h], and the products of the choices [N H k, h], in the order of the sets' experts."""
    x, choice, experts, strategy = inputs
    groups = grouped(inputs)
    (N, H, k), h = choice.index.shape, experts.shape[3]
    products = x.new_empty(N, H, k, h)
    for head in range(H):
        weight = stacked(experts[head], k, by_column=True)
        found = multiply(x[groups.order[head]], weight, groups.ends[head])
        products[:, head] = found[groups.place[head]].view(N, k, h)
    v = x.new_empty(N, H, h)
    of_pairs = products.view(N * H, k, h), groups.scores.flatten(0, 1), positions(groups), v.view(N * H, h)
    rows_module(strategy).gated_sum(*of_pairs)
    return v, products.view(N * H * k, h)


def backward(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scores and experts; `saved` is what `forward` gives after v."""
    grad_x, grad_scores, kept = input_gradients(grad, inputs, saved)
    return grad_x, grad_scores, expert_gradient(grad, inputs, saved, kept)


def input_gradients(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Kept]:
    """Gradients of x and scores, and what `expert_gradient` needs."""
    x, choice, experts, strategy = inputs
    groups, grad = grouped(inputs), grad.contiguous()
    (N, H, k), h = choice.index.shape, experts.shape[3]
    gated, grad_scores = x.new_empty(N, H, k, h), torch.empty_like(groups.scores, memory_format=torch.contiguous_format)
    dot = saved[0].view(N * H, k, h), grad_scores.view(N * H, k)
    of_pairs = grad.view(N * H, h), groups.scores.flatten(0, 1), positions(groups), gated.view(N * H, k, h)
    rows_module(strategy).gated_spread(*of_pairs, dot=dot)
    grad_x = x.new_zeros(x.shape, dtype=torch.float32)
    for head in range(H):
        weight = stacked(experts[head], k, by_column=True)
        rows = gated[groups.order[head], head].flatten(1)
        grad_x += multiply(rows, weight.transpose(1, 2), groups.ends[head])[groups.place[head]]
    return grad_x.to(x.dtype), in_order_of_choices(grad_scores, groups), (groups, gated)


def expert_gradient(grad: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], kept: Kept) -> Tensor:
    """Gradient of the experts."""
    x, choice, experts, _ = inputs
    (groups, gated), k = kept, choice.index.shape[2]
    found = torch.empty_like(experts, memory_format=torch.contiguous_format)
    for head, order in enumerate(groups.order):
        of_sets = multiply_transposed(x[order], gated[order, head].flatten(1), groups.ends[head])
        found[head] = unstacked(of_sets, experts.shape[1], k, by_column=True)
    return found
