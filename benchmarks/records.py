"""What a benchmark on a CPU measured, kept: benchmarks/results/cpu/WHAT.json, one for each question, the newest.

Each says on what (processor, cores, load, versions), when (UTC), of which sources and by which command it was measured.
benchmarks/page.py makes the tables and pictures of docs/benchmarks.md of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.record import revision, without_places
from common.errors import DataError
from common.files import write_json
from common.limits import usable_cores
from common.paths import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results" / "cpu"


class Kept(NamedTuple):
    """One record."""

    what: str
    about: dict[str, Any]
    """What `machine` gave when the measurement began."""
    command: str
    found: Any
    """What was measured: JSON, its form is the benchmark's own."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """--keep, the same for every benchmark."""
    parser.add_argument(
        "--keep",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help="keep what was measured in FOLDER (default: benchmarks/results/cpu, of which python -m benchmarks.page "
        "makes docs/benchmarks.md)",
    )


def machine() -> dict[str, Any]:
    """Processor, cores of this process, load before it began, versions, revision of the sources and date (UTC)."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "revision": revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def heading(about: dict[str, Any]) -> str:
    """The line above a table."""
    return (
        f"{about['processor']}, {about['cores']} cores, load {about['load']} before; Python {about['python']}, torch "
        f"{about['torch']}, DeepSpeed {about['deepspeed']}; revision {about['revision']}, {about['date'][:10]}"
    )


def keep(folder: Path, what: str, about: dict[str, Any], found: Any) -> Path:
    """Replaces the record of `what`, whole or not at all. `about`: of `machine`, before the measurement."""
    command = without_places(shlex.join(["python", "-m", program(), *sys.argv[1:]]))
    path = folder / f"{what}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"what": what, "about": about, "command": command, "found": without_places(found)})
    return path


def show(keep_in: Path | None, what: str, about: dict[str, Any], found: Any, text: str) -> None:
    """Prints the tables of a measurement under a line that says on what it was made; keeps it if --keep was given."""
    print(f"{heading(about)}\n{text}")
    if keep_in is not None:
        keep(keep_in, what, about, found)


def read(what: str, folder: Path = RESULTS) -> Kept | None:
    """None if it was never kept. Raises DataError for a file that is no record."""
    path = folder / f"{what}.json"
    if not path.exists():
        return None
    try:
        return Kept(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is no record of a benchmark ({error}); measure it again with --keep") from error


def program() -> str:
    """The module that Python was started with."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).stem


def processor() -> str:
    """As Linux names it, or as Python does."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"model name\s*:\s*(.+)", text)
    return named[1].strip() if named else platform.machine()
