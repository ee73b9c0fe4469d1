"""Progress on stderr: a byte bar with an ETA, a bar or lines for a phase of a job, and a heartbeat for work that cannot
report its own progress."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

# A terminal is redrawn 5 times a second; a log file (SLURM) gets one line every 15 s instead of thousands.
TERMINAL_INTERVAL_SECONDS = 0.2
LOG_INTERVAL_SECONDS = 15.0


# Without tqdm's thread that redraws an idle bar: workers are forked from a process with one thread.
tqdm.monitor_interval = 0


def _interval_seconds() -> float:
    return TERMINAL_INTERVAL_SECONDS if sys.stderr.isatty() else LOG_INTERVAL_SECONDS


def byte_bar(*, total: int, description: str, enabled: bool = True, done: int = 0) -> "tqdm[Any]":
    """A tqdm bar that counts bytes; use it as a context manager and call `update(number_of_bytes)`. `done`: bytes that
    were done before, on top of `total`, which say nothing of the time left."""
    interval = _interval_seconds()
    return tqdm(
        total=total + done,
        initial=done,
        desc=description,
        unit="B",
        unit_scale=True,
        mininterval=interval,
        miniters=1,
        disable=not enabled,
    )


def count_bar(*, enabled: bool) -> "tqdm[Any]":
    """A tqdm bar that counts things, removed at its end; what and how many may change (`set_description`, `reset`)."""
    # No line that stands for nothing: the first is drawn when something is counted, and in a log after an interval.
    return tqdm(leave=False, mininterval=_interval_seconds(), delay=0.01, miniters=1, disable=not enabled)


def count_bytes(description: str, total: int) -> Callable[[int], None]:
    """A callback that takes the number of bytes read, or written, since the last call, for a bar that is removed at its
    end; prints nothing unless standard error is a terminal."""
    bar = tqdm(total=total, desc=description, unit="B", unit_scale=True, leave=False, disable=None)

    def count(number: int) -> None:
        bar.update(number)
        if bar.n >= total:
            bar.close()

    return count


@contextlib.contextmanager
def phase_progress(description: str, unit: str, *, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """For a phase of a job whose log is kept: a callback that takes how many `unit` are done, and of how many. On a
    terminal it draws a bar, removed at the end; elsewhere it prints a line every 15 s. A phase that is over sooner, or
    on a terminal within a second, leaves nothing."""
    if not enabled:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with tqdm(desc=description, unit=f" {unit}", leave=False, mininterval=_interval_seconds(), delay=1.0) as bar:

            def draw(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield draw
    else:
        started = said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= LOG_INTERVAL_SECONDS:
                said = now
                line = f"{description}: {done:,} of {total:,} {unit} after {now - started:.0f} s"
                print(line, file=sys.stderr, flush=True)

        yield say


@contextlib.contextmanager
def heartbeat(description: str) -> Iterator[None]:
    """Says what started, how long it has been running (every 15 s), and how long it took."""
    started = time.monotonic()
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LOG_INTERVAL_SECONDS):
            print(f"{description}: {time.monotonic() - started:.0f} s so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    print(f"{description} ...", file=sys.stderr, flush=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    print(f"{description}: done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
