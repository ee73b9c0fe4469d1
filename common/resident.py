"""Resident memory of this process, by /proc; where that is absent, the most that the system knows."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> tuple[int, int]:
    """Now, and at its peak since the process began or `forget_peak` was called. Not getrusage's maximum: a process
    inherits that of the one that started it."""
    try:
        lines = re.findall(r"(?m)^(VmRSS|VmHWM):\s+(\d+) kB$", STATUS.read_text("utf-8", "replace"))
    except OSError:  # not Linux
        lines = []
    found = {name: 1024 * int(size) for name, size in lines}  # sandboxes leave lines out, most often the peak's
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = found.get("VmHWM") or most
    return found.get("VmRSS", peak), peak


def forget_peak() -> bool:
    """From here on the peak is that of the present memory and of what comes. Returns whether it is: other systems than
    Linux, and sandboxes, keep the peak since the process began."""
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
