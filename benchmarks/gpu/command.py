"""How a command goes through its parts: most important first, within a time, one line of its record after each.

A part is a function from `Context` to a dictionary. It raises `Failed` with what it measured where a check does not
hold, `Unavailable` where this machine lacks what it needs, and `Late` where the time was over before it ended.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import record
from benchmarks.gpu.processes import end_all_below
from benchmarks.gpu.record import CUT, FAILED, PASSED, ROOT, SKIPPED, Entry, Record

NO_GPU, TIME_OVER = 3, 4
CPU_RESULTS = ROOT / "runs" / "gpu-kit"
"""Of `--device cpu`: tests of the commands, not results."""
GRACE_SECONDS = 20.0
"""How long a part may overrun before the process is ended: a kernel that hangs cannot be interrupted."""


class Unavailable(Exception):
    """This machine lacks what the part needs; the message says what."""


class Late(Exception):
    """The time was over before the part ended. It is tried again behind all others: it may hang."""


class Failed(Exception):
    """A check did not hold. `result` is recorded beside the message."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a part may know."""

    device: torch.device
    tiny: bool
    """Shapes that an interpreter can compute."""
    results: Path
    """Folder of the records: a part may read what an earlier one measured."""
    remaining: Callable[[], float]
    """Seconds that are left for this part and all after it."""
    asked: frozenset[str] = frozenset()
    """Parts that this command will compute, those that it has computed among them."""
    shared: bool = False
    """Whether others use the device too: speeds of training are not recorded."""
    say: Callable[[str], None] = print
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Part -> result of every part that passed, of this run and of the record."""


@dataclass(frozen=True)
class Part:
    """`least_seconds`: it is not begun with less time left."""

    name: str
    compute: Callable[[Context], dict[str, Any]]
    least_seconds: float = 5.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=540.0, help="in which the command ends (default 540)")
    parser.add_argument("--only", metavar="PART", action="append", help="parts of this name or beginning; repeatable")
    parser.add_argument("--list", action="store_true", help="the parts in their order, and which are recorded")
    parser.add_argument("--again", action="store_true", help="parts that are recorded too")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda; cpu tests the command"
    )
    parser.add_argument("--tiny", action="store_true", help="shapes for an interpreter: --device cpu needs it")
    parser.add_argument(
        "--shared", action="store_true", help="others use the GPU too: no speed of training is recorded"
    )
    parser.add_argument(
        "--results", type=Path, help=f"folder of the records (default {record.RESULTS.relative_to(ROOT)})"
    )


def prepare(options: argparse.Namespace) -> int | None:
    """Exit status of a command that cannot run here, after one line that says why; else None."""
    if options.list:  # on any machine: what would run can be read before a card is there
        return None
    why = None
    if has_no_gpu(options):
        why = "there is no GPU here: nothing was checked and nothing was timed (--device cpu --tiny tests the command)"
    elif options.device == "cpu" and not options.tiny:
        why = "--device cpu needs --tiny: an interpreter computes no shipped shape"
    elif options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        why = "--device cpu needs TRITON_INTERPRET=1 in the environment: its kernels are interpreted"
    elif options.device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        why = "TRITON_INTERPRET=1 turns the compiler off: unset it"
    if why is not None:
        print(f"benchmarks.gpu {options.command}: {why}", file=sys.stderr)
        return NO_GPU if has_no_gpu(options) else 2
    return None


def has_no_gpu(options: argparse.Namespace) -> bool:
    """Whether a GPU is asked for and is not here."""
    return options.device == "cuda" and not torch.cuda.is_available()


def run_parts(
    options: argparse.Namespace, parts: Sequence[Part], *, clock: Callable[[], float] = time.monotonic
) -> int:
    """Exit status: 0 if no part failed, 1 if one did, `TIME_OVER` if none did but some did not end or begin in time."""
    begin = clock()

    def remaining() -> float:
        return options.seconds - (clock() - begin)

    folder = options.results or (record.RESULTS if options.device == "cuda" else CPU_RESULTS)
    if options.only:
        unknown = [name for name in options.only if not any(part.name.startswith(name) for part in parts)]
        if unknown:  # also beside others: minutes on a card would go by without what was asked for
            print(f"benchmarks.gpu {options.command}: no part is called {', '.join(unknown)}: see --list")
            return 2
        parts = [part for part in parts if part.name.startswith(tuple(options.only))]
    if options.list and has_no_gpu(options):
        return _list(parts, {})  # no card, so no record of this one
    book = Record(folder, options.command, record.identity(options.device))
    done = book.done()
    if options.list:
        return _list(parts, done)
    cut = book.cut()
    parts = sorted(parts, key=lambda part: part.name in cut)  # behind all others
    device = torch.device(options.device)
    asked = frozenset(part.name for part in parts if options.again or part.name not in done)
    context = Context(
        device=device, tiny=options.tiny, results=folder, remaining=remaining, asked=asked, shared=options.shared
    )
    context.measured.update({name: entry.result for name, entry in done.items() if entry.status == PASSED})
    on = book.identity
    print(f"{on.card}, driver {on.driver}, torch {on.torch}, triton {on.triton}, revision {record.revision()}")
    print(f"{len(parts)} parts, {options.seconds:.0f} s, to {book.path}")
    entries, left = [], []
    for number, part in enumerate(parts, start=1):
        if part.name in done and not options.again:
            entries.append(done[part.name])
            continue
        if remaining() < part.least_seconds:
            left.append(part.name)
            continue
        print(f"[{number}/{len(parts)}, {remaining():.0f} s left] {part.name}", flush=True)
        entry = run_part(part, context, book, clock)
        entries.append(entry)
        print(f"    {entry.status} in {entry.seconds:.1f} s{_reason(entry)}", flush=True)
        if device.type == "cuda" and entry.status == FAILED and not _usable():
            _begin_anew(options, remaining())
    return _summary(entries, left)


def _list(parts: Sequence[Part], done: Mapping[str, Entry]) -> int:
    for part in parts:
        print(f"{part.name:48} {done[part.name].status if part.name in done else '-'}")
    return 0


def run_part(part: Part, context: Context, book: Record, clock: Callable[[], float]) -> Entry:
    """Computes one part and records it; an exception of any kind is the part's own failure."""
    begin = clock()

    def end(status: str, result: dict[str, Any]) -> Entry:
        return book.append(part.name, status, clock() - begin, result)

    with _ended_after(context.remaining() + GRACE_SECONDS, lambda: end(CUT, {"reason": "it did not end in time"})):
        try:
            result = part.compute(context)
        except Unavailable as why:
            return end(SKIPPED, {"reason": str(why)})
        except Late as why:
            return end(CUT, {"reason": str(why)})
        except Failed as why:
            return end(FAILED, why.result | {"reason": str(why)})
        except Exception as error:
            return end(FAILED, {"reason": f"{type(error).__name__}: {str(error)[:2000]}"})
    context.measured[part.name] = result
    return end(PASSED, result)


class _ended_after:
    """Ends the process after `seconds`, unless the block is left before."""

    def __init__(self, seconds: float, on_end: Callable[[], object]) -> None:
        self._timer = threading.Timer(max(seconds, 1.0), self._end)
        self._timer.daemon, self._on_end = True, on_end

    def _end(self) -> None:
        self._on_end()
        print("    cut: it did not end in time", flush=True)
        end_all_below(os.getpid())
        os._exit(TIME_OVER)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _usable() -> bool:
    """Whether CUDA still works: after an illegal address no call of this process does."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def _begin_anew(options: argparse.Namespace, seconds: float) -> None:
    """The same command in a fresh process, with the time that is left; what is recorded is not repeated."""
    print(f"    CUDA is unusable after it: a fresh process goes on with {seconds:.0f} s", flush=True)
    words = [sys.executable, "-m", "benchmarks.gpu", options.command, "--seconds", f"{seconds:.0f}"]
    for name in options.only or ():
        words += ["--only", name]
    if options.results:
        words += ["--results", str(options.results)]
    if options.shared:
        words.append("--shared")
    os.execv(sys.executable, words)


def _reason(entry: Entry) -> str:
    return f": {entry.result['reason'].splitlines()[0][:300]}" if entry.result.get("reason") else ""


def _summary(entries: Sequence[Entry], left: Sequence[str]) -> int:
    from benchmarks.gpu.tables import entries_table

    print("\n" + entries_table(entries))
    failed, cut = ([entry.part for entry in entries if entry.status == status] for status in (FAILED, CUT))
    print(f"\n{len(entries)} parts, {len(failed)} failed, {len(cut)} cut, {len(left)} not begun")
    for part in failed:
        print(f"  failed: {part}")
    if left:
        print(f"  not begun, the time was over: {', '.join(left)}; the same command goes on with them")
    if cut:
        print(f"  cut, they did not end in time: {', '.join(cut)}; the same command tries them again")
    return 1 if failed else TIME_OVER if left or cut else 0
