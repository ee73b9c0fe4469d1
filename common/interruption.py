"""Ctrl-C before a command handles it, as while its imports run: one line and exit code 130, no traceback. One line too
where the Python that was started cannot run the command. Entry points import this first of all; it imports nothing
slow, and Pythons too old for the rest can read it."""

from __future__ import annotations

import _thread  # threading is not imported yet
import signal
import sys
import time
from types import TracebackType

AGAIN_SECONDS = 0.01


def _say_in_a_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)  # what a hook raises decides the code; else Python ends itself by the signal
    from common.wrong_python import why_it_failed

    why = why_it_failed(error, trace)
    if why is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {why}", file=sys.stderr, flush=True)


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Python drops a Ctrl-C that comes while it calls back from C, as imports do thousands of times. It comes again,
    from another thread: here it would be dropped too."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    _thread.start_new_thread(_interrupt, (_thread.get_ident(),))


def _interrupt(thread: int) -> None:
    time.sleep(AGAIN_SECONDS)
    signal.pthread_kill(thread, signal.SIGINT)


sys.excepthook = _say_in_a_line
sys.unraisablehook = _interrupt_again
