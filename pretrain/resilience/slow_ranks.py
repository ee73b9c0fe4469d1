"""Which ranks the others wait for.

A step takes equally long on all ranks, however slow one of them is, because they wait for each other in it. What tells
them apart is their own work: what each does where it waits for no other. It reads its batches, computes its forward
passes and, on rank 0, writes down what a step tells. Backward passes and update hold reductions over ranks, in which
the fast ones wait. There no clock tells work from waiting, so that time counts for nobody.

On a GPU these are times of the device, taken where its queue reaches the marks of the phases: a rank that computes
slowly and one whose host launches its kernels too late both show.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from common.tables import listed
from model.parallel.context import ParallelContext
from pretrain.config.schema import Config
from pretrain.phases import Phases
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.control import Control

READING, FORWARD, REPORTING = PHASES = ("reading batches", "forward", "reading the step's sums")
"""Phases of a step that are a rank's own work."""
WORDS = {READING: "reads its batches", FORWARD: "computes its forward passes", REPORTING: "writes what a step tells"}
SHARE = 0.05
"""Of a step: a rank whose own work takes so much longer than the median rank's stands out. Less is hardly worth a
search, and medians of equal ranks differ by a percent or two."""
FEWEST_STEPS, MOST_STEPS = 10, 1000
"""That a comparison is made of: the median of fewer is noise; of more, the newest serve."""
AFTER = 3
"""A rank that stands out in this many comparisons in a row is reported, and again after twice, four times, ... as many.
"""
LISTED = 8
"""Ranks that one message names."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that has stood out for long. Seconds are those of a step."""

    rank: int
    host: str
    phase: str
    """In which it is furthest behind the median rank."""
    own_seconds: float
    """Its own work."""
    median_seconds: float
    """That of the median rank."""
    step_seconds: float
    comparisons: int
    """In a row."""

    def __str__(self) -> str:
        share = (self.own_seconds - self.median_seconds) / self.step_seconds
        return (
            f"rank {self.rank} on {self.host} ({self.own_seconds:.3g} s a step, median {self.median_seconds:.3g} s, "
            f"{share:.0%} of a step more, most of it where it {WORDS[self.phase]}; {self.comparisons} comparisons in a "
            f"row)"
        )


class OwnWork:
    """What this rank's own work took since it was last compared."""

    def __init__(self, every: int) -> None:
        """`every`: steps between comparisons, 0: none."""
        self._every = every
        self._rows: collections.deque[list[float]] = collections.deque(maxlen=MOST_STEPS)

    def add(self, phase_seconds: Mapping[str, float]) -> None:
        """Takes the phases of a step."""
        if self._every:
            self._rows.append([*(phase_seconds.get(name, 0.0) for name in PHASES), sum(phase_seconds.values())])

    def is_due(self, step: int) -> bool:
        """Whether to compare after this step; the same on every rank."""
        return self._every > 0 and step % self._every == 0 and len(self._rows) >= FEWEST_STEPS

    def take(self) -> Tensor:
        """[4] int64, microseconds: medians over the steps of each of PHASES, and of the whole step. Medians, so that a
        disk that answers late once, a validation or the first step tell nothing."""
        rows = torch.tensor(list(self._rows), dtype=torch.float64)
        self._rows.clear()
        return (rows.median(0).values * 1e6).round().long()


def ranks_together(parallel: ParallelContext, zero: int, size: int) -> int:
    """How many ranks, of those that follow each other, wait for each other inside a forward pass."""
    return size if zero == 3 else parallel.tensor_size * parallel.expert_size


def own_work(table: Tensor, together: int) -> Tensor:
    """Every rank's `OwnWork.take`, [ranks, 4] -> [ranks, 3]: what is its own. Of `together` ranks that wait for each
    other inside a forward pass the last to arrive waits least: its time is that of all."""
    work = table[:, : len(PHASES)].clone()
    forward = work[:, PHASES.index(FORWARD)].view(-1, together)
    forward[:] = forward.min(1, keepdim=True).values
    return work


class SlowRankWatch:
    """Counts, per rank, the comparisons in a row in which its own work took longer than the median rank's by more than
    SHARE of a step. Of an even number of ranks the median is the lower of the two in the middle, so that of two ranks
    the slower one can stand out."""

    def __init__(self, hosts: Sequence[str], together: int) -> None:
        """`hosts`: of every rank. `together`: see ranks_together."""
        self._hosts, self._together = hosts, together
        self._streaks = torch.zeros(len(hosts), dtype=torch.int64)

    def see(self, table: Tensor) -> tuple[dict[str, float], list[SlowRank]]:
        """Takes every rank's `OwnWork.take`, [ranks, 4]. Returns what metrics.jsonl has of it, and the ranks to report
        now, the slowest first."""
        work, step = own_work(table, self._together), int(table[:, -1].median())
        own = work.sum(1)
        behind = own - own.median()
        self._streaks = torch.where(behind > SHARE * step, self._streaks + 1, 0)
        first = int(behind.argmax())
        values = {"slowest_rank": first, "slowest_rank_behind_seconds": int(behind[first]) / 1e6}
        phase = (work - work.median(0).values).argmax(1)
        due = [rank for rank in behind.argsort(descending=True).tolist() if self._is_told(int(self._streaks[rank]))]
        return values, [
            SlowRank(
                rank,
                self._hosts[rank],
                PHASES[int(phase[rank])],
                own_seconds=int(own[rank]) / 1e6,
                median_seconds=int(own.median()) / 1e6,
                step_seconds=step / 1e6,
                comparisons=int(self._streaks[rank]),
            )
            for rank in due
        ]

    @staticmethod
    def _is_told(streak: int) -> bool:
        multiple, rest = divmod(streak, AFTER)
        return multiple > 0 and rest == 0 and multiple & (multiple - 1) == 0


class RankComparison:
    """Compares the ranks of a run every monitor.details_every_steps, and says which hold the others up."""

    def __init__(
        self, config: Config, parallel: ParallelContext, control: Control, phases: Phases, folder: RunFolder
    ) -> None:
        self._own = OwnWork(config.monitor.details_every_steps if len(control.hosts) > 1 else 0)
        together = ranks_together(parallel, config.parallel.zero, len(control.hosts))
        self._watch = SlowRankWatch(control.hosts, together)
        self._control, self._phases, self._folder, self._speaks = control, phases, folder, parallel.is_first

    def step(self, step: int, phase_seconds: Mapping[str, float]) -> dict[str, float]:
        """Takes the phases of a step of this rank that was read. Collective where a comparison is due: one message of
        four numbers a rank on CPUs. Returns what metrics.jsonl has of it, on rank 0; prints a warning and writes an
        event if ranks are to be reported."""
        self._own.add(phase_seconds)
        if not self._own.is_due(step):
            return {}
        before = self._phases.record.name
        self._phases.enter("comparing ranks")  # waiting for the others here is nobody's own work
        table = self._control.table(self._own.take())
        self._phases.enter(before)
        if not self._speaks:
            return {}
        values, slow = self._watch.see(table)
        if slow:
            print(
                f"warning: step {step}: slower than the others in their own work: "
                f"{listed([str(one) for one in slow], LISTED, '; ')} (docs/monitoring.md#which-rank-is-slow)",
                flush=True,
            )
            self._folder.event("slow_ranks", step=step, count=len(slow), ranks=[asdict(one) for one in slow[:LISTED]])
        return values
