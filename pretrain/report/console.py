"""stdout and stderr that cannot end a run: what they refuse is lost, and the run goes on.

`train.py | head`, a terminal that is gone, a log on a full disk, a pager that nobody pages: a print would raise, or
wait for ever, and take all ranks with it. Everything that matters is in the run folder; a line on the terminal is not.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from common.terminal import open_closed_descriptors

CHUNK_BYTES = 4096
"""PIPE_BUF of Linux: if a pipe says that it can be written to, this many bytes fit and a write does not wait."""
PATIENCE_SECONDS = 5.0
"""How long a write waits, once, for a reader that does not read; after that only what fits is written."""

WHERE_ELSE = "; the run goes on without it, RUN_DIR/metrics.jsonl and RUN_DIR/events.jsonl have what it says"

_problems: dict[str, str] = {}
_listeners: list[Callable[[str, str], None]] = []
_is_run = True


def protect(is_run: bool) -> None:
    """Puts streams that never raise in the place of sys.stdout and sys.stderr. Call it first, see
    `open_closed_descriptors`.

    is_run: False where nothing is trained, as for --help: a reader that leaves, as `head` does, is no problem then
    """
    global _is_run
    _is_run = is_run
    for descriptor in open_closed_descriptors():
        if descriptor:
            _problems[("stdout", "stderr")[descriptor - 1]] = "closed"
    sys.stdout, sys.stderr = _protected(sys.stdout, 1, "stdout"), _protected(sys.stderr, 2, "stderr")


def on_problem(listener: Callable[[str, str], None]) -> None:
    """Calls `listener` with the name of a stream and the reason when the stream first cannot be written: now for
    streams that have already failed, later from the thread that prints."""
    _listeners.append(listener)
    for name, reason in list(_problems.items()):
        listener(name, reason)


def forget(listener: Callable[[str, str], None]) -> None:
    """Ends `on_problem`; ignores a listener that was not registered."""
    with contextlib.suppress(ValueError):
        _listeners.remove(listener)


def _protected(stream: TextIO | None, descriptor: int, name: str) -> TextIO:
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # A path may hold characters that the terminal's encoding lacks.
    return io.TextIOWrapper(
        _Stream(descriptor, name),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


class _Stream(io.RawIOBase):
    """A descriptor that takes everything."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self.name = descriptor, name
        self._lost = 0
        """Bytes that were refused since the last write that was not."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def close(self) -> None:
        """Leaves the descriptor open: it is the process's."""

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        size, lost = len(view), self._lost
        try:
            if lost:
                self._send(memoryview(f"[{lost} bytes could not be written here]\n".encode()))
                self._lost = 0
            self._send(view)
        except OSError as error:
            self._lost = lost + size
            if _is_run or not isinstance(error, BrokenPipeError):
                _report(self.name, error.strerror or repr(error))
        return size

    def _send(self, view: memoryview) -> None:
        while view:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLOUT)
            if not poll.poll(0 if self._lost else 1000 * PATIENCE_SECONDS):
                raise OSError(0, "its reader does not read")
            view = view[os.write(self._descriptor, view[:CHUNK_BYTES]) :]


def _report(name: str, reason: str) -> None:
    """Once per stream: prints a line on stderr, unless stderr is what fails, and calls the listeners."""
    if name in _problems:
        return
    _problems[name] = reason
    if name != "stderr":
        print(f"warning: {name} cannot be written ({reason}){WHERE_ELSE * _is_run}", file=sys.stderr, flush=True)
    for listener in list(_listeners):
        with contextlib.suppress(Exception):
            listener(name, reason)
