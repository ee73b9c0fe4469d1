"""Seconds from the start of a process to the end of its first step."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.marked import markdown
from common.arguments import set_options
from common.errors import UserError
from common.paths import REPOSITORY

PRETRAIN = str(REPOSITORY / "launch" / "pretrain.py")
ONE_STEP = ("train.stop_after_steps=1", "train.device=cpu")
"""A step is reported after the next one was launched, unless it is the last. What follows the report (a validation, a
checkpoint) is cut off."""
WANTED_SECONDS = {"python": 6.0}
POLL_SECONDS = 0.01
LIMIT_SECONDS = 300.0


def _python() -> list[str]:
    return [sys.executable, PRETRAIN]


def _deepspeed() -> list[str]:
    """What `deepspeed launch/pretrain.py` runs, in this environment, which may have no console scripts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(port), PRETRAIN]


COMMANDS: dict[str, Callable[[], list[str]]] = {"python": _python, "deepspeed": _deepspeed}


class Start(NamedTuple):
    """Up to the end of the first step."""

    passed: float
    """Seconds."""
    user: float
    """Processor seconds of the process and of all that it started, among them the one that estimates the run."""
    system: float
    trainer: float
    """Processor seconds, user and system, of the process that trains, alone."""


def measure(kind: str, config: Path, overrides: Sequence[str], folder: Path) -> Start:
    """One start. Raises UserError if there is no first step."""
    line = [*COMMANDS[kind](), "--config", str(config), "--run-dir", str(folder / "run")]
    line += set_options([*overrides, *ONE_STEP])
    metrics, log = folder / "run" / "metrics.jsonl", folder / "log"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    with log.open("wb") as to:
        began = time.perf_counter()
        process = psutil.Popen(line, stdout=to, stderr=subprocess.STDOUT, env=environment)
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - began > LIMIT_SECONDS:
                    raise UserError(f"{kind}: no first step; the end of what it said:\n{log.read_text()[-2000:]}")
                time.sleep(POLL_SECONDS)
            passed = time.perf_counter() - began
            return Start(passed, *_worked(process))
        finally:
            _end(process)


def _worked(process: psutil.Popen) -> tuple[float, float, float]:
    """User and system seconds of the process and its descendants, ended ones included; and both of the one that
    trains, which has worked most."""
    user, system, most = 0.0, 0.0, 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            user += times.user + times.children_user
            system += times.system + times.children_system
            most = max(most, times.user + times.system)
    return user, system, most


def _end(process: psutil.Popen) -> None:
    """At once, with all that it started: the launcher restarts or reports nothing any more."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def run(config: Path, overrides: Sequence[str], kinds: Sequence[str], *, starts: int) -> dict[str, list[Start]]:
    """So many starts of each kind, in turns, after one of each that does not count. Raises UserError."""
    found: dict[str, list[Start]] = {kind: [] for kind in kinds}
    for number in range(starts + 1):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                start = measure(kind, config, overrides, Path(folder))
            if number:
                found[kind].append(start)
    return found


def table(found: dict[str, list[Start]]) -> str:
    rows = ["start with  first step s  from - to      user s  system s  trainer's CPU s  wanted"]
    for kind, starts in found.items():
        passed, user, system, trainer = (statistics.median(values) for values in zip(*starts, strict=True))
        times = [start.passed for start in starts]
        span, wanted = f"{min(times):.2f} - {max(times):.2f}", WANTED_SECONDS.get(kind)
        rows.append(
            f"{kind:10}  {passed:12.2f}  {span:13}  {user:6.2f}  {system:8.2f}  {trainer:15.2f}  "
            f"{'-' if wanted is None else f'{wanted:.1f}':>6}"
        )
    return "\n".join([*rows, f"medians of {max(map(len, found.values()))}"])


def to_json(found: dict[str, list[Start]]) -> dict[str, Any]:
    return {
        kind: {
            "first_step_seconds": statistics.median(start.passed for start in starts),
            "starts": [start._asdict() for start in starts],
        }
        for kind, starts in found.items()
    }


def page(found: Any) -> str:
    """The table of docs/benchmarks.md: medians."""
    rows = []
    for kind, one in found.items():
        starts = [Start(**start) for start in one["starts"]]
        passed, user, system, trainer = zip(*starts, strict=True)
        limit = WANTED_SECONDS.get(kind)
        holds = limit is not None and statistics.median(passed) <= limit
        wanted = "-" if limit is None else f"{limit:.0f}: {'held' if holds else 'missed'}"
        middle = [f"{statistics.median(values):.1f}" for values in (trainer, user, system)]
        span = f"{min(passed):.1f} to {max(passed):.1f}"
        rows.append([kind, f"{statistics.median(passed):.1f}", span, wanted, *middle])
    header = [
        "started with",
        "first step, s",
        "from, to",
        "wanted",
        "the trainer's CPU s",
        "user s, all",
        "system s, all",
    ]
    return markdown(header, rows)
