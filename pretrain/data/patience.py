"""What a run does about a file of its data that cannot be read now: it tries again for a while.

Shared file systems have faults of seconds or minutes: a server fails over, a client is evicted, a cache still holds an
old handle. Nobody has to change anything then, so a run that ends for it lost a night for nothing.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from common.errors import PASSING, PassingError, UnreadableError
from pretrain.config.watching import ResilienceConfig

Result = TypeVar("Result")

MOST_SECONDS = 180.0
"""Longest time to try again: SLURM's signal comes 300 s before the limit, and a rank that waits saves nothing."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0


def patient_seconds(config: ResilienceConfig) -> float:
    """How long to try again. Faults of this long after the first share the time, so two such times in a row are the
    longest that one read waits: well before the other ranks, which wait for this one, take it for a hang."""
    return min(MOST_SECONDS, config.hang_timeout_seconds / 3) if config.hang_timeout_seconds else MOST_SECONDS


@dataclass(frozen=True)
class Wait:
    """A read that succeeded late, or never."""

    rank: int
    file: str
    reason: str
    attempts: int
    """That failed."""
    seconds: float


class Patience:
    """Calls what reads, and calls it again after an error that can pass. For any thread."""

    def __init__(self, seconds: float = 0.0, *, rank: int = 0) -> None:
        """`seconds`: from the first error to the last attempt; 0: each error is raised as it is."""
        self._seconds, self._rank = seconds, rank
        self.files_were_seen = False
        """Each file was there when the run started: from then on a missing one may be a cache that is out of date."""
        self._deadline = 0.0
        self._waits: list[Wait] = []
        self._ended = threading.Event()

    def __call__(self, read: Callable[[], Result]) -> Result:
        """What `read` returns. Raises its error if that cannot pass, PassingError if it did not pass in time."""
        failures, began, pause = 0, 0.0, FIRST_PAUSE_SECONDS
        file = reason = ""
        while True:
            try:
                result = read()
                break
            except (OSError, UnreadableError) as error:
                if not self._seconds or not self._may_pass(error):
                    raise
                failures, now = failures + 1, time.monotonic()
                file, reason = _file_and_reason(error)
                if failures == 1:
                    began = now
                    self._deadline = self._deadline if now < self._deadline else now + self._seconds
                    self._say(file, reason, self._deadline - now)
                if now + pause > self._deadline or self._ended.wait(pause):
                    self._waits.append(Wait(self._rank, file, reason, failures, now - began))
                    raise PassingError(
                        f"{file} cannot be read: {reason}; rank {self._rank} tried {failures} times in "
                        f"{now - began:.0f} s. This may pass; if it stays, look after the file system"
                    ) from None
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        if failures:
            self._waits.append(Wait(self._rank, file, reason, failures, time.monotonic() - began))
        return result

    def _may_pass(self, error: OSError | UnreadableError) -> bool:
        number = error.number if isinstance(error, UnreadableError) else error.errno
        if number is None:
            return isinstance(error, UnreadableError | TimeoutError | ConnectionError)
        return number in PASSING or (number == errno.ENOENT and self.files_were_seen)

    def _say(self, file: str, reason: str, seconds: float) -> None:
        print(
            f"warning: rank {self._rank}: {file} cannot be read: {reason}; trying again for up to {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def taken_waits(self) -> list[dict[str, Any]]:
        """What was waited for since the last call, for events.jsonl."""
        waits, self._waits = self._waits, []
        return [asdict(wait) for wait in waits]

    def begin(self) -> None:
        """Reads may wait, again."""
        self._ended.clear()

    def end(self) -> None:
        """What is being read is needed no more: from now on no read waits."""
        self._ended.set()


def _file_and_reason(error: OSError | UnreadableError) -> tuple[str, str]:
    if isinstance(error, UnreadableError):
        if error.number is None:
            return error.file, str(error)
        return error.file, _words(error.number)
    return str(error.filename or "a file of the data"), _words(error.errno) if error.errno else str(error)


def _words(number: int) -> str:
    return f"{os.strerror(number)} (errno {number}, {errno.errorcode.get(number, '?')})"
