"""Whether the ranks of a group call the same collectives in the same order. Where one does not, all of them hang. So do
two ranks of two groups that call the one and the other first: on a GPU each call waits for those before it.

A run may have thousands of ranks, and few of them do different things: a rank's program depends on its stage and on its
place in its tensor-parallel and expert-parallel groups; for all else only the numbers differ. So a few ranks are
rehearsed, and each pair of them that shares a group is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from pretrain.config.schema import Config
from pretrain.parallel.layout import mesh
from pretrain.parallel.stages import stage_bounds
from pretrain.planning.record import Call

MESSAGE = {"send", "receive"}
UNEVEN = {"all_to_all"}
"""Collectives in which every rank may send another amount."""


class Difference(NamedTuple):
    """Where two ranks part."""

    ranks: tuple[int, int]
    group: tuple[int, ...]
    number: int
    """How many calls of this group they make alike before; of all groups of both if they call two of them."""
    calls: tuple[Call | None, Call | None]
    """What each calls then; None: nothing more."""

    def __str__(self) -> str:
        one, other = self.calls
        if one is not None and other is not None and _group(one) != _group(other):
            said = [
                f"rank {rank} calls {call.kind} of {call.elements:,} {call.dtype} in its group of {len(call.ranks):,}"
                for rank, call in zip(self.ranks, (one, other), strict=True)
            ]
            return f"after {self.number:,} equal calls of both, {said[0]} ranks and {said[1]} ranks: in another order"
        said = [
            f"rank {rank} calls {'nothing more' if call is None else f'{call.kind} of {call.elements:,} {call.dtype}'}"
            for rank, call in zip(self.ranks, self.calls, strict=True)
        ]
        before = f"after {self.number:,} equal calls" if self.number else "at their first call"
        return f"{before} in their group of {len(self.group):,} ranks, {said[0]} and {said[1]}"


def representatives(config: Config, data_size: int) -> dict[int, str]:
    """The ranks that are rehearsed, and why: of every kind of stage its first rank, and another rank of each group of
    that one."""
    ranks = mesh(config, data_size)
    found: dict[int, str] = {}
    for stage in _kinds_of_stage(config):
        of_stage, where = ranks[stage], f" of stage {stage}" if config.parallel.pipeline > 1 else ""
        found[int(of_stage[0, 0])] = f"the first{where}"
        if config.parallel.expert > 1:
            found[int(of_stage[1, 0])] = f"its neighbour in the expert group{where}"
        if of_stage.shape[1] > 1:
            found[int(of_stage[0, -1])] = f"the last of the first tensor group{where}"
        if data_size > 1:
            found.setdefault(int(of_stage[-1, 0]), f"the last of the first data group{where}")
    return found


def _kinds_of_stage(config: Config) -> list[int]:
    """One stage of each kind, with a neighbour that it exchanges messages with: the first two, the last two, and of
    those between them one for each number of layers."""
    stages, bounds = config.parallel.pipeline, stage_bounds(config)
    chosen = {0, min(1, stages - 1), max(0, stages - 2), stages - 1}
    sizes = {bounds[stage + 1] - bounds[stage] for stage in chosen}
    for stage in range(stages):
        size = bounds[stage + 1] - bounds[stage]
        if size not in sizes:
            sizes.add(size)
            chosen.add(stage)
    return sorted(chosen)


def first_difference(calls: Mapping[int, Sequence[Call]], *, is_even: bool = True) -> Difference | None:
    """The first place where two ranks do not do the same, in calls that both must make. `calls`: rank -> its calls in
    order. `is_even`: every rank sends as many tokens to experts, so that sizes must be the same there too."""
    by_group: dict[int, dict[tuple[int, ...], list[Call]]] = {}
    for rank, made in calls.items():
        groups: dict[tuple[int, ...], list[Call]] = {}
        for call in made:
            groups.setdefault(_group(call), []).append(call)
        by_group[rank] = groups
    for one, other in combinations(calls, 2):
        ours, theirs = by_group[one], by_group[other]
        for group in sorted(ours.keys() | theirs.keys()):
            if {one, other} <= set(group):
                found = _parting(ours.get(group, []), theirs.get(group, []), is_even)
                if found is not None:
                    number, pair = found
                    return Difference((one, other), group, number, pair)
        of_both = [[call for call in calls[rank] if {one, other} <= set(call.ranks)] for rank in (one, other)]
        for number, (ours_next, theirs_next) in enumerate(zip(*of_both, strict=True)):
            if _group(ours_next) != _group(theirs_next):
                return Difference((one, other), _group(ours_next), number, (ours_next, theirs_next))
    return None


def _group(call: Call) -> tuple[int, ...]:
    """Messages of both directions between two stages are in one order."""
    return tuple(sorted(call.ranks)) if call.kind in MESSAGE else call.ranks


def _parting(
    ours: Sequence[Call], theirs: Sequence[Call], is_even: bool
) -> tuple[int, tuple[Call | None, Call | None]] | None:
    for number in range(max(len(ours), len(theirs))):
        one = ours[number] if number < len(ours) else None
        other = theirs[number] if number < len(theirs) else None
        if one is None or other is None or not _meet(one, other, is_even):
            return number, (one, other)
    return None


def _meet(one: Call, other: Call, is_even: bool) -> bool:
    """Whether the two ranks do not wait for each other in vain."""
    if one.kind in MESSAGE:  # what the one sends, the other receives
        kinds_fit = {one.kind, other.kind} == MESSAGE and one.ranks == other.ranks
    else:
        kinds_fit = one.kind == other.kind
    may_differ = one.kind in UNEVEN and not is_even
    return kinds_fit and one.dtype == other.dtype and (one.elements == other.elements or may_differ)
