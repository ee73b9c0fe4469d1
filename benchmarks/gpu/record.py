"""How a result of a GPU is recorded.

One JSON object a line is one part of a command, appended when the part ends: benchmarks/results/CARD/COMMAND.jsonl. It
says on what (card, driver, versions), when (UTC), of which sources (git revision, or the file that `carry` wrote where
git is absent, and a hash of the sources in any case) and by which command. A part counts as done if a line has its
name and the same card, driver, versions and sources. benchmarks/gpu/tables.py makes the tables of docs/gpu.md of them.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
REVISION_FILE = ROOT / ".carry" / "REVISION"
"""Written by `python -m benchmarks.gpu carry`, read where git is absent."""
SOURCES = ("benchmarks", "common", "model", "pretrain", "launch", "data_prep", "configs")
NO_DRIVER = "none"

PASSED, FAILED, SKIPPED, CUT = "passed", "failed", "skipped", "cut"
"""`failed`: a check did not hold or an exception was raised. `skipped`: what it needs is not on this machine. `cut`:
the time was over before it ended. The last two are not done: they are tried again."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What decides a result: parts with an equal one are not repeated."""

    card: str
    driver: str
    python: str
    torch: str
    cuda: str
    triton: str
    sources: str
    """Hash of every source and configuration file."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a record."""

    part: str
    status: str
    """PASSED, FAILED, SKIPPED or CUT."""
    seconds: float
    result: dict[str, Any]
    """What the part measured; `reason` where it failed or was skipped."""
    identity: dict[str, str]
    revision: str
    date: str
    """UTC, when the part ended."""
    command: str


class Record:
    """The file of one command on one card. `folder`: benchmarks/results, or another for a copy to take away."""

    def __init__(self, folder: Path, command: str, identity: Identity) -> None:
        self.identity = identity
        self.path = folder / slug(identity.card) / f"{command}.jsonl"

    def done(self) -> dict[str, Entry]:
        """Part -> its last entry, of this identity. Parts that were skipped or cut are not done."""
        return {e.part: e for e in self._mine() if e.status in (PASSED, FAILED)}

    def cut(self) -> set[str]:
        """Parts that did not end in their time when they were last begun: one that hangs would do so again."""
        return {part for part, entry in self.last().items() if entry.status == CUT}

    def last(self) -> dict[str, Entry]:
        """Part -> its last entry, of this identity, whatever became of it."""
        return {e.part: e for e in self._mine()}

    def _mine(self) -> list[Entry]:
        mine = dataclasses.asdict(self.identity)
        return [e for e in read(self.path) if e.identity == mine]

    def append(self, part: str, status: str, seconds: float, result: dict[str, Any]) -> Entry:
        """Writes the line at once, so that a stop later loses nothing."""
        entry = Entry(
            part=part,
            status=status,
            seconds=round(seconds, 1),
            result=without_places(result),
            identity=dataclasses.asdict(self.identity),
            revision=revision(),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=without_places(shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(entry)) + "\n"
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            text = "\n" + text  # a line that a kill or a full disk has cut is not to take this one with it
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        return entry


def without_places(found: Any) -> Any:
    """`found`, a tree of JSON, whose texts name no folder of this machine: the checkout's are relative to it, the
    others begin with TMP or HOME. What failed says where it ran."""
    if isinstance(found, dict):
        return {key: without_places(value) for key, value in found.items()}
    if isinstance(found, list):
        return [without_places(value) for value in found]
    if not isinstance(found, str):
        return found
    for place, name in ((f"{ROOT}/", ""), (f"{tempfile.gettempdir()}/", "TMP/"), (f"{Path.home()}/", "HOME/")):
        found = found.replace(place, name)
    return found


def read(path: Path) -> list[Entry]:
    """Every entry of a record, oldest first; none if there is no such file. A last line that was cut is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(Entry(**json.loads(line)))
        except json.JSONDecodeError:
            continue
    return entries


def slug(card: str) -> str:
    """Name of a folder: "NVIDIA H100 80GB HBM3" -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


@functools.cache
def identity(device_type: str) -> Identity:
    """Of this process; on a CPU, which only tests the commands, the card is "CPU"."""
    on_gpu = device_type == "cuda"
    return Identity(
        card=torch.cuda.get_device_name() if on_gpu else "CPU",
        driver=_driver() if on_gpu else NO_DRIVER,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or NO_DRIVER,
        triton=_triton_version(),
        sources=sources(ROOT),
    )


def sources(root: Path) -> str:
    """Hash of names and contents of the sources, so that a tree without git, or with changes, is told from others."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root)
            if path.suffix in (".py", ".cu", ".json") and "results" not in name.parts:
                digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def revision(root: Path = ROOT, file: Path = REVISION_FILE) -> str:
    """git's revision, with "+changes" where tracked files differ from it; else what `file` says; else "unknown"."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    if top is not None and Path(top).resolve() == root:
        head = git("rev-parse", "--short=12", "HEAD")
        if head is not None:
            changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
            return head + ("+changes" if changed else "")
    return file.read_text(encoding="utf-8").strip() if file.exists() else "unknown"


def _driver() -> str:
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return NO_DRIVER
    return done.stdout.split("\n")[0].strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return NO_DRIVER
    return str(triton.__version__)
