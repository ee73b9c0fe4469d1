"""The deepspeed command as tests give it, and a session whose processes end with the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from common.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def command(ranks: int, prepared: Path, run_dir: Path, *overrides: str) -> list[str]:
    """A run of the tiny model on `ranks` processes of this machine."""
    line = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(ROOT / "launch" / "pretrain.py"),
        "--config",
        str(ROOT / "configs" / "switchall_tiny.json"),
        "--run-dir",
        str(run_dir),
        "--set",
        f"data.manifest={prepared}",
        "--set",
        "monitor.tensorboard=false",
    ]
    return line + [part for override in overrides for part in ("--set", override)]


def environment() -> dict[str, str]:
    """Without what the test harness sets for its own ranks."""
    dropped = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHONPATH")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, "PATH": path}


def run(*line: str, cwd: Path) -> None:
    done = subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def lines(run_dir: Path) -> list[str]:
    """What a run has written to metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@contextmanager
def session(
    line: Sequence[str], *, cwd: Path, output: int | IO[str] = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """`line`, started in `cwd` with the environment of a test, both its streams into `output`. At the end every process
    of its session is killed: a failed check must not leave a job behind, which would slow the tests that follow."""
    process = subprocess.Popen(
        line, cwd=cwd, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True, text=True
    )
    try:
        yield process
    finally:
        for member in members(process):
            member.kill()
        process.wait()


def members(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process of the session that `process` leads, zombies left out."""
    found = psutil.process_iter(["status"])
    return [p for p in found if _session(p.pid) == process.pid and p.info["status"] != psutil.STATUS_ZOMBIE]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks of the session in rank order; their launcher is their parent."""
    lines = {member: _line(member) for member in members(process)}
    ranks = [
        (rank, member)
        for member, line in lines.items()
        if "deepspeed.launcher.launch" not in line and (rank := _local_rank(line)) is not None
    ]
    return [member for _, member in sorted(ranks, key=lambda found: found[0])]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ended meanwhile
        return []


def _local_rank(line: list[str]) -> int | None:
    given = [part.removeprefix("--local_rank=") for part in line if part.startswith("--local_rank=")]
    return int(given[0]) if given else None
