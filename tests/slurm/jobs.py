"""Submitting to the test cluster as a user does, and waiting for what SLURM makes of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.slurm import job
from tests.slurm.cluster import Cluster

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def submit(cluster: Cluster, command: str, *arguments: str, cwd: Path) -> list[str]:
    """Runs launch/slurm/COMMAND; returns the jobs' numbers."""
    done = subprocess.run(
        [sys.executable, str(job.FOLDER / command), "--allow-local", *arguments],
        env=cluster.environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.match(r"submitted jobs? ([\d ]+):", done.stdout)
    assert match is not None, done.stdout
    return match[1].split()


def wait_until(ready: Callable[[], bool], what: str, *, seconds: float, say: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s\n{say()}"
        time.sleep(0.1)


def finish(cluster: Cluster, number: str, logs: Path, *, seconds: float = 900) -> dict[str, str]:
    """Waits for the end of a job; returns scontrol's fields. (A requeued job waits for cred_expire + 1 s, 6 here, 121
    by default; started at once, by `scontrol update StartTime=now`, it may fail with "Job credential revoked".)"""

    def ended() -> bool:
        return cluster.job(number)["JobState"] in ENDED

    wait_until(ended, f"end of job {number}", seconds=seconds, say=lambda: said(logs) + cluster.logs())
    return cluster.job(number)


def said(logs: Path) -> str:
    """The ends of all logs of a run."""
    return "".join(f"== {path.name}\n{path.read_text()[-3000:]}\n" for path in sorted(logs.glob("*.log")))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, a torn last line left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
