"""How SwitchHead's projections group tokens on CPU: by expert, by set of experts, or not at all.

Shape legend: N tokens, d d_model, H heads, h head_dim, E experts of a head, k chosen experts, R rows of a head after
grouping, W members: experts that every row of a group goes through.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels.ops.route import Choice

MAX_GROUP_ROWS = 512
"""Longer groups are split: a [512, 1024] fp32 block is 2 MB, the second-level cache of one core."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows start:stop of a head, all of which go through `experts`, member by member."""

    start: int
    stop: int
    experts: tuple[int, ...]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Rows of every head in groups that share their experts.

    all      R = N, W = E: every token through every expert, gate 0 where not chosen; no gather, E / k times the flops.
    sets     R = N, W = k: tokens sorted by their set of chosen experts, C(E, k) groups.
    experts  R = N k, W = 1: (token, choice) pairs sorted by expert, E groups; wide rows move k times.
    """

    strategy: str
    num_tokens: int
    num_members: int
    token: Tensor
    """[H, R] int64: token of each row."""
    place: Tensor
    """[N, H, k] int64: where a choice is in a flattened [H, R, W]."""
    ends: Tensor
    """[H, S] int64: the row after the last of each set, expert or, for `all`, head."""
    groups: list[list[Group]]
    """Per head, in row order."""

    @classmethod
    def restore(cls, saved: tuple[Tensor, Tensor, Tensor], num_experts: int, strategy: str) -> Grouping:
        """From `saved` of the forward pass, so that the backward pass neither sorts nor counts again."""
        token, place, ends = saved
        N, k = place.shape[0], place.shape[2]
        sets = member_sets(num_experts, k, strategy)
        groups = []
        for edges in ends.tolist():
            spans = zip([0, *edges[:-1]], edges, sets, strict=True)
            groups.append([block for start, stop, members in spans for block in _blocks(start, stop, members)])
        return cls(strategy, N, len(sets[0]), token, place, ends, groups)

    @property
    def saved(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that `restore` takes: outputs of the forward op."""
        return self.token, self.place, self.ends

    @property
    def num_rows(self) -> int:
        return self.token.shape[1]

    def split(self, head: int, rows: Tensor) -> Sequence[Tensor]:
        """`rows` [R, ...] of a head, group by group; one call, because every view a worker takes costs it the GIL."""
        return rows.split([len(group) for group in self.groups[head]])

    @property
    def longest(self) -> int:
        """Rows of the largest group."""
        return max((len(group) for groups in self.groups for group in groups), default=0)


def member_sets(num_experts: int, k: int, strategy: str) -> list[tuple[int, ...]]:
    """The members of every group, in the order of the rows."""
    if strategy == "all":
        return [tuple(range(num_experts))]
    if strategy == "experts":
        return [(e,) for e in range(num_experts)]
    return sorted(itertools.combinations(range(num_experts), k), key=lambda members: members[::-1])


def saved_shapes(num_tokens: int, num_heads: int, num_experts: int, k: int, strategy: str) -> list[tuple[int, ...]]:
    num_rows, num_sets = {
        "all": (num_tokens, 1),
        "sets": (num_tokens, math.comb(num_experts, k)),
        "experts": (num_tokens * k, num_experts),
    }[strategy]
    return [(num_heads, num_rows), (num_tokens, num_heads, k), (num_heads, num_sets)]


def group_tokens(choice: Choice, num_experts: int, strategy: str) -> Grouping:
    """Groups the tokens of `choice`. One small host copy: the group sizes."""
    index = choice.index
    N, H, k = index.shape
    head = torch.arange(H, device=index.device)
    if strategy == "all":
        token = torch.arange(N, device=index.device)
        place = (head[:, None] * N + token[:, None, None]) * num_experts + index
        saved = token.repeat(H, 1), place, index.new_full((H, 1), N)
    elif strategy == "experts":
        place = (head[:, None] * (N * k) + _inverse(choice.order)).view(H, N, k).transpose(0, 1).contiguous()
        saved = choice.order // k, place, choice.load.cumsum(1)
    else:
        choices = index.permute(2, 1, 0).contiguous()  # [k, H, N]
        member = _ranks(choices)
        # Combinatorial number system: the set e_1 < ... < e_k is number C(e_1, 1) + ... + C(e_k, k) of C(E, k).
        table = torch.tensor([[math.comb(e, i + 1) for e in range(num_experts)] for i in range(k)], device=index.device)
        numbers = table.take(member * num_experts + choices).sum(0)
        token, row, ends = _sort_rows(numbers, math.comb(num_experts, k))
        place = (head[:, None] * N + row) * k + member
        saved = token, place.permute(2, 1, 0).contiguous(), ends
    return Grouping.restore(saved, num_experts, strategy)


def _ranks(choices: Tensor) -> Tensor:
    """For each of the k distinct `choices` [k, ...] the number of smaller ones; sorting takes ten times as long."""
    ranks = torch.zeros_like(choices)
    for i, j in itertools.combinations(range(len(choices)), 2):
        less = choices[i] < choices[j]
        ranks[j] += less
        ranks[i] += ~less
    return ranks


def _sort_rows(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort of `keys` [H, R] in 0..num_keys: order [H, R], its inverse [H, R], each key's end [H, num_keys]."""
    import numpy  # here: ops/switchhead.py imports this file where there may be no numpy

    # As in model/kernels/cpu/route.py: numpy sorts keys of 16 bits by counting.
    narrow = keys.to(torch.int16 if num_keys <= 1 << 15 else torch.int64).contiguous()
    order = torch.from_numpy(numpy.argsort(narrow.numpy(), axis=-1, kind="stable"))
    offset = torch.arange(len(keys), device=keys.device)[:, None] * num_keys
    counts = torch.bincount((keys + offset).flatten(), minlength=len(keys) * num_keys)
    return order, _inverse(order), counts.view(len(keys), num_keys).cumsum(1)


def _inverse(order: Tensor) -> Tensor:
    """[H, R]: the position of each row in `order` [H, R]."""
    position = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(order).scatter_(1, order, position.expand_as(order))


def _blocks(start: int, stop: int, experts: tuple[int, ...]) -> list[Group]:
    """The rows start:stop in equal parts of at most MAX_GROUP_ROWS."""
    parts = -(-(stop - start) // MAX_GROUP_ROWS)
    edges = [start + (stop - start) * i // max(parts, 1) for i in range(parts + 1)]
    return [Group(a, b, experts) for a, b in itertools.pairwise(edges)]
