"""Loss spikes: a step whose loss stands out from those before it."""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np

DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
SMALLEST_DEVIATION = 0.01
"""Smallest deviation that counts, as a share of the median: if losses scatter less, every change would stand out."""


class SpikeDetector:
    """Compares each loss with the median of the `window` before it; both are insensitive to the spikes among them."""

    def __init__(self, threshold: float, window: int, earlier: Iterable[float] = ()) -> None:
        """`threshold`: in robust standard deviations, 0 sees no spike. `earlier`: losses before the first step."""
        self._threshold = threshold
        self._losses = collections.deque(earlier, maxlen=window)
        self._fewest = window // 4

    def see(self, loss: float) -> str | None:
        """Takes the (finite) loss of the next step. Returns what stands out about it, or None."""
        losses = np.array(self._losses)
        self._losses.append(loss)
        if not self._threshold or len(losses) < self._fewest:
            return None
        median = float(np.median(losses))
        deviation = max(DEVIATION * float(np.median(np.abs(losses - median))), SMALLEST_DEVIATION * abs(median))
        score = (loss - median) / max(deviation, 1e-12)
        if score <= self._threshold:
            return None
        return (
            f"loss {loss:.4f} is {score:.1f} standard deviations above {median:.4f}, the median of {len(losses)} steps "
            f"(resilience.spike_threshold = {self._threshold:g})"
        )
