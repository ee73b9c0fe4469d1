"""What the device tells the host, read when it is needed and not when it is queued: numbers, and how long it took.

On a CPU everything is there at once; the calls are the same, so that one course of control serves both.
"""

from __future__ import annotations

import time

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


class Stopwatch:
    """The seconds between its making and `stop`, by the device's own clock: what the host queues in advance, or waits
    for elsewhere, does not count."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.Event] = []
        self._times: list[float] = []
        self._device = device
        self._mark()

    def stop(self) -> None:
        self._mark()

    def seconds(self) -> float:
        """Waits until the device has stopped the watch."""
        if self._events:  # GPU-ONLY stopwatch
            started, ended = self._events
            ended.synchronize()
            return started.elapsed_time(ended) / 1000.0
        return self._times[1] - self._times[0]

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())
