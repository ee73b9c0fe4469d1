"""What this rank is doing, kept where the other ranks of its machine can read it even if it no longer answers."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_RECORD = struct.Struct("<dqq64s")
"""Time (seconds since the epoch), count of phases entered, step, name; what is longer is cut."""


@dataclass(frozen=True)
class Record:
    """One phase of one rank."""

    time: float
    """When it began, seconds since the epoch."""
    count: int
    """Phases entered before it: ranks run the same phases in the same order."""
    step: int
    name: str

    def __str__(self) -> str:
        return f"phase '{self.name}' of step {self.step}" if self.step else f"phase '{self.name}' of the start-up"


class Phases:
    """The current phase. Entering one costs a few microseconds: a write into a mapped page, no system call."""

    def __init__(self) -> None:
        self.record = Record(time.time(), 0, 0, "start")
        self.since = time.monotonic()
        """When the phase began, by this process's clock."""
        self.is_patient = False
        """The phase may take any time."""
        self.is_quick = False
        """The phase is nothing but a step's own work, for which every rank has its data: `step_limit` holds."""
        self.step_limit: float | None = None
        """Seconds that a quick phase may take; None: as long as any other."""
        self.step = 0
        """The optimizer step under way (from 1); 0 during start-up."""
        self.on_enter: Callable[[str], None] | None = None
        """Hears the name of every phase that begins."""
        self._map: mmap.mmap | None = None

    def enter(self, name: str, *, patient: bool = False, quick: bool = False) -> None:
        """Called by the main thread of every rank, at the same places."""
        self.since = time.monotonic()  # first: the watchdog's thread must not see the flags with the time before
        self.record = Record(time.time(), self.record.count + 1, self.step, name)
        self.is_patient, self.is_quick = patient, quick
        self._write()
        if self.on_enter is not None:
            self.on_enter(name)

    def may_take_long(self) -> None:
        """The rest of the phase may wait for a disk: it is quick no more."""
        self.is_quick = False

    def alive(self) -> None:
        """Says that the phase makes progress, so that it is no hang."""
        self.since = time.monotonic()

    def keep_in(self, path: Path) -> None:
        """From now on `read` can read the phase from `path`. Raises OSError where the disk has no room for it."""
        with open(path, "w+b") as file:
            file.write(bytes(_RECORD.size))  # a mapped page without a place on the disk would be a SIGBUS
            file.flush()
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        self._write()

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _write(self) -> None:
        if self._map is not None:
            record = self.record
            _RECORD.pack_into(self._map, 0, record.time, record.count, record.step, record.name.encode())


def read(path: Path) -> Record | None:
    """What a rank wrote last; None if there is nothing to read."""
    try:
        began, count, step, name = _RECORD.unpack(path.read_bytes()[: _RECORD.size])
    except (OSError, struct.error):
        return None
    return Record(began, count, step, name.rstrip(b"\0").decode(errors="replace"))
