"""Command line of launch/status.py: one screen of a run, or a table of runs, also while they go on."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.arguments import Parser, a_path, above_zero
from common.errors import PassingError, UserError
from common.slurm import jobs_in_queue
from common.strict_json import dumps
from common.tables import listed
from common.terminal import columns_of, follows_escapes, visible
from pretrain.cli.refusals import exit_code_of
from pretrain.views.jobs import jobs_to_come, submitted_jobs
from pretrain.views.reading import LOGS, NotYet, RunView
from pretrain.views.status import runs_table, screen, summary

CLEAR = "\x1b[H\x1b[2J"
QUEUE_SECONDS = 30.0
"""Between two questions to SLURM, whose controller serves everybody."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/status.py",
        description="Shows what a run is doing: state, step, time left, loss, throughput, balance of the experts, the "
        "last events, and what to do next. Several runs become a table. It only reads, so it may look at a run "
        "that goes on, also from another machine on the same file system.",
    )
    parser.add_argument("runs", nargs="+", type=a_path, metavar="RUN", help="run folders, e.g. runs/NAME or runs/*")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show it again and again, until all runs have ended; wait for those that have not begun, and for those "
        "with a SLURM job in the queue",
    )
    parser.add_argument(
        "--every", type=above_zero(86400), default=5.0, metavar="SECONDS", help="of --watch (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON per run, for other programs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: look(args))


def look(args: argparse.Namespace) -> None:
    """Shows the runs once, or with --watch until all have ended or the user has seen enough; with it waits for those
    that have not begun, and for those whose SLURM job has not ended with them. Raises UserError."""
    views, awaited = open_all(args.runs, may_wait=args.watch, alone=len(args.runs) == 1)
    if not views and not awaited:
        raise UserError("RUN: none of these is a run folder")
    clears, gone, said, queue = False, list[UserError](), "", Queue()
    try:
        while True:
            if views:
                fit = args.watch and follows_escapes(sys.stdout)
                below = len(gone) + max(len(said.splitlines()), bool(awaited))  # what follows, as it was the last time
                lines = shutil.get_terminal_size().lines - below if fit else None
                show(views, as_json=args.json, clear=clears, lines=lines)
            for error in gone:  # after the screen, which the next one clears
                how = "shown as it was" if isinstance(error, PassingError) else "passed over"
                print(passed_over(error, how), file=sys.stderr, flush=True)
            queued = queue.jobs_of(views, awaited) if args.watch else {}
            for path, job in queue.ended(awaited).items():
                log = path / "slurm" / f"{job}.log"
                print(passed_over(f"{path}: its job {job} has ended, and no run has begun ({log})"), file=sys.stderr)
                awaited.remove(path)
            text = waiting_text(awaited, queued)
            if text and (clears or text != said):
                print(text, file=sys.stderr, flush=True)
            if not args.watch or not (awaited or queued or any(view.state.goes_on for view in views)):
                return
            time.sleep(args.every)
            clears, said = bool(views) and follows_escapes(sys.stdout), text
            views, gone = updated(views, may_be_none=bool(awaited))
            begun, awaited = open_all(awaited, may_wait=True, alone=len(args.runs) == 1)
            views = sorted([*views, *begun], key=lambda view: args.runs.index(view.path))
    except KeyboardInterrupt:
        print()


def open_all(paths: Sequence[Path], *, may_wait: bool, alone: bool) -> tuple[list[RunView], list[Path]]:
    """The runs, and with `may_wait` the folders that may hold one later. The others are passed over; if `alone`, which
    says that nothing else was asked for, they raise UserError."""
    views, awaited = list[RunView](), list[Path]()
    for path in paths:
        try:
            views.append(RunView.open(path))
        except UserError as error:
            if may_wait and isinstance(error, NotYet):
                awaited.append(path)
                continue
            if isinstance(error, NotYet) and (jobs := submitted_jobs(path)):
                error = UserError(
                    f"RUN: {path}: no run has begun yet; job {jobs[0]} was submitted for it (squeue --job {jobs[0]}; "
                    f"--watch waits for it)"
                )
            if alone:
                raise error from None
            print(passed_over(error), file=sys.stderr, flush=True)
    return views, awaited


def waiting_text(awaited: Sequence[Path], queued: Mapping[Path, str]) -> str:
    """That no run has begun in the folders `awaited`, and what SLURM says of the job of those of `queued`; empty if in
    none."""
    unknown = [str(path) for path in awaited if path not in queued]
    it = "it" if len(unknown) == 1 else "them"
    lines = [f"waiting for {listed(unknown, 3)}: no run has begun in {it} yet"] * bool(unknown)
    lines += [f"waiting for {path}: its job {said}" for path, said in queued.items()]
    return "\n".join(map(visible, lines))


class Queue:
    """What SLURM says of the jobs of runs that do not go on."""

    def __init__(self) -> None:
        self._asked, self._jobs, self._waiting = -math.inf, set[str](), dict[str, str]()
        self._told = set[str]()
        """Jobs of which it has said whether they are in the queue."""

    def jobs_of(self, views: Sequence[RunView], awaited: Sequence[Path]) -> dict[Path, str]:
        """Folder of a run, or of one that has not begun -> the job that will start it, and what it is about: it waits
        in the queue, or its script is about to put it there. Where SLURM cannot be asked, what it said before."""
        jobs = {view.path: jobs_to_come(view) for view in views} | {path: submitted_jobs(path) for path in awaited}
        wanted = {job for found in jobs.values() for job in found}
        is_due = not self._jobs >= wanted or time.monotonic() - self._asked >= QUEUE_SECONDS
        if wanted and is_due:
            with contextlib.suppress(OSError, UserError):
                self._waiting = jobs_in_queue(wanted)
                self._told = wanted
            self._asked, self._jobs = time.monotonic(), wanted
        newest = {path: next((job for job in found if job in self._waiting), None) for path, found in jobs.items()}
        return {path: _job_text(job, self._waiting[job]) for path, job in newest.items() if job is not None}

    def ended(self, awaited: Sequence[Path]) -> dict[Path, str]:
        """Folder of a run that has not begun -> the last job that was submitted for it, where none is in the queue any
        more."""
        jobs = {path: found for path in awaited if (found := submitted_jobs(path)) and self._told.issuperset(found)}
        over = {path: found[0] for path, found in jobs.items() if not self._waiting.keys() & found}
        # Unless a run has begun and ended since it was looked for.
        return {path: job for path, job in over.items() if not any((path / name).exists() for name in LOGS)}


def _job_text(job: str, why: str) -> str:
    """Of a job in the queue, by squeue's word on why it does not run."""
    if re.search("held|hold", why, re.IGNORECASE):
        return f"{job} is held, {why} (scontrol release {job})"
    if why == "DependencyNeverSatisfied":
        return f"{job} waits for one that has failed, and will never start (scancel {job})"
    return f"{job} has not ended (squeue --job {job})"


def updated(views: list[RunView], *, may_be_none: bool = False) -> tuple[list[RunView], list[UserError]]:
    """The runs as they are now, and why others are no more among them: one that somebody removes keeps nobody from the
    others; or are as they were: a file system that does not answer for a moment ends no watch. Raises UserError if none
    is left, unless `may_be_none`."""
    kept, gone = list[RunView](), list[UserError]()
    for view in views:
        try:
            view.update()
        except UserError as error:
            gone.append(error)
            if not isinstance(error, PassingError):
                continue
        kept.append(view)
    if gone and not kept and not may_be_none:
        raise gone[0]
    return kept, gone


def passed_over(error: UserError | str, how: str = "passed over") -> str:
    return visible(f"{how}: {str(error).removeprefix('RUN: ')}")


def show(views: list[RunView], *, as_json: bool, clear: bool, lines: int | None = None) -> None:
    """lines: what the terminal has room for, whose top more would push out. Of several runs those that go on stay."""
    now = time.time()
    if as_json:
        text = "\n".join(dumps(summary(view)) for view in views)
    elif len(views) == 1:
        text = screen(views[0], width=min(120, shutil.get_terminal_size().columns), now=now, height=lines)
    else:
        shown = views if lines is None else fitting(views, lines)
        text = runs_table(shown, now, width=columns_of(sys.stdout))
        text += f"\nand {len(views) - len(shown)} more, without --watch" * (len(shown) < len(views))
    print((CLEAR if clear and not as_json else "") + text, flush=True)


def fitting(views: Sequence[RunView], lines: int) -> list[RunView]:
    """As many runs as a table in so many lines has room for, in their order: first those that go on."""
    room = lines - 2  # the titles, and the line of the cursor
    if len(views) <= room:
        return list(views)
    numbers = sorted(range(len(views)), key=lambda number: not views[number].state.goes_on)
    return [views[number] for number in sorted(numbers[: max(1, room - 1)])]  # a line says how many are left out
