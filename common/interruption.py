"""Ctrl-C before a command handles it, as while its imports run: one line and exit code 130, no traceback. Entry points
import this first of all; it imports nothing slow."""

import _thread  # threading is not imported yet
import signal
import sys
import time
from types import TracebackType

AGAIN_SECONDS = 0.01


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    sys.exit(128 + signal.SIGINT)  # what a hook raises decides the code; else Python ends itself by the signal


def _interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """Python drops a Ctrl-C that comes while it calls back from C, as imports do thousands of times. It comes again,
    from another thread: here it would be dropped too."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    _thread.start_new_thread(_interrupt, (_thread.get_ident(),))


def _interrupt(thread: int) -> None:
    time.sleep(AGAIN_SECONDS)
    signal.pthread_kill(thread, signal.SIGINT)


sys.excepthook = _say_interrupted
sys.unraisablehook = _interrupt_again
