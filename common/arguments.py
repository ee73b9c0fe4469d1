"""Types of arguments on command lines."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

MOST_DIGITS = 100
"""Of a number that a user writes: more than any needs, while int() raises above 4,300."""


def quoted(text: str, most: int = 60) -> str:
    """What a user wrote, for a message: its beginning alone where it is long."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text):,} characters)"


def not_empty(text: str) -> str:
    """An argparse type: the text. Refuses the empty one, as a shell's variable gives it that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave the option out")
    return text


def a_path(text: str) -> Path:
    """An argparse type: a file or folder. pathlib takes the empty text for the current folder, where a command would
    then write, and nobody look."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder (. is the current one)")
    return Path(text)


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number, not below `minimum`."""

    def number(text: str) -> int:
        if text.isdecimal() and len(text) > MOST_DIGITS:
            raise argparse.ArgumentTypeError(f"expected a number of at most {MOST_DIGITS} digits, not {quoted(text)}")
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, not {quoted(text)}")
        return int(text)

    return number


def above_zero(most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number above 0, at most `most`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most or math.isinf(value):
            upper = "" if math.isinf(most) else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"expected a number above 0{upper}, not {quoted(text)}")
        return value

    return number
