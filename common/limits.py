"""What this process may take of its machine: cores and memory, by its own mask and by the limits of its cgroups, which
a container or a job has. Runs on Python 3.8, for launch/doctor.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = "/proc/self/cgroup"
CGROUP_MOUNT = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process and its children can keep busy, at least 1: those of its mask (SLURM, taskset), or fewer
    where its cgroup has less processor time (`docker run --cpus`, a limit of Kubernetes)."""
    # macOS has no mask.
    masked = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(masked, cores_of_quota() or masked)


def cores_of_quota() -> int | None:
    """The processor time that the cgroups of this process, and those around them, allow, in whole cores, at least 1.
    None without a limit. All processes of the group share it."""
    quotas = []
    for folder, is_second in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            if is_second:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0 and period > 0:  # -1: no limit, in version 1
                quotas.append(max(1, quota // period))
    return min(quotas, default=None)


def memory_limit() -> float:
    """Bytes that the cgroups of this process, and those around them, allow: a job's limit is in a group of its own, far
    below the root. Infinite without a limit."""
    limits = [float("inf")]
    for folder, is_second in _groups("memory"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int((folder / ("memory.max" if is_second else "memory.limit_in_bytes")).read_text()))
    return min(limits)


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of the cgroups that limit this process, each with whether it is of version 2."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(CGROUPS).read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            is_second = number == "0" and not controllers
            if not is_second and controller not in controllers.split(","):
                continue
            root = CGROUP_MOUNT if is_second else CGROUP_MOUNT / controller
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                yield folder, is_second
                if folder == root:
                    break
