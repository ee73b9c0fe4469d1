"""How SwitchHead's projections group tokens on CPU: by expert, by set of experts, or not at all.

Shape legend: N tokens, d d_model, H heads, h head_dim, E experts of a head, k chosen experts, R rows of a head after
grouping, W members: experts that every row of a group goes through.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal, cast, get_args

import numpy
import torch
from torch import Tensor

Strategy = Literal["all", "sets", "experts"]
TritonStrategy = Literal["gated", "sorted"]

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

    strategy: Strategy
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
    def restore(cls, saved: tuple[Tensor, Tensor, Tensor], num_experts: int, strategy: Strategy) -> Grouping:
        """From `saved` of the forward pass: backward neither sorts nor counts again (1 ms an op)."""
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


def choose_strategy(num_tokens: int, num_experts: int, k: int) -> Strategy:
    """By the shape alone, so that every rank and every repetition takes the same path.

    Useful GFLOP/s, forward + backward of value and output op, fp32, one thread, median of 7 (torch.mm 125-151):

        N     d     H  h    E  k    all   sets  experts
        2048  1024  4  112  4  2     46     93     88
        8192  1024  4  112  4  2            83     69
        2048  1024  4  112  5  3     61     95     89
        2048   412  2   76  5  3            75     72
        2048   412  2   76  5  2     30     46     47
        2048  1024  2  132  8  4     59     54     90    sets of 29 rows
        8192  1024  2  132  8  4     53     83     86    sets of 117 rows
         512  1024  4  112  4  2     55     79     87    sets of 85 rows
         256  1024  4  112  4  2     49     56     83    sets of 43 rows
        2048   512  2   64 32  4     13            68
    """
    if 8 * k > 7 * num_experts:
        return "all"
    return "sets" if num_tokens >= 128 * math.comb(num_experts, k) else "experts"


def resolve_strategy(backend: str, index_shape: Sequence[int], num_experts: int) -> Strategy:
    """Strategy of backend `cpu`; tests and benchmarks force one with `cpu:all`, `cpu:sets` or `cpu:experts`."""
    name, _, forced = backend.partition(":")
    if name != "cpu" or forced not in ("", *get_args(Strategy)):
        raise ValueError(f"kernel backend {backend!r} has no SwitchHead projections; use reference, cpu or triton")
    return cast(Strategy, forced) if forced else choose_strategy(index_shape[0], num_experts, index_shape[2])


def triton_strategy(backend: str, k: int, num_experts: int) -> TritonStrategy | None:
    """Strategy of backend `triton`, None of another one; `triton:gated` and `triton:sorted` force one.

    gated   one GEMM over all experts, rows scaled by their gate or 0: E / k times the flops, and no slot's row exists.
    sorted  (token, choice) pairs sorted by expert: useful flops only, but wide slot rows are written and summed.

    At k / E = 1/2 gated is ahead of any sorted kernel that sums in a second pass (arithmetic: docs/kernels.md).
    """
    name, _, forced = backend.partition(":")
    if name != "triton":
        return None
    if forced not in ("", *get_args(TritonStrategy)):
        raise ValueError(f"kernel backend {backend!r}: triton has the strategies {', '.join(get_args(TritonStrategy))}")
    return cast(TritonStrategy, forced) if forced else ("gated" if 2 * k >= num_experts else "sorted")


def dense_gates(scores: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """[N, H, E]: the score of a chosen expert, else 0."""
    return scores.new_zeros(*scores.shape[:2], num_experts).scatter_add(2, index, scores)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 is multiplied in fp32: without AMX oneDNN's bf16 GEMM reaches 80 GFLOP/s a core and MKL's fp32 GEMM 130."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def member_sets(num_experts: int, k: int, strategy: Strategy) -> list[tuple[int, ...]]:
    """The members of every group, in the order of the rows."""
    if strategy == "all":
        return [tuple(range(num_experts))]
    if strategy == "experts":
        return [(e,) for e in range(num_experts)]
    return sorted(itertools.combinations(range(num_experts), k), key=lambda members: members[::-1])


def fake_grouping(index: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the shapes of `Grouping.saved`."""
    if backend == "reference":
        return no_grouping(index)
    N, H, k = index.shape
    if on_gpu := triton_strategy(backend, k, num_experts):
        slots, experts = (N * k, num_experts) if on_gpu == "sorted" else (0, 0)
        order, load = (index.new_empty(H, size, dtype=torch.int32) for size in (slots, experts))
        return order, index.new_empty(0), load
    strategy = resolve_strategy(backend, index.shape, num_experts)
    num_rows, num_sets = {
        "all": (N, 1),
        "sets": (N, math.comb(num_experts, k)),
        "experts": (N * k, num_experts),
    }[strategy]
    return index.new_empty(H, num_rows), index.new_empty(N, H, k), index.new_empty(H, num_sets)


def no_grouping(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What an op returns for `Grouping.saved` where the backend groups nothing."""
    return index.new_empty(0), index.new_empty(0), index.new_empty(0)


def group_tokens(index: Tensor, num_experts: int, strategy: Strategy) -> Grouping:
    """Groups `index` [N, H, k] int64 (distinct experts per token and head). One small host copy: the group sizes."""
    N, H, k = index.shape
    head = torch.arange(H, device=index.device)
    if strategy == "all":
        token = torch.arange(N, device=index.device)
        place = (head[:, None] * N + token[:, None, None]) * num_experts + index
        saved = token.repeat(H, 1), place, index.new_full((H, 1), N)
    elif strategy == "experts":
        order, row, ends = _sort_rows(index.transpose(0, 1).reshape(H, N * k), num_experts)
        place = (head[:, None] * (N * k) + row).view(H, N, k).transpose(0, 1).contiguous()
        saved = order // k, place, ends
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
    """How many of the k `choices` [k, ...] are less than each, distinct ones. 8192 times 2 take 0.05 ms, sorted 0.4."""
    ranks = torch.zeros_like(choices)
    for i, j in itertools.combinations(range(len(choices)), 2):
        less = choices[i] < choices[j]
        ranks[j] += less
        ranks[i] += ~less
    return ranks


def _sort_rows(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort of `keys` [H, R] in 0..num_keys: order [H, R], its inverse [H, R], each key's end [H, num_keys]."""
    # As in model/kernels/ops/route.py: numpy sorts keys of 16 bits by counting.
    narrow = keys.to(torch.int16 if num_keys <= 1 << 15 else torch.int64).contiguous()
    order = torch.from_numpy(numpy.argsort(narrow.numpy(), axis=-1, kind="stable"))
    position = torch.arange(order.shape[1], device=keys.device)
    inverse = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
    offset = torch.arange(len(keys), device=keys.device)[:, None] * num_keys
    counts = torch.bincount((keys + offset).flatten(), minlength=len(keys) * num_keys)
    return order, inverse, counts.view(len(keys), num_keys).cumsum(1)


def _blocks(start: int, stop: int, experts: tuple[int, ...]) -> list[Group]:
    """The rows start:stop in equal parts of at most MAX_GROUP_ROWS."""
    parts = -(-(stop - start) // MAX_GROUP_ROWS)
    edges = [start + (stop - start) * i // max(parts, 1) for i in range(parts + 1)]
    return [Group(a, b, experts) for a, b in itertools.pairwise(edges)]
