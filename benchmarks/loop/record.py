"""On what something was measured, and the line that keeps it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import revision


def machine() -> dict[str, Any]:
    """Processor, cores of this process, versions, revision of the sources and date (UTC)."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "revision": revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def heading(about: dict[str, Any]) -> str:
    """The line above a table."""
    return (
        f"{about['processor']}, {about['cores']} cores; Python {about['python']}, torch {about['torch']}, DeepSpeed "
        f"{about['deepspeed']}; revision {about['revision']}, {about['date']}"
    )


def append(path: Path, what: str, about: dict[str, Any], found: dict[str, Any]) -> None:
    """One JSON object, as one line more of `path`."""
    command = shlex.join(["python", "-m", "benchmarks.loop", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"what": what, **about, "command": command, "found": found}) + "\n")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"model name\s*:\s*(.+)", text)
    return named[1].strip() if named else platform.machine()
