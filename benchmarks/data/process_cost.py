"""What a command costs: CPU seconds, seconds by the clock, and the peak of its memory, all its processes together."""

from __future__ import annotations

import contextlib
import glob
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.paths import REPOSITORY


class Cost(NamedTuple):
    """What a command used."""

    cpu_seconds: float
    """User and system time of the process and its children, start-up included."""
    seconds: float
    peak_bytes: int
    """Largest sum of resident memory over the process and its children, sampled every 50 ms."""


def measure(command: list[str], *, log: Path, environment: dict[str, str] | None = None) -> Cost:
    """Runs a command to its end. Raises RuntimeError with the end of its output if it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=REPOSITORY, env={**os.environ, **(environment or {})}
        )
        with _sampled_memory(process.pid) as peak:
            code = process.wait()
    if code:
        raise RuntimeError(f"{command[:4]} failed: {log.read_text(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Cost(cpu, time.monotonic() - started, peak[0])


@contextlib.contextmanager
def _sampled_memory(root: int) -> Iterator[list[int]]:
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], sum(_resident_bytes(pid) for pid in _family(root)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


def _family(root: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = Path(path).read_text().rpartition(")")[2].split()
            parents[int(path.split("/")[2])] = int(fields[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0
