"""What command lines share: types of arguments, and the end of a command whose reader has left."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number, not below `minimum`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, not {text!r}")
        return int(text)

    return number


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """For a command that prints: it ends well where the reader of its output (`COMMAND | head`) has left."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()


def drop_stdout() -> None:
    """Sends what is still to be printed nowhere; Python would report it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
