"""A file of JSON objects, one per line, that only grows: metrics.jsonl and events.jsonl of a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replace_file
from common.presence import exists, is_file
from common.strict_json import dumps

Row = dict[str, Any]
BLOCK_BYTES = 1 << 18
"""Read at once from the end of a file."""


def is_event(row: Any) -> bool:
    """Whether a parsed line belongs into events.jsonl."""
    return isinstance(row, dict) and isinstance(row.get("event"), str)


def is_step(row: Any) -> bool:
    """Whether a parsed line belongs into metrics.jsonl."""
    return isinstance(row, dict) and type(row.get("step")) is int


class LineLog:
    """Appends whole lines, from any thread. Lines that the disk refuses are kept in memory, reported once, and written
    before the next line as soon as the disk takes them: a full disk costs no line, unless the process ends before there
    is room."""

    def __init__(
        self, path: Path, is_valid: Callable[[Any], bool], refused: Callable[[Path, str], None] | None = None
    ) -> None:
        """`refused` hears of the path, and of why the disk takes no line, when that begins."""
        self.path = path
        self._refused = refused
        self._is_valid = is_valid
        self._pending: list[str] = []
        self._failure: str | None = None
        self._lock = threading.RLock()  # a print inside may fail, and the event of that comes back to this log

    def rows(self) -> Iterator[Row]:
        """The parsed lines; skips those that are no row. Nothing if the file does not exist. Raises OSError."""
        for _, row in self._lines():
            if row is not None:
                yield row

    def newest_first(self) -> Iterator[Row]:
        """As `rows`, from the end of the file on: whoever wants its last rows reads no more of a long run's than these.
        Raises OSError."""
        if not exists(self.path):
            return
        with open(self.path, "rb") as file:
            place, rest = file.seek(0, os.SEEK_END), b""
            while place:
                size = min(BLOCK_BYTES, place)
                place = file.seek(place - size)
                # What stands before the first end of a line may begin in an earlier block.
                rest, *lines = (file.read(size) + rest).split(b"\n")
                yield from filter(None, map(self._parsed, reversed(lines)))
            yield from filter(None, [self._parsed(rest)])

    def append(self, row: Row) -> None:
        """One more line, after those that could not be written before."""
        with self._lock:
            self._pending.append(dumps(row) + "\n")
            with contextlib.suppress(OSError):
                self._write()

    def flush(self) -> None:
        """Writes what could not be written before. Raises OSError if it still cannot."""
        with self._lock:
            self._write()

    def make_durable(self) -> None:
        """Brings every line to the disk. Raises OSError."""
        with self._lock:
            self._write()
            if exists(self.path):
                with open(self.path, "rb") as file:
                    os.fsync(file.fileno())

    def repair(self) -> int:
        """Moves lines that are no row (a user's editor, a damaged disk) to PATH.damaged and returns how many there
        were; a torn last line (the machine stopped while writing) is dropped. Raises UserError and OSError."""
        if not exists(self.path):
            return 0
        if not is_file(self.path):
            raise UserError(f"--run-dir: {self.path} is no file; move it away, and a new one is begun")
        damaged: list[bytes] = []
        last = b"\n"
        for last, row in self._lines():
            if row is None:
                damaged.append(last)
        is_cut = not last.endswith(b"\n")
        if is_cut and damaged[-1:] == [last]:
            damaged.pop()  # torn
        elif not is_cut and not damaged:
            return 0
        if damaged:
            with open(self.path.with_name(self.path.name + ".damaged"), "ab") as file:
                file.writelines(damaged)
                file.flush()
                os.fsync(file.fileno())
        self.keep(lambda row: True)
        return len(damaged)

    def keep(self, condition: Callable[[Row], bool]) -> None:
        """Keeps only the rows for which `condition` is true, with their bytes unchanged. Raises OSError."""
        found = (line for line, row in self._lines() if row is not None and condition(row))
        replace_file(self.path, (line.removesuffix(b"\n") + b"\n" for line in found))

    def _lines(self) -> Iterator[tuple[bytes, Row | None]]:
        """Every line that is not blank, with its end, and its row; None if it is no row."""
        if not exists(self.path):
            return
        with open(self.path, "rb") as file:
            for line in file:
                if not line.isspace():
                    yield line, self._parsed(line)

    def _parsed(self, line: bytes) -> Row | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return row if self._is_valid(row) else None

    def _write(self) -> None:
        if not self._pending:
            return
        try:
            append_whole(self.path, "".join(self._pending).encode())
        except OSError as error:
            if self._failure is None:
                self._failure = error.strerror or repr(error)
                print(
                    f"warning: {self.path} cannot be written ({self._failure}); its lines are kept in memory until it "
                    f"can, and no checkpoint is saved ahead of metrics.jsonl",
                    file=sys.stderr,
                    flush=True,
                )
                if self._refused is not None:
                    self._refused(self.path, self._failure)
            raise
        self._pending = []
        if self._failure is not None:
            self._failure = None
            print(f"{self.path} can be written again; no line is missing", file=sys.stderr, flush=True)


def append_whole(path: Path, data: bytes) -> None:
    """Appends all of `data`, or nothing: then it raises OSError."""
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        view = memoryview(data)
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write names no file
