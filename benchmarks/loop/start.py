"""Seconds from the start of a process to the end of its first step."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.marked import markdown
from common.arguments import set_options
from common.errors import UserError
from common.paths import REPOSITORY
from common.ports import free_port

PRETRAIN = str(REPOSITORY / "launch" / "pretrain.py")
ONE_STEP = ("train.stop_after_steps=1", "train.device=cpu")
"""A step is reported after the next one was launched, unless it is the last. What follows the report (a validation, a
checkpoint) is cut off."""
WANTED_SECONDS = {"python": 6.0}
POLL_SECONDS = 0.01
LIMIT_SECONDS = 300.0


KINDS = ("python", "deepspeed")


def command(kind: str) -> list[str]:
    """What python or deepspeed with launch/pretrain.py runs; this environment may have no console scripts."""
    runner = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
    return [sys.executable, *(runner if kind == "deepspeed" else ()), PRETRAIN]


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
    line = [*command(kind), "--config", str(config), "--run-dir", str(folder / "run")]
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


def run(config: Path, overrides: Sequence[str], kinds: Sequence[str], *, starts: int) -> dict[str, Any]:
    """So many starts of each kind, in turns, after one of each that does not count. Raises UserError."""
    found: dict[str, Any] = {kind: {"starts": []} for kind in kinds}
    for number in range(starts + 1):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                start = measure(kind, config, overrides, Path(folder))
            if number:
                found[kind]["starts"].append(start._asdict())
    return found


HEADER = ["started with", "first step, s", "from, to", "wanted", "the trainer's CPU s", "user s, all", "system s, all"]


def rows(found: Any) -> list[list[str]]:
    """A line for each kind: medians."""
    lines = []
    for kind, one in found.items():
        passed, user, system, trainer = zip(*(Start(**start) for start in one["starts"]), strict=True)
        limit = WANTED_SECONDS.get(kind)
        holds = limit is not None and statistics.median(passed) <= limit
        wanted = "-" if limit is None else f"{limit:.0f}: {'held' if holds else 'missed'}"
        middle, *others = (f"{statistics.median(values):.1f}" for values in (passed, trainer, user, system))
        lines.append([kind, middle, f"{min(passed):.1f} to {max(passed):.1f}", wanted, *others])
    return lines


def page(found: Any) -> str:
    """The table of docs/benchmarks.md."""
    return markdown(HEADER, rows(found))
