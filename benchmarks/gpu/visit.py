"""`visit`: a GPU that is lent for some minutes. Goes through the list of visit_list.py in its order, each stop in a
process of its own and in its own time, so that one that hangs or dies costs no more than that.

It ends within --seconds; the same command goes on with what is left, by the records of the other commands in --results.
At its end it prints what passed, what failed and what is left, and the numbers that matter.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import command, record, visit_numbers
from benchmarks.gpu.command import CPU_RESULTS, GRACE_SECONDS, TIME_OVER, Part
from benchmarks.gpu.processes import within
from benchmarks.gpu.record import CUT, FAILED, PASSED, Entry, Record
from benchmarks.gpu.tables import Rows, headline, markdown
from benchmarks.gpu.visit_list import STOPS, Stop

START_SECONDS = 15.0
"""Of a process until its first part."""
END_SECONDS = GRACE_SECONDS + 15.0
"""That a process gets beyond its own time to end itself."""

MOST_DEATHS = 3
"""Of the processes of a stop in one call: who dies as it starts dies again."""

Runner = Callable[[list[str], float], int]
"""Command line and the seconds after which it is killed -> exit status."""


def add_command(commands: Any) -> None:
    what = "the next time on one GPU: all that is to be run there, in its order, in several calls"
    parser = commands.add_parser("visit", help=what, description=what)
    parser.add_argument("--seconds", type=float, default=540.0, help="in which the call ends (default 540)")
    parser.add_argument("--list", action="store_true", help="the list, and what is recorded")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda; cpu tests the command"
    )
    parser.add_argument("--tiny", action="store_true", help="shapes for an interpreter: --device cpu needs it")
    parser.add_argument("--results", type=Path, help="folder of the records, as of the other commands")
    parser.set_defaults(act=act)


def act(options: argparse.Namespace) -> int:
    status = command.prepare(options)
    return status if status is not None else visit(options, STOPS, run=run, clock=time.monotonic)


@dataclass(frozen=True)
class Planned:
    """A stop with the parts that it has here."""

    stop: Stop
    only: tuple[str, ...]
    parts: Sequence[Part]


def planned(stops: Sequence[Stop], *, tiny: bool) -> list[Planned]:
    """`tiny`: with the small model instead of every other; what it has not is left out."""
    known: dict[str, list[Part]] = {}
    found = []
    for stop in stops:
        if stop.command not in known:
            known[stop.command] = list(importlib.import_module(f"benchmarks.gpu.{stop.command}").parts(tiny=tiny))
        names = [*stop.only, *map(shrunk, stop.only)] if tiny else stop.only
        only = tuple(
            name for name in dict.fromkeys(names) if any(part.name.startswith(name) for part in known[stop.command])
        )
        parts = [part for part in known[stop.command] if part.name.startswith(only)] if only else []
        if parts:
            found.append(Planned(stop, only, parts))
    return found


def shrunk(name: str) -> str:
    """The beginning of a part's name with the tiny model in it."""
    return " ".join("tiny" if word in ("1b", "262m") else word for word in name.split())


def visit(options: argparse.Namespace, stops: Sequence[Stop], *, run: Runner, clock: Callable[[], float]) -> int:
    """Exit status: 0 if all passed, 1 if a part failed, TIME_OVER if none did but some are left."""
    begin = clock()
    folder = (options.results or (record.RESULTS if options.device == "cuda" else CPU_RESULTS)).resolve()
    plan = planned(stops, tiny=options.tiny)
    if options.list and command.has_no_gpu(options):
        print(markdown(_rows(plan, {})))
        return 0
    identity = record.identity(options.device)
    books = {each.stop.command: Record(folder, each.stop.command, identity) for each in plan}
    if options.list:
        print(markdown(_rows(plan, {name: book.last() for name, book in books.items()})))
        return 0
    if not is_writable(folder):
        print(f"benchmarks.gpu visit: nothing can be written to {folder}: no part would be recorded", file=sys.stderr)
        return 2
    going = _Call(options, folder, books, begin + options.seconds, run, clock)
    # What hung or died before is tried again behind all others.
    order = sorted(enumerate(plan, start=1), key=lambda item: not going.missing(item[1], going.cut(item[1])))
    for number, each in order:
        going.through(f"stop {number} of {len(plan)}", each)
    entries = {name: book.last() for name, book in books.items()}
    rows = _rows(plan, entries)
    print("\n" + markdown(rows) + "\n" + "\n".join(visit_numbers.lines(entries)))
    found = [entry for each in plan for entry in _entries(each, entries)]
    for entry in found:
        if entry.status != PASSED:
            print(f"{entry.status}: {entry.part}: {headline(entry)}")
    left_out = sum(len(each.parts) for each in plan) - sum(entry.status in (PASSED, FAILED) for entry in found)
    if left_out:
        print(f"{left_out} parts are left: the same command goes on with them")
    return 1 if any(entry.status == FAILED for entry in found) else TIME_OVER if left_out else 0


def is_writable(folder: Path) -> bool:
    """Makes it, too."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@dataclass(frozen=True)
class _Call:
    """One call of the command, which ends at `end`."""

    options: argparse.Namespace
    folder: Path
    books: Mapping[str, Record]
    end: float
    run: Runner
    clock: Callable[[], float]

    def cut(self, each: Planned) -> set[str]:
        return self.books[each.stop.command].cut()

    def missing(self, each: Planned, without: Container[str] = ()) -> list[Part]:
        done = self.books[each.stop.command].done()
        return [part for part in each.parts if part.name not in done and part.name not in without]

    def through(self, name: str, each: Planned) -> None:
        """Starts the command of a stop; and anew in the rest of its time where a part killed it, without that one."""
        book, end = self.books[each.stop.command], self.clock() + each.stop.limit
        died: set[str] = set()
        while len(died) < MOST_DEATHS and (parts := self.missing(each, died)):
            begin = self.clock()
            left = self.end - begin - START_SECONDS - END_SECONDS
            seconds = min(end - begin, left)
            if seconds < min(part.least_seconds for part in parts):
                return  # a later stop may be shorter
            print(f"\n=== {name}, {left:.0f} s left: {each.stop.call}", flush=True)
            before = book.last()
            code = self.run(self._line(each, seconds), START_SECONDS + seconds + END_SECONDS)
            print(f"=== {name} ended with {code}", flush=True)
            if code >= 0:
                return
            part = underway(each, before, book.last())
            if part is None or part.name in died:
                return
            died.add(part.name)
            book.append(part.name, CUT, self.clock() - begin, {"reason": f"its process ended with {code}"})

    def _line(self, each: Planned, seconds: float) -> list[str]:
        line = [sys.executable, "-m", "benchmarks.gpu", each.stop.command, "--seconds", f"{seconds:.0f}"]
        for name in each.only:
            line += ["--only", name]
        line += ["--device", self.options.device, "--results", str(self.folder)]
        return [*line, "--tiny"] if self.options.tiny else line


def underway(each: Planned, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> Part | None:
    """The part of which a process died, and so recorded nothing: in the order of command.py the first one without a new
    entry."""
    for part in sorted(each.parts, key=lambda part: part.name in before and before[part.name].status == CUT):
        is_done = part.name in before and before[part.name].status in (PASSED, FAILED)
        if not is_done and after.get(part.name) == before.get(part.name):
            return part
    return None


def run(line: list[str], seconds: float) -> int:
    code = within(line, seconds, record.ROOT)
    return -signal.SIGKILL if code is None else code


def _entries(each: Planned, entries: Mapping[str, Mapping[str, Entry]]) -> list[Entry]:
    last = entries.get(each.stop.command, {})
    return [last[part.name] for part in each.parts if part.name in last]


def _rows(plan: Sequence[Planned], entries: Mapping[str, Mapping[str, Entry]]) -> Rows:
    rows: Rows = [("stop", "parts", "passed", "failed", "left", "s", "expected s")]
    for each in plan:
        found = _entries(each, entries)
        passed, failed = (sum(entry.status == status for entry in found) for status in (PASSED, FAILED))
        counts = (len(each.parts), passed, failed, len(each.parts) - passed - failed)
        seconds = f"{sum(entry.seconds for entry in found):.0f}"
        rows.append(
            (" ".join([each.stop.command, ", ".join(each.only)]), *map(str, counts), seconds, str(each.stop.seconds))
        )
    return rows


def document_rows() -> Rows:
    """The table of docs/untested-on-gpu.md."""
    return [("call", "s", "why"), *((f"`{stop.call}`", str(stop.seconds), stop.why) for stop in STOPS)]
