"""How long a phase of a plain step may take, learnt from the steps before.

resilience.hang_timeout_seconds must exceed the longest validation or checkpoint, so it is far too long for a step. The
shorter limit holds where a step waits for nothing but the other ranks' part of it: every rank has its data by then, and
none reads or writes a file. It does not hold for the first steps of a start, which compile, record and allocate.
"""

from __future__ import annotations

import collections

from pretrain.config.watching import ResilienceConfig
from pretrain.phases import Phases

LEAST_SECONDS = 120.0
"""No limit is shorter: a network that fails over, or a machine that swaps, may take a minute."""
WARM_UP_STEPS = 5
"""Of a start, which are not measured."""
FEWEST_STEPS, MOST_STEPS = 10, 100
"""That a limit is made of; of more, the newest serve."""


class StepLimit:
    """Sets `phases.step_limit` while it has measured enough steps."""

    def __init__(self, config: ResilienceConfig, phases: Phases, *, reads_files: bool = False) -> None:
        """`reads_files`: every rank reads a file within its steps, while others may wait for it; there is no limit."""
        self._factor = 0.0 if reads_files else config.step_timeout_factor
        self._longest, self._phases = config.hang_timeout_seconds, phases
        self.restart()

    def restart(self) -> None:
        """The next steps may take longer than those before: what was measured tells nothing about them."""
        self._left_out, self._seconds = 0, collections.deque[float](maxlen=MOST_STEPS)
        self._phases.step_limit = None

    def add(self, seconds: float) -> None:
        """Takes what a step took."""
        if self._left_out < WARM_UP_STEPS:
            self._left_out += 1
            return
        self._seconds.append(seconds)
        if self._factor and self._longest and len(self._seconds) >= FEWEST_STEPS:
            limit = max(LEAST_SECONDS, self._factor * max(self._seconds))
            self._phases.step_limit = min(limit, self._longest)
