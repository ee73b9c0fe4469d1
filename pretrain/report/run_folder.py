"""The run folder, written by rank 0 only: config.json, metrics.jsonl, details.jsonl, events.jsonl, checkpoints/,
tensorboard/."""

from __future__ import annotations

import collections
import itertools
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError, kind_of
from common.files import write_json
from common.line_log import LineLog, Row, is_event, is_step
from common.run_lock import FolderLock
from pretrain.report import console
from pretrain.report.alerts import Alerts
from pretrain.report.exit_codes import ExitCode

REPLACED = (
    *("config.json", "metrics.jsonl", "details.jsonl", "events.jsonl"),
    *("outcome.json", "verified.json", "rollbacks.json"),
)
LEFTOVERS = (
    ".seen-by-rank-0-*",
    ".clock-*",
    *(f".{name}.*.tmp" for name in REPLACED),
    *(f"{name}.partial" for name in REPLACED),  # of earlier versions
    "outcome.json",
    "ranks/rank-*",
)
"""Files of its own that a killed start leaves; none that another program may have put here."""
ENDS = {ExitCode.FINISHED: "finished", ExitCode.STOPPED: "stopped", ExitCode.INTERRUPTED: "stopped"}
"""Kinds of events about the end of a start by its code."""
FAILED = "failed"
"""The kind of every other code."""


class RunFolder:
    """Creates the folder and appends to its logs; every line is written at once, so a killed run loses none. What a
    full disk refuses is written later, see line_log.py."""

    def __init__(self, path: Path, *, writes: bool, alerts: Alerts | None = None) -> None:
        """`writes` is true on one rank, which creates the folder and appends; on the others every call is a no-op.
        `alerts` hear of every event and of the end. Raises UserError if the folder cannot be written, or if something
        in it is in the way."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.lock: FolderLock | None = None
        self._listener: Callable[[Row], None] | None = None
        self._unheard: collections.deque[Row] = collections.deque(maxlen=1000)
        self._has_ended = False
        self._told_end = ""
        """The kind of the last event about the end of this start."""
        self._writes, self._alerts = writes, alerts
        self._metrics = LineLog(path / "metrics.jsonl", is_step, self._disk_failed)
        self._details = LineLog(path / "details.jsonl", is_step, self._disk_failed)
        self._events = LineLog(path / "events.jsonl", is_event, self._disk_failed)
        if not writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock = FolderLock(path)
            self._remove_leftovers()
            damaged = {log.path.name: log.repair() for log in (self._metrics, self._details, self._events)}
            self.event("opened", process=self.lock.owner)
            self._events.flush()
        except (UserError, OSError) as error:
            if self.lock is not None:
                self.lock.release()
            if isinstance(error, UserError):
                raise
            raise refusal(path, error) from None
        for name, count in damaged.items():
            if count:
                print(f"warning: {path / name}: {count} damaged lines were moved to {name}.damaged", file=sys.stderr)
                self.event("damaged_lines", file=name, lines=count)
        for owner in self.lock.taken_over:
            self.event("lock_taken_over", owner=owner)
        console.on_problem(self._stream_failed)

    def _stream_failed(self, stream: str, reason: str) -> None:
        self.event("output_lost", stream=stream, reason=reason)

    def _disk_failed(self, log: Path, reason: str) -> None:
        self.event("log_not_written", file=log.name, reason=reason)

    def _remove_leftovers(self) -> None:
        """Removes what a killed start did not clean up, but keeps a report of a hang, under a name with its time."""
        for pattern in LEFTOVERS:
            for path in self.path.glob(pattern):
                path.unlink()
        hang = self.path / "hang"
        if hang.exists():
            when = time.strftime("%Y%m%dT%H%M%S", time.localtime(hang.stat().st_mtime))
            hang.rename(self.path / f"hang-{when}-{secrets.token_hex(2)}")

    def end(self, code: ExitCode, reason: str, *, step: int | None = None, node: str | None = None) -> None:
        """Writes outcome.json: how this start ended, also for scripts whose launcher lost the exit code; and the event
        of that, unless it is there. `node`: the one that is to blame. Releases the folder. May be called from another
        thread, and more than once: the first call counts."""
        if not self._writes or self._has_ended:
            return
        self._has_ended = True
        outcome = {"exit_code": int(code), "reason": reason, "step": step, "time": time.time()}
        if node is not None:
            outcome["node"] = node
        event = end_event(outcome)
        if self._alerts is not None:
            self._alerts.hear(event, is_end=True)
        if code is ExitCode.FOLDER_LOST:  # from now on the folder is another run's
            return
        console.forget(self._stream_failed)
        try:
            if event["event"] != self._told_end:
                # The next start replaces outcome.json. A board, which may hang too, hears nothing.
                self._events.append(event)
            self._try_at_the_end(self._events.flush)
            self._try_at_the_end(lambda: write_json(self.path / "outcome.json", outcome))
        finally:
            if self.lock is not None:
                self.lock.release()

    def _try_at_the_end(self, write: Callable[[], None]) -> None:
        """The run ended as it did, even if nobody can read it there; and one file that cannot be written keeps no other
        from it."""
        try:
            write()
        except OSError as error:
            print(
                f"warning: {error.filename or self.path} cannot be written at the end: {error.strerror}",
                file=sys.stderr,
                flush=True,
            )

    def finish_alerts(self) -> None:
        """Waits some seconds for alerts that are being sent: the last call, when no rank waits for this one."""
        if self._alerts is not None:
            self._alerts.finish()

    def losses(self, last_step: int, count: int) -> list[float]:
        """The last `count` finite losses up to step `last_step`, from metrics.jsonl. Raises UserError."""
        rows = self._rows(self._metrics, newest_first=True)  # a long run's file has 800 bytes a step
        losses = (row["loss"] for row in rows if row["step"] <= last_step and isinstance(row.get("loss"), int | float))
        return list(itertools.islice(losses, count))[::-1]

    def newest_metrics(self, last_step: int) -> Row | None:
        """The line of metrics.jsonl of the newest step up to `last_step`. Raises UserError."""
        rows = self._rows(self._metrics, newest_first=True)
        return next((row for row in rows if row["step"] <= last_step), None)

    def was_validated(self, step: int, kind: str = "validation") -> bool:
        """Whether events.jsonl holds a validation (or another event of `kind`) after `step` that still counts: a start
        from before that step computes it again, and a branch that begins has none. Raises UserError."""
        found = False
        for row in self._rows(self._events):
            if row["event"] == "branch":
                found = False
            elif row["event"] in ("started", kind) and isinstance(row.get("step"), int):
                if row["event"] == kind:
                    found = found or row["step"] == step
                elif row["step"] < step:
                    found = False
        return found

    def has_steps(self) -> bool:
        """Whether metrics.jsonl holds a line. Raises UserError."""
        return next(self._rows(self._metrics), None) is not None

    def has_said(self, kind: str) -> bool:
        """Whether events.jsonl holds an event of `kind`. Raises UserError."""
        return any(row["event"] == kind for row in self._rows(self._events))

    def has_said_since_start(self, kind: str) -> bool:
        """Whether events.jsonl holds an event of `kind` after the newest start. Raises UserError."""
        found = False
        for row in self._rows(self._events):
            found = row["event"] == kind or (found and row["event"] != "started")
        return found

    def _rows(self, log: LineLog, *, newest_first: bool = False) -> Iterator[Row]:
        """Nothing on ranks that do not write. Raises UserError if the file cannot be read."""
        rows = log.newest_first if newest_first else log.rows
        try:
            yield from rows() if self._writes else ()
        except OSError as error:
            raise refusal(log.path, error, "read") from None

    def write_config(self, tree: dict[str, Any]) -> None:
        """config.json: the resolved configuration of the newest start."""
        write_json(self.path / "config.json", tree)

    def event(self, kind: str, **values: Any) -> None:
        """One line of events.jsonl: what happened, when (seconds since the epoch)."""
        if self._writes:
            row = {"event": kind, "time": time.time(), **values}
            self._events.append(row)
            if kind in ENDS.values():
                self._told_end = kind  # alerts hear of it from `end`, with its code
            elif self._alerts is not None:
                self._alerts.hear(row)
            (self._listener or self._unheard.append)(row)

    def listen(self, listener: Callable[[Row], None] | None) -> None:
        """From now on `listener` hears of every event, in the thread where it happens; first of those that nobody has
        heard of. None: nobody does."""
        self._listener = listener
        while listener is not None and self._unheard:
            listener(self._unheard.popleft())

    def metrics(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl: exactly one per optimizer step, floats with full precision."""
        if self._writes:
            self._metrics.append(values)

    def details(self, values: dict[str, Any]) -> None:
        """One line of details.jsonl."""
        if self._writes:
            self._details.append(values)

    def make_durable(self) -> None:
        """Brings metrics.jsonl to the disk, so that no committed checkpoint is ahead of it, even after a power loss or
        on a full disk. Raises OSError."""
        if self._writes:
            self._metrics.make_durable()

    def rewind_metrics(self, step: int) -> None:
        """Moves the lines of steps after `step` to events.jsonl: they will be computed again. Those of details.jsonl
        are dropped. Raises OSError, and then nothing else is lost."""
        self._details.flush()  # first: what waits for a full disk would come behind what is computed again
        if any(row["step"] > step for row in self._details.rows()):
            self._details.keep(lambda row: row["step"] <= step)
        self._metrics.flush()
        superseded = [row for row in self._metrics.rows() if row["step"] > step]
        if not superseded:
            return
        for row in superseded:  # for nobody's ears: they would crowd out what the board has not heard yet
            self._events.append({"event": "superseded_metrics", "time": time.time(), "metrics": row})
        self._events.make_durable()
        self._metrics.keep(lambda row: row["step"] <= step)


def refusal(path: Path, error: OSError, what: str = "written") -> UserError:
    """Of a file of a run folder, which is `path` where the error names none; a PassingError where another attempt may
    not meet it."""
    return kind_of(error)(f"--run-dir: {error.filename or path} cannot be {what}: {error.strerror}")


def end_event(outcome: dict[str, Any]) -> Row:
    """The event of the end of a start, given what its outcome.json says."""
    kind = ENDS.get(outcome["exit_code"], FAILED)
    return {"event": kind, **{key: value for key, value in outcome.items() if value is not None}}
