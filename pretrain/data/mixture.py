"""Which source each position of a run reads: a fixed schedule that keeps to the weights at every moment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.config.data_rules import LARGEST_PERIOD


class MixtureSchedule:
    """Source of every position. After any n positions, source s was chosen n w_s / W times, give or take less than 1
    (W: the sum of the weights w); after every W positions exactly.

    The schedule of W positions is Tijdeman's (The chairman assignment problem, 1980), whose bound is 1 - 1 / (2 k - 2)
    for k sources: it takes, among the sources that may be chosen without running ahead, the one that must be chosen
    soonest.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        assert all(weight > 0 for weight in weights) and sum(weights) <= LARGEST_PERIOD
        self.weights = list(weights)
        self.period = sum(weights)
        self._source = np.array(_tijdeman(self.weights), dtype=np.int64)
        chosen = self._source[:, None] == np.arange(len(weights))
        # before[n, s]: how often s was chosen before position n of the period.
        self._before = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(chosen, axis=0)])

    def sources(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each position, and how often the source was chosen before it; `positions` and both [n] int64."""
        periods, offsets = np.divmod(positions, self.period)
        source = self._source[offsets]
        return source, periods * np.array(self.weights)[source] + self._before[offsets, source]

    def counts(self, consumed: int) -> list[int]:
        """How often each source was chosen in the first `consumed` positions."""
        periods, offset = divmod(consumed, self.period)
        return [periods * w + int(b) for w, b in zip(self.weights, self._before[offset], strict=True)]


def _tijdeman(weights: list[int]) -> list[int]:
    """One period, in units of 1 / (W D) with D = 2 k - 2, so that all numbers are whole."""
    total, D = sum(weights), max(1, 2 * len(weights) - 2)
    per_weight = [math.lcm(*weights) // weight for weight in weights]
    owed = [0] * len(weights)  # D (n w_s - W count_s)
    schedule = []
    for _ in range(total):
        owed = [o + D * w for o, w in zip(owed, weights, strict=True)]
        ready = [s for s, o in enumerate(owed) if o >= total]
        # The time left until s is late by the bound, times w_s / lcm: comparable among sources.
        soonest = min(ready, key=lambda s: ((D - 1) * total - owed[s]) * per_weight[s])
        owed[soonest] -= D * total
        schedule.append(soonest)
    return schedule
