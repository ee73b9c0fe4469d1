"""What the device tells the host, read when it is needed and not when it is queued: numbers, and how long it took.

On a CPU everything is there at once; the calls are the same, so that one course of control serves both.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import Tensor


class Reading:
    """Numbers on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        """Queues the copy of `values` [n] and waits for nothing."""
        self._event: torch.Event | None = None
        self._host = values.detach()
        if values.device.type == "cuda":  # GPU-ONLY late-reading
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.Event(values.device)
            self._event.record()

    def get(self) -> Tensor:
        """The numbers, on the CPU; waits for all that was queued before the copy, for nothing after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Laps:
    """How long each of a sequence of phases took, by the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, torch.Event | float]] = []

    def begin(self, name: str) -> None:
        """The phase before ends, the next one begins. Waits for nothing."""
        if self._device.type == "cuda":  # GPU-ONLY laps
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def cut(self, name: str) -> Laps:
        """The laps so far, and their end; this one goes on from there with the phase `name`."""
        self.begin(name)
        ended = Laps(self._device)
        ended._marks, self._marks = self._marks, self._marks[-1:]
        return ended

    def seconds(self) -> dict[str, float]:
        """By phase, in the order of first appearance. Waits until the device has reached the end."""
        if self._marks and not isinstance(self._marks[-1][1], float):
            self._marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (name, start), (_, end) in pairwise(self._marks):
            if isinstance(start, float) and isinstance(end, float):
                seconds = end - start
            else:  # GPU-ONLY laps-between
                assert isinstance(start, torch.Event) and isinstance(end, torch.Event)
                seconds = start.elapsed_time(end) / 1000.0
            found[name] = found.get(name, 0.0) + seconds
        return found


class Stopwatch:
    """The seconds between its making and `stop`, by the device's own clock: what the host queues in advance, or waits
    for elsewhere, does not count."""

    def __init__(self, device: torch.device) -> None:
        self._laps = Laps(device)
        self._laps.begin("running")

    def stop(self) -> None:
        self._laps.begin("stopped")

    def seconds(self) -> float:
        """Waits until the device has stopped the watch."""
        return self._laps.seconds()["running"]
