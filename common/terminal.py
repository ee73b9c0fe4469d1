"""Foreign text on a terminal: shows control characters instead of sending them. And a stdout that may be full."""

import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# Among the control characters, newline and tab are harmless; escape sequences begin with \x1b or, in one character,
# with \x9b. The others overwrite, ring or change the direction in which text is read. Surrogates stand for bytes of a
# file name that are no UTF-8, and cannot be printed at all.
_STEERS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_STEERING = re.compile(f"[{_STEERS}]")
_IN_JSON = re.compile(f"[{_STEERS}\u2028\u2029]")


def visible(text: str) -> str:
    """The text with control characters as escapes (\\x1b, \\r), so that printing it cannot move the cursor, change
    colours or hide text."""
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def json_line(value: Any, stream: TextIO) -> str:
    """`value` in one line of JSON for `stream`: letters of every script as they are, but for what steers a terminal or
    what some readers take for the end of a line, and for all of them where the stream's encoding is not UTF."""
    is_unicode = (getattr(stream, "encoding", None) or "").lower().startswith("utf")
    text = json.dumps(value, ensure_ascii=not is_unicode)
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def follows_escapes(stream: TextIO) -> bool:
    """Whether what reads the stream clears a line or a screen where it is told to: a terminal, but not one that says
    it is dumb (TERM), as the shell of an editor does, which would show the sequences."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "")


def columns_of(stream: TextIO) -> int | None:
    """The characters of a line, as the terminal or COLUMNS says; None where lines may have any length, as in a file."""
    if not stream.isatty() and not os.environ.get("COLUMNS", "").isdecimal():
        return None
    return max(20, shutil.get_terminal_size().columns)


class _Spare:
    """A stdout that takes everything: after the first error the descriptor leads to /dev/null."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        drop_output(self._stream)
        if not isinstance(error, BrokenPipeError):  # `run | head`: the reader left, which is no error
            with contextlib.suppress(OSError):
                warning = f"warning: stdout cannot be written ({error.strerror}); the command goes on without it"
                print(warning, file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def spare_stdout() -> Iterator[None]:
    """For a command whose result is files: prints that stdout refuses are lost, and do not end it."""
    stream = _Spare(sys.stdout)
    with contextlib.redirect_stdout(stream):
        try:
            yield
        finally:
            stream.flush()


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """For a command that prints: it ends well where the reader of its output (`COMMAND | head`) has left."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output(sys.stdout)


def open_closed_descriptors() -> list[int]:
    """Those of stdin, stdout and stderr that the parent process closed; they lead nowhere from now on. The next file
    that is opened would have got one, and prints would have gone into it."""
    closed = []
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            closed.append(descriptor)
    return closed


def prepare_streams() -> None:
    """For a command that prints: what the encoding of stdout lacks, as of a folder's name, is printed as escapes and
    raises no error. What the parent process closed, for which Python has no stream, leads nowhere, or is empty."""
    open_closed_descriptors()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output(stream: TextIO) -> None:
    """Sends what is still to be printed nowhere; Python would report it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
