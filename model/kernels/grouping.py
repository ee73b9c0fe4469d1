"""Grouped projections of SwitchHead's experts on CPU: how tokens are grouped, and the five passes both ops consist of.

The value op maps wide rows [N, d] to narrow ones [N, H, h] per head; the output op maps narrow rows to wide ones. The
backward of each is the forward of the other plus gradients of weights and scores, so both are built from the passes
below: `expert_products` (wide to narrow), `combine`, `score_gradient`, `gated_rows`, `sum_projected` (narrow to wide).

Shape legend: N tokens, d d_model, H heads, h head_dim, E experts of a head, k chosen experts, R rows of a head after
grouping, W members: experts that every row of a group goes through.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.workers import run_tasks, scratch

Strategy = Literal["all", "sets", "experts"]

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
    groups: list[list[Group]]
    """Per head, in row order."""

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
        raise ValueError(f"kernel backend {backend!r} has no SwitchHead projections; use reference or cpu")
    return cast(Strategy, forced) if forced else choose_strategy(index_shape[0], num_experts, index_shape[2])


def dense_gates(scores: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """[N, H, E]: the score of a chosen expert, else 0."""
    return scores.new_zeros(*scores.shape[:2], num_experts).scatter_add(2, index, scores)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 is multiplied in fp32: without AMX oneDNN's bf16 GEMM reaches 80 GFLOP/s a core and MKL's fp32 GEMM 130."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_tokens(index: Tensor, num_experts: int, strategy: Strategy) -> Grouping:
    """Groups `index` [N, H, k] int64 (distinct experts per token and head). One small host copy: the group sizes."""
    N, H, k = index.shape
    head = torch.arange(H, device=index.device)
    if strategy == "all":
        blocks = _blocks(0, N, tuple(range(num_experts)))
        token = torch.arange(N, device=index.device)
        place = (head[:, None] * N + token[:, None, None]) * num_experts + index
        return Grouping(strategy, N, num_experts, token.expand(H, N), place, [blocks] * H)
    if strategy == "experts":
        experts: list[tuple[int, ...]] = [(e,) for e in range(num_experts)]
        order, row, groups = _sort_rows(index.transpose(0, 1).reshape(H, N * k), experts)
        place = (head[:, None] * (N * k) + row).view(H, N, k).transpose(0, 1).contiguous()
        return Grouping(strategy, N, 1, order // k, place, groups)
    members, choice = index.sort(dim=-1)
    numbers, sets = _set_numbers(members, num_experts)
    token, row, groups = _sort_rows(numbers.t(), sets)
    # [N, H, k] with ascending members; scattered back to the order of the choices.
    by_member = (head * N + row.t())[:, :, None] * k + torch.arange(k, device=index.device)
    place = torch.empty_like(index).scatter_(2, choice, by_member)
    return Grouping(strategy, N, k, token, place, groups)


def _sort_rows(keys: Tensor, experts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, list[list[Group]]]:
    """Stable sort of `keys` [H, R]: order [H, R], its inverse [H, R], and the group of each key that occurs."""
    keys, order = keys.contiguous().sort(dim=1, stable=True)
    position = torch.arange(order.shape[1], device=keys.device)
    inverse = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
    numbers = torch.arange(len(experts), device=keys.device).repeat(len(keys), 1)
    groups = []
    for ends in torch.searchsorted(keys, numbers, right=True).tolist():
        spans = zip([0, *ends[:-1]], ends, experts, strict=True)
        groups.append([block for start, stop, members in spans for block in _blocks(start, stop, members)])
    return order, inverse, groups


def _blocks(start: int, stop: int, experts: tuple[int, ...]) -> list[Group]:
    """The rows start:stop in equal parts of at most MAX_GROUP_ROWS."""
    parts = -(-(stop - start) // MAX_GROUP_ROWS)
    edges = [start + (stop - start) * i // max(parts, 1) for i in range(parts + 1)]
    return [Group(a, b, experts) for a, b in itertools.pairwise(edges)]


def _set_numbers(members: Tensor, num_experts: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Number [N, H] of each ascending set `members` [N, H, k], and the sets in the order of their numbers.

    Combinatorial number system: the set e_1 < ... < e_k is number C(e_1, 1) + ... + C(e_k, k) of C(E, k).
    """
    k = members.shape[-1]
    table = torch.tensor([[math.comb(e, i + 1) for e in range(num_experts)] for i in range(k)], device=members.device)
    number = table[torch.arange(k, device=members.device), members].sum(-1)
    return number, sorted(itertools.combinations(range(num_experts), k), key=lambda members: members[::-1])


def compute_gates(scores: Tensor, grouping: Grouping, dtype: torch.dtype) -> Tensor:
    """Gate of every (row, member) [H, R, W]: `scores` [N, H, k] at their places, 0 where a member is not chosen."""
    shape = (scores.shape[1], grouping.num_rows, grouping.num_members)
    gates = scores.new_zeros(math.prod(shape), dtype=dtype)
    return gates.scatter_(0, grouping.place.flatten(), scores.to(dtype).flatten()).view(shape)


def combine(products: Tensor, grouping: Grouping, scores: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over choices of score times product: [H, R, W, h] and [N, H, k] -> [N, H, h] in `dtype`.

    One pass that gathers, scales and adds: embedding_bag with per-sample weights takes 2.0 ms for N = 2048, H = 4,
    k = 2, h = 112, where indexing, multiplying and summing apart take 9 ms (a 7 MB temporary each).
    """
    N, H, k = scores.shape
    h = products.shape[-1]
    if N == 0:
        return products.new_zeros(N, H, h, dtype=dtype)
    bags, weights = grouping.place.reshape(N * H, k), scores.to(products.dtype).reshape(N * H, k)
    return F.embedding_bag(bags, products.view(-1, h), mode="sum", per_sample_weights=weights).view(N, H, h).to(dtype)


def score_gradient(products: Tensor, rows: Tensor, result: Tensor) -> None:
    """`result` [R, W]: dot products of `products` [R, W, h] with `rows` [R, h], without a temporary."""
    torch.bmm(products, rows[:, :, None], out=result[:, :, None])


class WideRows:
    """Reads a wide matrix [N, d] group by group into one scratch block, in the compute dtype.

    The block stays in cache: gathering a whole head at once costs 4 ms more per 8 MB in page faults.
    """

    def __init__(self, source: Tensor, grouping: Grouping) -> None:
        self.source, self.grouping = source, grouping
        dtype = compute_dtype(source.dtype)
        shape = (grouping.longest, source.shape[1])
        self.gathered = scratch("gathered wide rows", shape, source.dtype)
        self.block = self.gathered if dtype == source.dtype else scratch("cast wide rows", shape, dtype)

    def read(self, group: Group, token: Tensor) -> Tensor:
        """[n, d], the rows of the group's tokens; valid until the next call."""
        if self.grouping.strategy == "all":
            rows = self.source[group.start : group.stop]
        else:
            rows = torch.index_select(self.source, 0, token, out=self.gathered[: len(group)])
        return rows if rows.dtype == self.block.dtype else self.block[: len(group)].copy_(rows)


class NarrowRows:
    """The rows of one head of a narrow tensor [N, H, h] in row order: plain [R, h], and times each gate [R, W h]."""

    def __init__(self, source: Tensor, grouping: Grouping, gates: Tensor) -> None:
        self.source, self.grouping, self.gates = source, grouping, gates
        self.gated = scratch("gated rows", (*gates.shape[1:], source.shape[-1]), gates.dtype)

    def read(self, head: int) -> tuple[Tensor, Tensor]:
        """([R, h], [R, W h]) in the compute dtype; the second is valid until the next call."""
        rows = self.source[:, head]
        if self.grouping.strategy != "all":
            rows = rows.index_select(0, self.grouping.token[head])
        rows = rows.to(self.gated.dtype)
        torch.mul(rows[:, None, :], self.gates[head][:, :, None], out=self.gated)
        return rows, self.gated.flatten(1)


class WideSum:
    """Sum over heads of gated rows times expert weights: [N, d] in the compute dtype.

    A group's product stays in cache and is added to its tokens' rows by index_add_: 0.7 ms a head more than the GEMMs
    alone, also on two threads (index_add_ runs on one, in row order, so it repeats bit by bit). Gathering the running
    sum into the next head's row order instead costs 1.4 ms a head on one thread and 0.7 on two, and 6 ms for a second
    buffer; a buffer per head 16 ms in page faults; scatter_add_ as much as index_add_ (N = 2048, d = 1024, fp32).
    Where a head's groups hold every token once, the first head writes instead of adding to zeros: 5 ms of zeroing less
    in one value backward.
    """

    def __init__(self, grouping: Grouping, total: Tensor) -> None:
        self.grouping, self.total = grouping, total
        self.first = grouping.strategy != "experts"
        if not self.first:
            total.zero_()
        if grouping.strategy != "all":
            self.block = scratch("wide products", (grouping.longest, total.shape[1]), total.dtype)

    @staticmethod
    def parts(grouping: Grouping, width: int, dtype: torch.dtype) -> list[Tensor]:
        """A total for each part of `over_heads`: the first is new, the others are scratch of the calling thread."""
        N, num_heads = grouping.num_tokens, len(grouping.groups)
        others = [scratch(f"wide sum {i}", (N, width), dtype) for i in range(1, num_parts(num_heads, N))]
        return [torch.empty(N, width, dtype=dtype, device=grouping.token.device), *others]

    def add(self, group: Group, token: Tensor, gated: Tensor, weights: Tensor) -> None:
        """Adds `gated` [n, W h] times `weights` [W h, d] to the rows of the group's tokens."""
        if self.grouping.strategy == "all":
            rows = self.total[group.start : group.stop]
            torch.addmm(rows, gated, weights, beta=0.0 if self.first else 1.0, out=rows)
            return
        product = torch.mm(gated, weights, out=self.block[: len(group)])
        if self.first:
            self.total.index_copy_(0, token, product)
        else:
            self.total.index_add_(0, token, product)

    def next_head(self) -> None:
        """Call after every head."""
        self.first = False


def add_up(parts: list[Tensor]) -> Tensor:
    """Sum in the order of the list, in its first tensor."""
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0]


class HeadWeights:
    """One head's expert matrices, side by side for a group's members: one GEMM per group instead of one per member.

    `experts` [E, h, d] stack along their rows to [W h, d], [E, d, h] (`columns`) along their columns to [d, W h]. The
    copy is 0.9 MB per set at d = 1024; with it, narrow-to-wide takes 8.4 instead of 9.0 ms a head and the weight
    gradient 9.9 instead of 11.4 ms (N = 2048, h = 112, E = 4, k = 2, one thread).
    """

    def __init__(self, experts: Tensor, *, columns: bool) -> None:
        self.experts, self.single, self.dim = experts, experts.unbind(), int(columns)
        self.joined: tuple[tuple[int, ...], Tensor] = ((), experts)

    def join(self, members: tuple[int, ...]) -> Tensor:
        """[W h, d], or [d, W h] by columns; a view where the members are neighbours in memory."""
        if self.joined[0] != members:  # groups of the same set follow each other
            if len(members) == 1:
                found = self.single[members[0]]
            elif self.dim == 0 and (span := neighbours(members)):
                found = self.experts[span].flatten(0, 1)
            else:
                shape = list(self.experts.shape[1:])
                shape[self.dim] *= len(members)
                found = scratch("joined experts", tuple(shape), self.experts.dtype)
                torch.cat([self.single[e] for e in members], self.dim, out=found)
            self.joined = members, found
        return self.joined[1]


def neighbours(members: tuple[int, ...]) -> slice | None:
    """The slice that `members` (ascending) form, if they are consecutive."""
    first, last = members[0], members[-1]
    return slice(first, last + 1) if last - first == len(members) - 1 else None


class WeightGradient:
    """Gradient of one head's experts, summed over groups in the compute dtype; layouts as in `HeadWeights`."""

    def __init__(self, result: Tensor, dtype: torch.dtype, *, columns: bool) -> None:
        self.result, self.dim = result, int(columns)
        self.sum = result if result.dtype == dtype else scratch("weight gradient", tuple(result.shape), dtype)
        self.single = self.sum.unbind()
        self.joined = result[:0, 0]
        self.written: set[int] = set()

    def add(self, group: Group, left: Tensor, right: Tensor) -> None:
        """Adds left times right, the group's joined members, to each member's gradient."""
        target = None
        if len(group.experts) == 1:
            target = self.single[group.experts[0]]
        elif self.dim == 0 and (span := neighbours(group.experts)):
            target = self.sum[span].flatten(0, 1)
        if target is not None:
            new = self.written.isdisjoint(group.experts)
            if not new:
                self._zero(group.experts)
            torch.addmm(target, left, right, beta=0.0 if new else 1.0, out=target)
            self.written.update(group.experts)
            return
        shape = (len(left), right.shape[1])
        if self.joined.shape != shape:
            self.joined = scratch("joined gradient", shape, left.dtype)
        torch.mm(left, right, out=self.joined)
        for expert, part in zip(group.experts, self.joined.chunk(len(group.experts), self.dim), strict=True):
            if expert in self.written:
                self.single[expert].add_(part)
            else:
                self.single[expert].copy_(part)
        self.written.update(group.experts)

    def _zero(self, experts: Iterable[int]) -> None:
        """Those that nothing was written to yet: fewer than zeroing all first, 1 ms an op at the benchmark's shape."""
        for expert in experts:
            if expert not in self.written:
                self.single[expert].zero_()
        self.written.update(experts)

    def finish(self) -> None:
        self._zero(range(len(self.single)))
        if self.sum is not self.result:
            self.result.copy_(self.sum)


def over_heads(body: Callable[[int, range], None], num_heads: int, num_tokens: int) -> None:
    """`body(part, heads)` for the parts that cover the heads: each on one thread where there is more than one.

    One fork and join per op. A GEMM of one group is 0.2 ms: spreading each of the hundreds of them over two threads
    costs a barrier each: next to busy processes the attention layer (bf16) took 4800 ms that way and 1380 this way.
    """
    parts = num_parts(num_heads, num_tokens)
    edges = [num_heads * i // parts for i in range(parts + 1)]
    ranges = [range(a, b) for a, b in itertools.pairwise(edges)]
    run_tasks([len(heads) for heads in ranges], lambda part: body(part, ranges[part]))


def num_parts(num_heads: int, num_tokens: int) -> int:
    """Parts that `over_heads` makes: a thread each, but one part where the work is not worth a thread's start."""
    return max(1, min(torch.get_num_threads(), num_heads)) if num_tokens >= 128 else 1
