"""The stages of a run's data: which sources are mixed from which position on, with which weights.

A run begins with one stage. Each start that changes the sources or their weights begins another, in which every source
goes on where it stands: the order within a stage is a function of the stage and the position alone. Checkpoints keep
the stages, because they cannot be computed from the configuration of the last one.

So it is with the streams that a run reads where nothing is shuffled (data.order = streams): without memory a run may go
on with another batch, and the text stays cut as it was, or some would be read again and some never.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pretrain.data.mixture import MixtureSchedule


@dataclass(frozen=True)
class StageSource:
    name: str
    digest: str
    """Of its manifest; empty where a checkpoint from before stages existed does not tell it."""
    weight: int
    """How often it is chosen in a period of the schedule. 0: an earlier stage read it, this one does not."""
    read: int = 0
    """How many of its windows were read before the stage, over all epochs."""
    shuffle: int | None = None
    """Which of the run's shuffles is its own, the same in all stages; None: that of a run which began with it alone."""


@dataclass(frozen=True)
class Stage:
    """A part of the data order."""

    first: int
    """Its first position."""
    sources: tuple[StageSource, ...]
    """Those that it reads, in the order of the configuration; then those of earlier stages, which may come back."""
    streams: int | None = field(default=None, compare=False)
    """Into how many streams its text is cut; None: into batch.global_sequences. It names what is read as it was read
    before: two stages that differ in it alone are the same order."""

    @property
    def mixed(self) -> tuple[StageSource, ...]:
        """The sources that it reads."""
        return tuple(source for source in self.sources if source.weight)

    @functools.cached_property
    def schedule(self) -> MixtureSchedule:
        """Which source each position reads, counted from `first`."""
        return MixtureSchedule([source.weight for source in self.mixed])

    def counts(self, position: int) -> list[int]:
        """How many windows of each source that it reads were read before `position`, which lies in this stage."""
        counts = self.schedule.counts(position - self.first)
        return [source.read + count for source, count in zip(self.mixed, counts, strict=True)]

    def followed_by(self, position: int, sources: Sequence[StageSource]) -> Stage:
        """The stage from `position` on that reads `sources` (name, digest and weight of each), each from where it
        stands. A source is known by its data or, if those are new, by its name; any other begins."""
        counts = iter(self.counts(position))
        known = [replace(s, weight=0, read=next(counts) if s.weight else s.read) for s in self.sources]
        number = 1 + max(source.shuffle or 0 for source in known)
        found: dict[int, StageSource] = {}
        for part in ("digest", "name"):
            for index, source in enumerate(sources):
                same = next((k for k in known if getattr(k, part) == getattr(source, part) != ""), None)
                if index not in found and same is not None:
                    known.remove(same)
                    found[index] = replace(source, read=same.read, shuffle=same.shuffle)
        for index, source in enumerate(sources):
            if index not in found:
                found[index], number = replace(source, shuffle=number), number + 1
        return Stage(position, (*(found[index] for index in range(len(sources))), *known), self.streams)

    def in_windows_of(self, now: int, *, before: int) -> Stage:
        """The same stage in windows of `now` tokens, where it had `before`: each source stands after as many tokens as
        were read of it, rounded up to a window."""
        return replace(self, sources=tuple(replace(s, read=-(-s.read * before // now)) for s in self.sources))

    def text(self) -> str:
        """From where on it reads what, and where each source stands, for people."""
        shares = []
        for source in self.mixed:
            begins = f"after {source.read:,} of its windows" if source.read else "from its beginning"
            shares.append(f"{source.name} {source.weight / self.schedule.period:.4g} ({begins})")
        return f"position {self.first:,} on: {', '.join(shares)}"

    def to_json(self) -> dict[str, Any]:
        streams = {} if self.streams is None else {"streams": self.streams}
        return {"first": self.first, "sources": [vars(source) for source in self.sources], **streams}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Stage:
        sources = tuple(StageSource(**source) for source in tree["sources"])
        return cls(int(tree["first"]), sources, tree.get("streams"))


def first_stage(names: Sequence[str], digests: Sequence[str], weights: Sequence[int]) -> Stage:
    """The stage that a run begins with."""
    alone = len(names) == 1
    return Stage(
        0,
        tuple(
            StageSource(name, digest, weight, shuffle=None if alone else index)
            for index, (name, digest, weight) in enumerate(zip(names, digests, weights, strict=True))
        ),
    )
