"""Processes below this one, by /proc: whom a signal is for, and what must not outlive a part."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess


def below(pid: int) -> dict[int, list[str]]:
    """Every process that descends from `pid` -> the words of its command line."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # After the name in brackets: state, parent.
                # As bytes: the kernel cuts a name after 15 of them, also within a letter.
                parents[int(entry.name)] = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue  # it has ended
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {p: lines.get(p, []) for p in found - {pid}}


def ranks_below(pid: int) -> list[int]:
    """Those that run launch/pretrain.py itself, not a launcher whose command line names it."""
    return [
        child
        for child, words in below(pid).items()
        if "-m" not in words and any(word.endswith("launch/pretrain.py") for word in words)
    ]


def within(line: list[str], seconds: float, cwd: Path) -> int | None:
    """Exit code of a command, or None where it was ended, with all that it started, after so many seconds."""
    process = subprocess.Popen(line, cwd=cwd)
    try:
        return process.wait(max(seconds, 0.0))
    except BaseException as error:  # Ctrl-C, or the end of the call, too
        end_all_below(process.pid)
        process.kill()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep what is killed
        process.wait(5)
    return None


def captured(line: list[str], seconds: float, cwd: Path, env: Mapping[str, str]) -> CompletedProcess[str] | None:
    """What a command said, or None where it was ended after so many seconds with all that it started: subprocess.run
    would end the command alone, and wait for what that had started."""
    process = subprocess.Popen(line, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=seconds)
        return CompletedProcess(line, process.returncode, out, err)
    except subprocess.TimeoutExpired:
        end_all_below(process.pid)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5)
        return None


def end_all_below(pid: int) -> None:
    """Kills every descendant of `pid`, which otherwise would keep the GPU."""
    for child in below(pid):
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
