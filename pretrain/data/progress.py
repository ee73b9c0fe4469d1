"""How far a run is: what decides its future, apart from tensors."""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pretrain.data.stages import Stage

Range = tuple[int, int]
"""Positions first .. end - 1 of the data order."""


@dataclass(frozen=True)
class Progress:
    """Where a run is, the same on every rank and in every layout."""

    step: int
    """Optimizer steps done, those without an update included."""
    consumed_sequences: int
    """Number of sequences that those steps read: the first ones of the data order without `skipped_ranges`."""
    skipped_ranges: tuple[Range, ...] = ()
    """Positions of the data order that are never read: sorted, disjoint, none empty."""
    skipped_updates: int = 0
    """How many of the last steps in a row had no update, because loss or gradient was not finite."""
    stages: tuple[Stage, ...] = ()
    """The stages of the data so far, the last one under way. None: a file from before stages existed, one stage."""
    extra_tokens: int = 0
    """Tokens read, less `consumed_sequences` times the sequence_length of now: 0 unless a resume changed that."""
    extra_flops: int = 0
    """Of training, less those tokens times what the model of now computes for one: 0 unless a resume changed it."""

    def __post_init__(self) -> None:
        edges = [edge for part in self.skipped_ranges for edge in part]
        assert all(a < b for a, b in itertools.pairwise(edges)), f"not sorted and apart: {edges}"

    def after_step(self, sequences: int, *, updated: bool = True) -> Progress:
        """After one more step, which read `sequences`."""
        return replace(
            self,
            step=self.step + 1,
            consumed_sequences=self.consumed_sequences + sequences,
            skipped_updates=0 if updated else self.skipped_updates + 1,
        )

    @property
    def position(self) -> int:
        """Position in the data order of the next sequence."""
        return int(data_positions(np.array([self.consumed_sequences]), self.skipped_ranges)[0])

    def left_out(self) -> collections.Counter[str]:
        """Windows of each source, by digest, that a rollback left out so far: stages count them as read."""
        found = collections.Counter[str]()
        ends = [*(stage.first for stage in self.stages[1:]), self.position]
        for stage, end in zip(self.stages, ends, strict=False):  # no stages: a file from before they existed
            for a, b in self.skipped_ranges:
                first, last = max(a, stage.first), min(b, end)
                if first < last:
                    counts = zip(stage.mixed, stage.counts(first), stage.counts(last), strict=True)
                    found.update({source.digest: after - before for source, before, after in counts})
        return found

    def tokens(self, sequence_length: int) -> int:
        """How many tokens those sequences had. `sequence_length`: of the run that is here."""
        return self.consumed_sequences * sequence_length + self.extra_tokens

    def in_sequences_of(self, now: int, *, before: int) -> Progress:
        """The same for a run that goes on with `now` tokens in a sequence, where it had `before`."""
        return replace(self, extra_tokens=self.tokens(before) - self.consumed_sequences * now)

    def at_rate(self, now: int, *, before: int, sequence_length: int) -> Progress:
        """The same for a run that goes on with `now` FLOPs a token, where it had `before`."""
        return replace(self, extra_flops=self.extra_flops + self.tokens(sequence_length) * (before - now))

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "consumed_sequences": self.consumed_sequences,
            "skipped_ranges": [list(part) for part in self.skipped_ranges],
            "skipped_updates": self.skipped_updates,
            "stages": [stage.to_json() for stage in self.stages],
            "extra_tokens": self.extra_tokens,
            "extra_flops": self.extra_flops,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Progress:
        """The inverse of `to_json`. Files from before skips, stages or extras existed have none of them."""
        return cls(
            step=int(tree["step"]),
            consumed_sequences=int(tree["consumed_sequences"]),
            skipped_ranges=tuple((int(first), int(end)) for first, end in tree.get("skipped_ranges", ())),
            skipped_updates=int(tree.get("skipped_updates", 0)),
            stages=tuple(Stage.from_json(stage) for stage in tree.get("stages", ())),
            extra_tokens=int(tree.get("extra_tokens", 0)),
            extra_flops=int(tree.get("extra_flops", 0)),
        )


def data_positions(consumed: np.ndarray, skipped: tuple[Range, ...]) -> np.ndarray:
    """[n] int64 -> [n] int64: the position in the data order of the sequence that is read after `consumed` others."""
    if not skipped:
        return consumed
    first, end = np.array(skipped, dtype=np.int64).T
    lengths = np.cumsum(end - first)
    read_before = first - np.concatenate(([0], lengths[:-1]))
    return consumed + np.concatenate(([0], lengths))[np.searchsorted(read_before, consumed, side="right")]


def merged(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """The same positions as sorted ranges that neither overlap nor touch."""
    found: list[Range] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return tuple(found)
