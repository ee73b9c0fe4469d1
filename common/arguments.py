"""Command lines: a parser whose mistakes are one line, the option --set, and types of arguments."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR = 2
MOST_DIGITS = 100
"""Of a number that a user writes: more than any needs, while int() raises above 4,300."""


class Parser(argparse.ArgumentParser):
    """A mistake is one line on stderr, without the usage above it, and exit code 2. An option that does not exist is
    named before one that is missing, which it may be, misspelled; with the option it is most like."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None and not {"-h", "--help"} & set(given):
            self._refuse_unknown(given)
        return super().parse_known_args(args, namespace)

    def _refuse_unknown(self, given: Sequence[str]) -> None:
        """As argparse reads: what stands behind --, or holds a blank, is no option."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for text in given[: given.index("--")] if "--" in given else given:
            name = text.partition("=")[0]
            is_known = name in options or (self.allow_abbrev and any(option.startswith(name) for option in options))
            if name.startswith("--") and " " not in text and not is_known:
                self.error(f"there is no option {name}{self.advice(text, {*options} - {'--help'})}")

    def advice(self, text: str, options: set[str]) -> str:
        """What follows the name of an option that is none of `options`, as it was given."""
        similar = difflib.get_close_matches(text.partition("=")[0], options, n=1)
        return f"; did you mean {similar[0]}?" if similar else ""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(USER_ERROR)


def quoted(text: str, most: int = 60) -> str:
    """What a user wrote, for a message: its beginning alone where it is long."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text):,} characters)"


def add_overrides(parser: argparse._ActionsContainer, help: str = "override a key, repeatable") -> None:
    """--set, repeatable: `args.overrides` is a list of KEY=VALUE."""
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help=help)


def set_options(overrides: Iterable[str]) -> list[str]:
    """`--set KEY=VALUE ...` of a command line that starts another program with these overrides."""
    return [part for override in overrides for part in ("--set", override)]


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
