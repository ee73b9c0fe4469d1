"""What a run was estimated to need beside what it takes: said once, after its first steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from common.units import GIB

COMPARED_AFTER = 20
"""Steps of a start, after which estimate and measurement stand side by side. A shorter start says nothing."""
TIMED = 10
"""The last of these steps, whose times count: in the first, kernels are compiled and memory is found."""
TOLERANCE = 0.15
"""Relative difference above which there is a warning."""
LIBRARIES = 300 << 20
"""Bytes of resident memory that count as no difference on a CPU: an estimate is of tensors, and a process that begins
to train also loads code and starts threads. switchall_tiny had 0.39 GiB where 0.29 GiB of tensors were estimated."""


class RunEstimate(NamedTuple):
    memory_bytes: int | None
    """Of the rank that needs most; None: not estimated."""
    device_type: str
    """cuda or cpu."""
    text: str
    """What the memory consists of, or why it is not estimated."""
    step_seconds: tuple[float, float] | None = None
    """From and to; None: nothing is known of the device."""

    def to_json(self) -> dict[str, Any]:
        return self._asdict()

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> RunEstimate:
        """Raises KeyError or TypeError for something else."""
        seconds = tree["step_seconds"]
        return cls(**{**tree, "step_seconds": None if seconds is None else (float(seconds[0]), float(seconds[1]))})

    def line(self) -> str:
        """For a terminal, before the first step."""
        found = f"memory of a rank: {self.text}"
        if self.step_seconds is not None:
            low, high = self.step_seconds
            found += f"; a step: {low:.3g} to {high:.3g} s estimated"
        return found


class Measured(NamedTuple):
    """What the first steps took."""

    memory_bytes: int
    """Of the rank that took most. On a GPU tensors at their peak; on a CPU resident memory at its peak, above what the
    process had before its model was built."""
    step_seconds: float
    """The median."""


class Comparison(NamedTuple):
    """Both, side by side."""

    step: int
    """Of the run, after which was measured."""
    estimate: RunEstimate
    measured: Measured

    @property
    def text(self) -> str:
        """Without what was not estimated."""
        parts = []
        if self.estimate.memory_bytes is not None:
            kind = "resident memory above that before the model" if self.estimate.device_type == "cpu" else "tensors"
            parts.append(
                f"memory of the rank with most {_gib(self.measured.memory_bytes)} ({kind} at its peak), estimated "
                f"{_gib(self.estimate.memory_bytes)}"
            )
        if self.estimate.step_seconds is not None:
            low, high = self.estimate.step_seconds
            parts.append(f"a step {self.measured.step_seconds:.3g} s, estimated {low:.3g} to {high:.3g} s")
        return "; ".join(parts)

    @property
    def warnings(self) -> list[str]:
        """What differs by more than TOLERANCE."""
        found = []
        expected, taken = self.estimate.memory_bytes, self.measured.memory_bytes
        if expected is not None and abs(self._memory_difference()) > TOLERANCE * expected:
            advice = (
                "leave that much room when the next run is planned (docs/planning.md says what is not counted)"
                if taken > expected
                else "a larger batch.micro_sequences may fit than it says"
            )
            found.append(f"memory is {_percent(taken, expected)} the estimate: {advice}")
        if self.estimate.step_seconds is not None:
            low, high = self.estimate.step_seconds
            seconds = self.measured.step_seconds
            nearest = min(max(seconds, low), high)
            if abs(seconds - nearest) > TOLERANCE * nearest:
                advice = (
                    "the time of a step in TensorBoard shows what it waits for"
                    if seconds > nearest
                    else "what was assumed of this device or its links is too slow (docs/planning.md)"
                )
                found.append(f"a step takes {_percent(seconds, nearest)} the estimate: {advice}")
        return found

    def _memory_difference(self) -> int:
        """Above 0: more than was estimated."""
        assert self.estimate.memory_bytes is not None
        difference = self.measured.memory_bytes - self.estimate.memory_bytes
        if self.estimate.device_type == "cpu" and difference > 0:
            return max(0, difference - LIBRARIES)
        return difference

    def to_json(self) -> dict[str, Any]:
        """For events.jsonl."""
        return {
            "step": self.step,
            "estimated": self.estimate.to_json(),
            "measured": self.measured._asdict(),
            "text": self.text,
            "warnings": self.warnings,
        }


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _percent(taken: float, expected: float) -> str:
    share = taken / expected - 1
    return f"{abs(share):.0%} {'above' if share > 0 else 'below'}"


class SideBySide:
    """Says on rank 0 what is expected, when it is known, and what was measured, when both are known: once a start."""

    def __init__(self, take: Callable[[], RunEstimate | None]) -> None:
        """`take` gives the estimate when it is there, once."""
        self._take = take
        self._estimate: RunEstimate | None = None
        self._measured: tuple[int, Measured] | None = None
        self._is_done = False

    def look(self, event: Callable[..., None]) -> None:
        """Before the first step and after each. `event` takes a kind and values, see RunFolder.event."""
        if self._estimate is None and (found := self._take()) is not None:
            self._estimate = found
            print(found.line(), flush=True)
            event("estimated", **found.to_json())
        if self._estimate is None or self._measured is None or self._is_done:
            return
        self._is_done = True
        step, measured = self._measured
        compared = Comparison(step, self._estimate, measured)
        if compared.text:
            print(f"estimate and measurement after step {step}: {compared.text}", flush=True)
            for warning in compared.warnings:
                print(f"warning: {warning}", flush=True)
            event("estimate_compared", **compared.to_json())

    def measure(self, step: int, memory_bytes: int, step_seconds: Sequence[float]) -> None:
        """After COMPARED_AFTER steps of a segment; the first segment of a start counts."""
        if self._measured is None:
            self._measured = step, Measured(memory_bytes, statistics.median(step_seconds))
