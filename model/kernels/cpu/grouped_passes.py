"""The parts of SwitchHead's grouped projections on CPU.

The value op maps wide rows [N, d] to narrow ones [N, H, h] per head; the output op maps narrow rows to wide ones. The
backward of each is the forward of the other plus gradients of weights and scores, so both are built from the parts
below: reading rows (`WideRows`, `NarrowRows`), `combine` and `score_gradient` (narrow), `WideSum`, `HeadWeights`,
`WeightGradient`.
Shape legend as in model/kernels/cpu/grouping.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu.grouping import Group, Grouping
from model.kernels.cpu.workers import run_tasks, scratch
from model.kernels.dtypes import cpu_gemm_dtype


def compute_gates(scores: Tensor, grouping: Grouping, dtype: torch.dtype) -> Tensor:
    """Gate of every (row, member) [H, R, W]: `scores` [N, H, k] at their places, 0 where a member is not chosen."""
    shape = (scores.shape[1], grouping.num_rows, grouping.num_members)
    gates = scores.new_zeros(math.prod(shape), dtype=dtype)
    return gates.scatter_(0, grouping.place.flatten(), scores.to(dtype).flatten()).view(shape)


def combine(products: Tensor, grouping: Grouping, scores: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over choices of score times product: [H, R, W, h] and [N, H, k] -> [N, H, h] in `dtype`.

    embedding_bag with per-sample weights gathers, scales and adds in one pass. Indexing, multiplying and summing apart
    take four times as long, because each makes a temporary.
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

    The block stays in cache; gathering a whole head at once would pay for page faults.
    """

    def __init__(self, source: Tensor, grouping: Grouping) -> None:
        self.source, self.grouping = source, grouping
        dtype = cpu_gemm_dtype(source.dtype, accumulates=True)
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

    A group's product stays in cache and is added to its tokens' rows by index_add_, which runs on one thread in row
    order, so it repeats bit by bit. Gathering the running sum into the next head's row order costs up to twice as much,
    and a buffer for each head many times as much, in page faults (docs/kernels.md).
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

    `experts` [E, h, d] become [W h, d]. Value experts come as a transposed view and are copied first. Stacking them by
    columns, and adding the gradient's columns to each expert, is as fast; this way there is one code path.
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
        """Those that nothing was written to yet: less work than zeroing all of them first."""
        for expert in experts:
            if expert not in self.written:
                self.single[expert].zero_()

    def finish(self) -> None:
        self._zero(range(len(self.single)))
        if self.sum is not self.result:
            self.result.copy_(self.sum)


def over_heads(body: Callable[[int, range], None], num_heads: int, num_tokens: int) -> None:
    """`body(part, heads)` for `head_parts`: each on one thread where there is more than one.

    One fork and join per op. Spreading each of the hundreds of short GEMMs over the threads instead would cost a
    barrier each; beside busy processes the attention layer took more than three times as long (docs/kernels.md).
    """
    ranges = head_parts(num_heads, num_tokens)
    run_tasks([len(heads) for heads in ranges], lambda part: body(part, ranges[part]))


def head_parts(num_heads: int, num_tokens: int) -> list[range]:
    """Consecutive heads, one range per thread; a single one where the work is not worth a thread's start."""
    parts = max(1, min(torch.get_num_threads(), num_heads)) if num_tokens >= 128 else 1
    edges = [num_heads * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]
