"""What a process may take of its machine, by hand-made cgroups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common import limits


def in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(f"{text}\n")
    (tmp_path / "groups").write_text(f"{groups}\n")
    monkeypatch.setattr(limits, "CGROUPS", str(tmp_path / "groups"))
    monkeypatch.setattr(limits, "CGROUP_MOUNT", tmp_path / "mount")


@pytest.mark.parametrize(
    "groups, files, limit",
    [
        ("0::/slurmstepd.scope/job_7/step_0/user", {"slurmstepd.scope/job_7/memory.max": "1000"}, 1000),
        ("5:cpu:/s\n4:memory:/s/job_7/step_0", {"memory/s/job_7/memory.limit_in_bytes": "1000"}, 1000),
        ("0::/", {"memory.max": "2000"}, 2000),  # a container's own view
        ("0::/pod/one", {"pod/memory.max": "2000", "pod/one/memory.max": "1000"}, 1000),
        ("0::/pod/one", {"pod/memory.max": "1000", "pod/one/memory.max": "2000"}, 1000),
        ("0::/a", {"a/memory.max": "max"}, float("inf")),
        ("no cgroups", {}, float("inf")),
    ],
)
def test_the_memory_of_a_job_is_that_of_its_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], limit: float
) -> None:
    """SLURM limits the group of a job, which is neither that of its processes nor the root."""
    in_groups(tmp_path, monkeypatch, groups, files)
    assert limits.memory_limit() == limit


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/pod/one", {"pod/cpu.max": "250000 100000", "pod/one/cpu.max": "max 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "9900000 100000"}, 16),  # more than its mask has
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("3:cpuacct,cpu:/d\n0::/", {"cpu/d/cpu.cfs_quota_us": "300000", "cpu/d/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/d", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, 16),
        ("3:cpuset:/d", {"cpuset/d/cpu.max": "100000 100000"}, 16),
    ],
)
def test_cores_are_those_of_the_mask_and_of_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], cores: int
) -> None:
    """`docker run --cpus=4` leaves all cores in the mask: 16 threads would share the time of four."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    in_groups(tmp_path, monkeypatch, groups, files)
    assert limits.usable_cores() == cores


def test_without_a_mask_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, which has no cgroups either."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(limits, "CGROUPS", str(tmp_path / "absent"))
    assert limits.usable_cores() == 6
