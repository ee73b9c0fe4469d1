"""common/resident.py: what this process holds, whatever started it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import resident
from common.paths import REPOSITORY

CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); from common.resident import resident_bytes; print(*resident_bytes())"
)
PARENT = "import subprocess, sys; held = b'x' * 200_000_000; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"

TELLS_PEAKS = os.access("/proc/self/clear_refs", os.W_OK) and b"VmHWM" in resident.STATUS.read_bytes()
peaks = pytest.mark.skipif(not TELLS_PEAKS, reason="this system, or the sandbox, tells no peak of a process's own")


@peaks
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    line = [sys.executable, "-c", PARENT, CHILD, str(REPOSITORY)]
    now, peak = map(int, subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())
    assert 1_000_000 < now <= peak < 100_000_000


@peaks
def test_a_peak_is_of_what_came_since_it_was_forgotten() -> None:
    held = b"x" * 60_000_000
    del held
    resident.forget_peak()
    before, peak = resident.resident_bytes()
    assert peak - before < 30_000_000
    held = b"x" * 60_000_000
    assert resident.resident_bytes()[1] - before > 50_000_000 < len(held)


def test_a_peak_that_cannot_be_forgotten_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose /proc is for reading."""
    monkeypatch.setattr(resident, "CLEAR", tmp_path / "is" / "missing")
    assert not resident.forget_peak()
    (tmp_path / "is").mkdir()
    assert resident.forget_peak()


@pytest.mark.parametrize("status, present", [(None, None), (b"Name:\tpython\nVmRSS:\t  12 kB\n", 12 * 1024)])
def test_what_proc_leaves_out_is_what_the_system_knows(
    status: bytes | None, present: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sandboxes have no line of the peak, and that of the present memory."""
    monkeypatch.setattr(resident, "STATUS", tmp_path / "status")
    if status is not None:
        resident.STATUS.write_bytes(status)
    now, peak = resident.resident_bytes()
    assert now == (present or peak) and peak > 1_000_000


def test_a_name_that_was_cut_within_a_letter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel keeps 15 bytes of a process's name."""
    monkeypatch.setattr(resident, "STATUS", tmp_path / "status")
    resident.STATUS.write_bytes(b"Name:\tpyth\xc3\nVmHWM:\t      30 kB\nVmRSS:\t      20 kB\n")
    assert resident.resident_bytes() == (20 * 1024, 30 * 1024)
