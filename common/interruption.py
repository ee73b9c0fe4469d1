"""Ctrl-C before a command handles it, as while its imports run: one line and exit code 130, no traceback. Entry points
import this first of all; it imports nothing slow."""

import signal
import sys
from types import TracebackType


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    sys.exit(128 + signal.SIGINT)  # what a hook raises decides the code; else Python ends itself by the signal


sys.excepthook = _say_interrupted
