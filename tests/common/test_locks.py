"""Locks between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.locks import NoLocks, file_lock
from common.paths import REPOSITORY

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from common.locks import file_lock
with file_lock(Path(sys.argv[2]), shared=sys.argv[3] == "shared") as held:
    print(held, flush=True)
    time.sleep(600)
"""


def holder(path: Path, how: str) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(REPOSITORY), str(path), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


@pytest.mark.parametrize("how", ["shared", "alone"])
def test_a_lock_is_held_by_one_or_shared_and_ends_with_the_process(tmp_path: Path, how: str) -> None:
    path = tmp_path / "new" / "lock"
    other = holder(path, how)
    try:
        with file_lock(path, wait=False) as held:
            assert not held
        with file_lock(path, shared=True, wait=False) as held:
            assert held == (how == "shared")
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with file_lock(path) as held:
        assert held and path.exists()


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()
    with file_lock(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with file_lock(tmp_path / "lock", wait=False) as held:
            assert held
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(NoLocks, match="No locks available"), file_lock(tmp_path / "lock"):
        pass
