"""What a command costs: CPU seconds, seconds by the clock, and the peak of its memory, all its processes together."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from common.paths import REPOSITORY

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


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
        variables = os.environ | (environment or {})
        process = psutil.Popen(command, stdout=output, stderr=output, cwd=REPOSITORY, env=variables)
        with _sampled_memory(process) as peak:
            code = process.wait()
    if code:
        raise RuntimeError(f"{command[:4]} failed: {log.read_text(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Cost(cpu, time.monotonic() - started, peak[0])


def prepare(work: Path, name: str, paths: list[Path], command: str = "run", **keys: Any) -> Cost:
    """Our own preparation into the empty folder work/NAME; `keys` are those of its config."""
    shutil.rmtree(work / name, ignore_errors=True)
    body = {"input": [str(path) for path in paths], "output": str(work / name), "workers": 1, **keys}
    file = work / f"{name}.json"
    file.write_text(json.dumps(body), encoding="utf-8")
    line = [sys.executable, "-m", "data_prep", command, "--config", str(file)]
    return measure(line, log=work / f"{name}.log", environment=ONE_THREAD)


@contextlib.contextmanager
def _sampled_memory(root: psutil.Process) -> Iterator[list[int]]:
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(psutil.NoSuchProcess):
                peak[0] = max(peak[0], sum(map(_resident_bytes, [root, *root.children(recursive=True)])))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


def _resident_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0
