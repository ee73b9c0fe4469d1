"""`plan.py search`: every legal layout of a run on a machine, ranked by estimated step time and then by headroom.

All layouts get a step time by arithmetic, each in a millisecond. In the order of these times a step is rehearsed
without a GPU, which takes seconds and gives the memory and the collectives, until enough layouts are known to fit.
Layouts that need more than one which did not fit are passed over.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ConfigError, UserError
from pretrain.config.rules import check_rules
from pretrain.config.schema import Config
from pretrain.planning import layout_plan
from pretrain.planning.fit import check_on
from pretrain.planning.layout_plan import StepTime
from pretrain.planning.machine import Machine
from pretrain.planning.measured import RESULTS, Measurements, measurements
from pretrain.planning.memory import USABLE
from pretrain.planning.paces import why_no_time
from pretrain.planning.stops import CannotRehearse, StepStops

SHOWN = 10
"""Layouts of the table."""
MOST_REHEARSED = 60
"""Steps that are rehearsed at most."""
Progress = Callable[[str, int, int], None]
"""Takes what is counted, how many are done and of how many."""


class Layout(NamedTuple):
    """What the search decides, in the order of simplicity: ties go to what divides less."""

    tensor: int
    pipeline: int
    expert: int
    zero: int
    sequence: bool
    recompute: str
    micro_sequences: int

    def overrides(self) -> dict[str, Any]:
        """Dotted keys of a configuration."""
        return {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.expert": self.expert,
            "parallel.zero": self.zero,
            "parallel.sequence": self.sequence,
            "train.recompute": self.recompute,
            "batch.micro_sequences": self.micro_sequences,
        }

    def applied(self, config: Config) -> Config:
        """The configuration in this layout; rules are not checked."""
        for key, value in self.overrides().items():
            section, name = key.split(".")
            config = config.replaced(section, **{name: value})
        return config


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layout that fits."""

    layout: Layout
    time: StepTime
    needed: int
    """Bytes of the rank that needs most."""

    @property
    def rank(self) -> tuple[float, int, Layout]:
        """The smaller the better: time to three digits, then memory, then simplicity."""
        return layout_plan.rounded(self.time.middle), self.needed, self.layout


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    best: tuple[Found, ...]
    """At most SHOWN."""
    beside: dict[str, Any]
    """Dotted keys that all layouts set beside their own, where the run's configuration has another value."""
    refused: dict[str, tuple[int, str]]
    """Key that a rule names -> how many layouts it refused, and what it said of the first."""
    excluded: dict[str, int]
    """Other reasons why layouts are not in `best` -> how many."""
    layouts: int
    """All that were looked at."""
    traced: int


def search(config: Config, machine: Machine, *, results: Path = RESULTS, progress: Progress) -> SearchReport:
    """Raises UserError if nothing can be ranked: times or the memory of the device are not known."""
    if machine.capacity is None:
        raise UserError(f"--gpu: the memory of {machine.device.name} is not in the table; give it with --memory GIB")
    # Offloading moves to the CPU what need not, and its time is not known.
    beside = {"parallel.offload_optimizer": False} if config.parallel.offload_optimizer else {}
    config = config.replaced("parallel", offload_optimizer=False)
    unknown = why_no_time(config, machine)
    if unknown is not None:
        raise UserError(f"--gpu: layouts cannot be ranked, because {unknown}")
    legal, refused = legal_layouts(config, machine)
    measured = measurements(machine.device, results)
    excluded: Counter[str] = Counter()
    timed: list[tuple[float, Layout]] = []
    for done, layout in enumerate(legal):
        progress("layouts by arithmetic", done, len(legal))
        candidate = layout.applied(config)
        if layout_plan.at_least(candidate, machine) > USABLE * machine.capacity:
            excluded[TOO_LARGE] += 1
            continue
        time = layout_plan.step_time(candidate, machine, measured)
        timed.append((layout_plan.rounded(time.middle), layout))
    timed.sort()
    trials = Trials(config, machine, measured, excluded)
    trials.run(timed, progress)
    best = sorted(trials.fitting, key=lambda found: found.rank)
    beyond = max(0, len(best) - SHOWN)
    if beyond:
        excluded[SLOWER] += beyond
    return SearchReport(
        best=tuple(best[:SHOWN]),
        beside=beside,
        refused=refused,
        excluded=dict(excluded),
        layouts=len(legal) + sum(count for count, _ in refused.values()),
        traced=trials.traced,
    )


SLOWER = f"slower than the {SHOWN} best, or as fast with less headroom"
TOO_LARGE = "memory: weights, optimizer and the inputs of the blocks alone do not fit"
FULL = "memory: activations do not fit beside weights, gradients and optimizer"
KINDS = ("none", "selective", "full")
"""train.recompute, what needs most memory first."""


class Trials:
    """Goes through layouts, the fastest first, until SHOWN of them fit."""

    def __init__(self, config: Config, machine: Machine, measured: Measurements, excluded: Counter[str]) -> None:
        self._config, self._machine, self._measured, self._excluded = config, machine, measured, excluded
        self.fitting: list[Found] = []
        self.traced = 0
        self._too_large: list[Layout] = []
        self._kinds: set[tuple[object, ...]] = set()

    def run(self, timed: list[tuple[float, Layout]], progress: Progress) -> None:
        """timed: by arithmetic, in order. Layouts of equal times are all tried, as their headroom decides."""
        for _, group in itertools.groupby(timed, key=lambda entry: entry[0]):
            enough = len(self.fitting) >= SHOWN
            for _, layout in group:
                if enough:
                    self._excluded[SLOWER] += 1
                elif any(_needs_more(layout, other) for other in self._too_large):
                    self._excluded[FULL] += 1
                elif self.traced >= MOST_REHEARSED:
                    self._excluded[f"not rehearsed: the search ends after {MOST_REHEARSED}"] += 1
                else:
                    progress("layouts that fit", min(len(self.fitting), SHOWN), SHOWN)
                    self._try(layout)

    def _try(self, layout: Layout) -> None:
        try:
            needed = self._needed(layout)
        except (StepStops, CannotRehearse) as error:  # of this layout; others may be possible
            self._excluded[str(error)] += 1
            return
        if needed is None:
            self._excluded[FULL] += 1
            self._rule_out(layout)
            return
        time = layout_plan.step_time(layout.applied(self._config), self._machine, self._measured)
        self.fitting.append(Found(layout=layout, time=time, needed=needed))

    def _rule_out(self, layout: Layout) -> None:
        """Where one is too large, the smallest of its kind is tried next: too large as well, it rules out all others
        that divide alike."""
        self._too_large.append(layout)
        smallest = layout._replace(recompute=KINDS[-1], micro_sequences=1)
        with contextlib.suppress(StepStops, CannotRehearse):
            if layout[:5] not in self._kinds and smallest != layout and self._needed(smallest) is None:
                self._too_large.append(smallest)
        self._kinds.add(layout[:5])

    def _needed(self, layout: Layout) -> int | None:
        """Bytes of the rank that needs most; None: it does not fit."""
        self.traced += 1
        config = layout.applied(self._config)
        memories = layout_plan.stage_memories(config, self._machine, layout_plan.decisive_stages(config))
        return max(memory.total for memory in memories) if layout_plan.fits(memories, self._machine) else None


def _needs_more(layout: Layout, other: Layout) -> bool:
    """Whether `layout` divides as `other` does, with micro-batches as large and no more recomputation."""
    same = layout[:5] == other[:5]
    keeps_more = KINDS.index(layout.recompute) <= KINDS.index(other.recompute)
    return same and keeps_more and layout.micro_sequences >= other.micro_sequences


def legal_layouts(config: Config, machine: Machine) -> tuple[list[Layout], dict[str, tuple[int, str]]]:
    """Those that the rules of configurations allow, and why the others are refused: a key -> how many, and the first
    message. Rules are asked once for all micro-batches that divide a rank's share, and for all recomputation where a
    layout is refused without any."""
    legal: list[Layout] = []
    refused: dict[str, tuple[int, str]] = {}

    def allowed(layout: Layout, *, count: int) -> bool:
        try:
            candidate = layout.applied(config)
            check_rules(candidate)
            check_on(candidate, machine)
        except ConfigError as error:
            key = str(error).partition(":")[0]
            number, said = refused.get(key, (0, str(error)))
            refused[key] = (number + count, said)
            return False
        return True

    for tensor, pipeline, expert, zero, sequence in _divisions(config, machine):
        micro = _micro_batches(config, machine, tensor * pipeline)
        plain = Layout(tensor, pipeline, expert, zero, sequence, KINDS[0], 1)
        if not allowed(plain, count=max(1, len(KINDS) * len(micro))):
            continue
        for kind in KINDS:
            variant = plain._replace(recompute=kind)
            if variant == plain or allowed(variant, count=len(micro)):
                legal += [variant._replace(micro_sequences=size) for size in micro]
    return legal, refused


def _divisions(config: Config, machine: Machine) -> Iterator[tuple[int, int, int, int, bool]]:
    """tensor, pipeline, expert, ZeRO stage, sequence: whose sizes divide the ranks. Tensor groups stay on a node."""
    gpus = machine.num_gpus
    for tensor in _divisors(gpus):
        for pipeline in _divisors(gpus // tensor):
            if tensor > machine.gpus_per_node or pipeline > config.model.num_layers:
                continue
            for expert in _divisors(gpus // (tensor * pipeline)):
                for zero, sequence in itertools.product(range(4), (False, True) if tensor > 1 else (False,)):
                    yield tensor, pipeline, expert, zero, sequence


def _micro_batches(config: Config, machine: Machine, model_ranks: int) -> list[int]:
    """Sizes that divide a rank's share of a step; none where the share is no whole number."""
    share, rest = divmod(config.batch.global_sequences, machine.num_gpus // model_ranks)
    return [] if rest else _divisors(share)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
