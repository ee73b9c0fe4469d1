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

import numpy
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
        raise ValueError(f"kernel backend {backend!r} has no SwitchHead projections; use reference or cpu")
    return cast(Strategy, forced) if forced else choose_strategy(index_shape[0], num_experts, index_shape[2])


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
    # As in model/kernels/route.py: numpy sorts keys of 16 bits by counting.
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
    """Sum over the heads of one part of gated rows times expert weights, [N, d] in the compute dtype.

    A group's product stays in cache and is added to its tokens' rows by index_add_: 0.7 ms a head more than the GEMMs
    alone, also on two threads (index_add_ runs on one, in row order, so it repeats bit by bit). Gathering the running
    sum into the next head's row order instead costs 1.4 ms a head on one thread and 0.7 on two; a buffer per head 16 ms
    in page faults; scatter_add_ as much as index_add_ (N = 2048, d = 1024, fp32).
    Where a head's groups hold every token once, the sum keeps the row order of the part's first head, whose GEMMs then
    write to it and need no index_copy_ (as slow as two index_add_); `add_up` brings the rows of all parts back.
    """

    def __init__(self, grouping: Grouping, total: Tensor, heads: range) -> None:
        self.grouping, self.total, self.first = grouping, total, heads[0]
        if grouping.strategy == "experts":
            total.zero_()
        if grouping.strategy != "all":
            self.block = scratch("wide products", (grouping.longest, total.shape[1]), total.dtype)

    @staticmethod
    def parts(grouping: Grouping, width: int, dtype: torch.dtype) -> Tensor:
        """[parts, N, d]: scratch of the calling thread for the total of each part of `over_heads`."""
        num_parts = len(head_parts(len(grouping.groups), grouping.num_tokens))
        return scratch("wide sums", (num_parts, grouping.num_tokens, width), dtype)

    def rows(self, head: int) -> Tensor:
        """[R]: where each row of the head goes in the total."""
        token = self.grouping.token[head]
        return row_of_token(self.grouping, self.first)[token] if self.grouping.strategy == "sets" else token

    def add(self, head: int, group: Group, rows: Tensor, gated: Tensor, weights: Tensor) -> None:
        """Adds `gated` [n, W h] times `weights` [W h, d] to the `rows` [n] of the total. Heads in ascending order."""
        if self.grouping.strategy == "all" or (self.grouping.strategy == "sets" and head == self.first):
            target = self.total[group.start : group.stop]
            torch.addmm(target, gated, weights, beta=0.0 if head == self.first else 1.0, out=target)
        else:
            self.total.index_add_(0, rows, torch.mm(gated, weights, out=self.block[: len(group)]))


def row_of_token(grouping: Grouping, head: int) -> Tensor:
    """[N]: the row of each token, for strategy `sets`, where a token has one."""
    return grouping.place[:, head, 0] // grouping.num_members - head * grouping.num_tokens


def add_up(grouping: Grouping, totals: Tensor) -> Tensor:
    """Sum of the `totals` [parts, N, d] of all `WideSum`s, in the order of the parts: [N, d] in token order."""
    num_parts, N, _ = totals.shape
    if grouping.strategy == "sets" and N > 0:
        firsts = [heads[0] for heads in head_parts(len(grouping.groups), N)]
        bags = torch.stack([row_of_token(grouping, head) + part * N for part, head in enumerate(firsts)], 1)
        return F.embedding_bag(bags, totals.flatten(0, 1), mode="sum")
    return totals.sum(0) if num_parts > 1 else totals[0].clone()


class HeadWeights:
    """One head's expert matrices, stacked for a group's members: one GEMM per group instead of one per member.

    `experts` [E, h, d] become [W h, d]. Value experts come as a transposed view and are copied first, 0.5 ms a head:
    stacked by columns instead, with the gradient's columns added to each expert, a value backward took 7% longer
    (N = 2048, d = 1024, h = 112, E = 4, k = 2).
    """

    def __init__(self, experts: Tensor, dtype: torch.dtype) -> None:
        if experts.dtype == dtype and experts.is_contiguous():
            self.experts = experts
        else:
            self.experts = scratch("stacked experts", tuple(experts.shape), dtype).copy_(experts)
        self.single = self.experts.unbind()
        self.joined: tuple[tuple[int, ...], Tensor] = ((), experts)

    def join(self, members: tuple[int, ...]) -> Tensor:
        """[W h, d]; a view where the members are neighbours in memory."""
        if self.joined[0] != members:  # groups of the same set follow each other
            if len(members) == 1:
                found = self.single[members[0]]
            elif span := neighbours(members):
                found = self.experts[span].flatten(0, 1)
            else:
                found = scratch(
                    "joined experts", (len(members) * self.experts.shape[1], self.experts.shape[2]), self.experts.dtype
                )
                torch.cat([self.single[e] for e in members], out=found)
            self.joined = members, found
        return self.joined[1]


def neighbours(members: tuple[int, ...]) -> slice | None:
    """The slice that `members` (ascending) form, if they are consecutive."""
    first, last = members[0], members[-1]
    return slice(first, last + 1) if last - first == len(members) - 1 else None


class WeightGradient:
    """Gradient of one head's experts [E, h, d], summed over groups in the compute dtype. `result` may be a transposed
    view, as in `HeadWeights`."""

    def __init__(self, result: Tensor, dtype: torch.dtype) -> None:
        in_place = result.dtype == dtype and result.is_contiguous()
        self.result = result
        self.sum = result if in_place else scratch("weight gradient", tuple(result.shape), dtype)
        self.single = self.sum.unbind()
        self.written: set[int] = set()

    def add(self, group: Group, gated: Tensor, wide: Tensor) -> None:
        """Adds `gated` [n, W h], transposed, times `wide` [n, d] to the gradients of the group's members."""
        members, (_, h, d) = group.experts, self.sum.shape
        new = self.written.isdisjoint(members)
        if (span := neighbours(members)) is not None:
            target = self.sum[span].flatten(0, 1)
            if not new:
                self._zero(members)
            torch.addmm(target, gated.t(), wide, beta=0.0 if new else 1.0, out=target)
        else:
            joined = scratch("joined gradient", (len(members), h, d), self.sum.dtype)
            torch.mm(gated.t(), wide, out=joined.flatten(0, 1))
            for expert, part in zip(members, joined.unbind(), strict=True):
                if expert in self.written:
                    self.single[expert].add_(part)
                else:
                    self.single[expert].copy_(part)
        self.written.update(members)

    def _zero(self, experts: Iterable[int]) -> None:
        """Those that nothing was written to yet: fewer than zeroing all first, 1 ms an op at the benchmark's shape."""
        for expert in experts:
            if expert not in self.written:
                self.single[expert].zero_()

    def finish(self) -> None:
        self._zero(range(len(self.single)))
        if self.sum is not self.result:
            self.result.copy_(self.sum)


def over_heads(body: Callable[[int, range], None], num_heads: int, num_tokens: int) -> None:
    """`body(part, heads)` for `head_parts`: each on one thread where there is more than one.

    One fork and join per op. A GEMM of one group is 0.2 ms: spreading each of the hundreds of them over two threads
    costs a barrier each: next to busy processes the attention layer (bf16) took 4800 ms that way and 1380 this way.
    """
    ranges = head_parts(num_heads, num_tokens)
    run_tasks([len(heads) for heads in ranges], lambda part: body(part, ranges[part]))


def head_parts(num_heads: int, num_tokens: int) -> list[range]:
    """Consecutive heads, one range per thread; a single one where the work is not worth a thread's start."""
    parts = max(1, min(torch.get_num_threads(), num_heads)) if num_tokens >= 128 else 1
    edges = [num_heads * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]
