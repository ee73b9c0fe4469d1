"""What SwitchHead's two projections share where tokens are grouped by the set of their chosen experts.

A head has C(E, k) sets of k of its E experts, 6 sets of 2 of 4. The tokens of a set need the same k experts, so they
are one GEMM, and the sets of a head are one grouped GEMM (F.grouped_mm): the useful flops and no others, where one GEMM
over all experts computes E / k times as many. What it costs: rows are put in the order of the sets, once for each head,
and the weights of a set, k experts side by side, are a copy of them.

Nothing waits for the device: the sizes of groups are a tensor. Every sum has a fixed order.

Shape legend: N tokens, d d_model, H heads, h head_dim, E experts of a head, k chosen experts, S = C(E, k) sets.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.backend import sets_limit
from model.kernels.ops.switchhead import Inputs


class Groups(NamedTuple):
    """The tokens of every head by the set of experts that they chose."""

    order: Tensor
    """[H, N] int64: the tokens, set by set."""
    place: Tensor
    """[H, N] int64: where each token stands in `order`."""
    ends: Tensor
    """[H, S] int32: the end of each set in `order`."""
    slots: Tensor
    """[N, H, k] int64: which choice stands first, second, ... in the set, whose experts rise."""
    scores: Tensor
    """[N, H, k]: of the choices in that order."""


@functools.cache
def members(num_experts: int, k: int) -> tuple[tuple[int, ...], ...]:
    """The sets in lexicographic order."""
    return tuple(itertools.combinations(range(num_experts), k))


def grouped(inputs: Inputs) -> Groups:
    """Raises ValueError where F.grouped_mm cannot multiply these shapes and dtypes, or there are too many sets."""
    scores, index = inputs.choice.scores, inputs.choice.index.contiguous()
    (N, H, k), E = index.shape, inputs.experts.shape[1]
    _check(inputs, k)
    experts, slots = index.sort(dim=-1)
    # Its number among the sets: the last one's, less the sets that begin like it and go on with a higher expert.
    number, after = experts.new_full((N, H), math.comb(E, k) - 1), experts.new_ones(E)
    for j in reversed(range(k)):
        after = after.cumsum(0) - after  # after[n] = C(n, k - j)
        number -= after.flip(0)[experts[..., j]]
    order = number.t().sort(dim=-1, stable=True).indices
    place = torch.empty_like(order).scatter_(1, order, torch.arange(N, device=index.device).expand(H, N))
    counts = number.new_zeros(H, math.comb(E, k)).scatter_add_(1, number.t(), torch.ones_like(number.t()))
    return Groups(order, place, counts.cumsum(1, dtype=torch.int32), slots, scores.gather(-1, slots))


def stacked(experts: Tensor, k: int, *, by_column: bool) -> Tensor:
    """The k experts of every set of one head, `experts` [E, rows, columns], side by side [S, rows, k columns], or one
    below the other [S, k rows, columns]."""
    E, rows, columns = experts.shape
    parts = [experts[e] for chosen in members(E, k) for e in chosen]  # no index tensor, which would come from the host
    if by_column:
        return torch.cat(parts, 1).view(rows, -1, k * columns).transpose(0, 1)
    return torch.cat(parts).view(-1, k * rows, columns)


def unstacked(of_sets: Tensor, num_experts: int, k: int, *, by_column: bool) -> Tensor:
    """The reverse of `stacked`, for gradients: the sum over the sets of each expert, fp32."""
    sets = members(num_experts, k)
    parts = of_sets.unflatten(2, (k, -1)).transpose(1, 2) if by_column else of_sets.unflatten(1, (k, -1))
    wanted = [[(s, chosen.index(e)) for s, chosen in enumerate(sets) if e in chosen] for e in range(num_experts)]
    return torch.stack([sum((parts[s, j].float() for s, j in pairs[1:]), parts[pairs[0]].float()) for pairs in wanted])


def multiply(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The rows of each set, [N, a] up to `ends` [S], by its matrix of `weights` [S, a, b] -> [N, b]."""
    if len(rows) == 0:  # F.grouped_mm refuses it
        return rows.new_empty(0, weights.shape[2])
    return F.grouped_mm(rows, weights, offs=ends)


def multiply_transposed(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left^T right of the rows of each set, [N, a] and [N, b] -> [S, a, b]."""
    if len(left) == 0:
        return left.new_zeros(len(ends), left.shape[1], right.shape[1])
    return F.grouped_mm(left.t(), right, offs=ends)


def in_order_of_choices(of_slots: Tensor, groups: Groups) -> Tensor:
    """[N, H, k] in the order of the sets' experts -> in the order of the choices."""
    return torch.empty_like(of_slots).scatter_(-1, groups.slots, of_slots)


def positions(groups: Groups) -> Tensor:
    """[N H, k]: 0, 1, ..., k - 1, which stands for the experts where only those of the set are there."""
    N, H, k = groups.slots.shape
    return torch.arange(k, device=groups.slots.device).expand(N * H, k).contiguous()


def _check(inputs: Inputs, k: int) -> None:
    rows, experts = inputs.rows, inputs.experts
    _, E, *sides = experts.shape
    d, h = sides if rows.dim() == 2 else sides[::-1]
    reason = sets_limit(rows.device.type, rows.dtype, (d, h, E, k))
    if rows.dtype != experts.dtype:
        reason = f"it multiplies rows by experts of the same dtype, not {rows.dtype} by {experts.dtype}"
    if reason is not None:
        raise ValueError(f"kernels.backend=sets cannot compute SwitchHead's projections: {reason}")
