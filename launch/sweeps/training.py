"""Runs of a sweep on this machine, one after the other: each a process of its own, by the command of a user."""

from __future__ import annotations

import contextlib
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import UserError
from common.tables import beginning
from common.terminal import follows_escapes, visible
from launch.sweeps.record import Sweep
from pretrain.report.exit_codes import ExitCode, meaning_of
from pretrain.resilience.signals import heard_signals
from pretrain.views.reading import RunView, State
from pretrain.views.status import duration, finite_text, left_text
from pretrain.views.sweep import STOPPED, SweepRun

LOOK_SECONDS = 1.0
"""How often progress is looked at."""
LINE_SECONDS = 60.0
"""How often it is printed where no terminal shows it."""


class Stopping:
    """Whether somebody asked for a stop, which is handed on to the run. A terminal sends Ctrl-C and its end to the run
    as well, and nothing says whether it did; a run takes two signals within seconds for one
    (pretrain/resilience/signals.py)."""

    def __init__(self) -> None:
        self.requested: int | None = None
        """The number of the first signal."""
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Takes the signals over, main thread only."""
        before = {number: signal.signal(number, self._take) for number in heard_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """The run that is told from now on."""
        self._process = process
        if self.requested is not None:  # asked before there was a run that could hear it
            process.send_signal(signal.SIGTERM)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
        if self._process is not None:
            self._process.send_signal(number)


class Progress:
    """The newest step of a run: a line that changes on a terminal, or one now and then."""

    def __init__(self, title: str, folder: Path) -> None:
        self._title, self._view = title, RunView(folder)
        self._said, self._last = "", time.monotonic()

    def show(self) -> None:
        try:
            self._view.update()
        except UserError:
            return  # its folder is not there yet
        step, last, losses = self._view.step, self._view.last_step, self._view.metrics.column("loss")
        if not self._view.state.goes_on or not step:
            return
        left = left_text(self._view, time.time()).partition(",")[0]
        text = f"{self._title}: step {step:,}" + (f" of {last:,}" if last else "")
        text += f", loss {finite_text(losses[-1])}" + (f", {left} left" if left else "")
        if text == self._said:
            return
        if follows_escapes(sys.stdout):
            print(f"\r\x1b[K{beginning(visible(text), shutil.get_terminal_size().columns - 1)}", end="", flush=True)
        elif time.monotonic() - self._last >= LINE_SECONDS:
            print(visible(text), flush=True)
            self._last = time.monotonic()
        self._said = text

    def clear(self) -> None:
        if self._said and follows_escapes(sys.stdout):
            print("\r\x1b[K", end="", flush=True)


def launcher_of(given: str) -> list[str]:
    """What starts launch/pretrain.py: this Python, or the words of --launcher. Raises UserError."""
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise UserError(f"--launcher {given}: is no command ({str(error).lower()}); close the quote") from None
    if not words:
        return [sys.executable]
    if shutil.which(words[0]) is None:
        raise UserError(f"--launcher {given}: there is no program {words[0]} on the PATH")
    return words


def train_all(sweep: Sweep, runs: Sequence[SweepRun], program: Sequence[str]) -> int:
    """Trains `runs`, of which none is finished. `program`: what is called with the arguments of launch/pretrain.py.
    Returns 0 if it came to its end, before which only a signal stops it; then the exit code: 128 + the number of one
    that this process got, or the code of a run that was stopped by itself. Raises UserError and OSError."""
    began, stopping, trained = time.monotonic(), Stopping(), 0
    with stopping.installed():
        for number, run in enumerate(runs):
            if stopping.requested is not None:
                break
            title = f"run {number + 1} of {len(runs)}  {run.name}"
            each = (time.monotonic() - began) / trained if trained else None
            left = f"  (about {duration(each * (len(runs) - number))} for those that are left)" if each else ""
            print(title + left, flush=True)
            before = sweep.result(run)
            if before.state is not None and before.state.goes_on:
                print("  passed over: another process trains it", flush=True)
                continue
            code = _train(sweep, run, [*program, *sweep.arguments(run)], Progress(title, sweep.run_dir(run)), stopping)
            if code in STOPPED and stopping.requested is None:
                return ExitCode.STOPPED
            trained += 1
    return 0 if stopping.requested is None else 128 + stopping.requested


def _train(sweep: Sweep, run: SweepRun, command: Sequence[str], progress: Progress, stopping: Stopping) -> int:
    """One run. Returns its exit code, and says how it ended."""
    log = sweep.folder / f"{run.name}.log"
    outcome = _outcome(sweep, run)
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    stopping.watch(process)
    while (code := _wait(process)) is None:
        progress.show()
    while (state := sweep.result(run).state) is not None and state.goes_on:
        time.sleep(LOOK_SECONDS)  # a launcher that got Ctrl-C leaves before its ranks have saved
    progress.clear()
    result_outcome = _outcome(sweep, run)
    if result_outcome != outcome and isinstance(result_outcome.get("exit_code"), int):
        code = int(result_outcome["exit_code"])  # a launcher may return another one
        sweep.note(run)
    else:
        if stopping.requested is not None:
            code = int(ExitCode.INTERRUPTED)  # before it could take the signal over
        code = 128 - code if code < 0 else code
        sweep.note(run, unrecorded=code or None)
    result = sweep.result(run)
    validated = result.view.newest_validation if result.view is not None else None  # None: evaluate.sequences=0
    has_loss = result.state is State.FINISHED and validated is not None and not math.isnan(validated[2])
    loss = f", {validated[0]} loss {validated[2]:.4f}" if has_loss and validated is not None else ""
    print(f"  {result.state_text}{loss}", flush=True)
    if result.state is State.FAILED:
        print(f"  {meaning_of(code)}; the end of {log} says more", file=sys.stderr, flush=True)
    return code


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _outcome(sweep: Sweep, run: SweepRun) -> dict[str, Any]:
    view = sweep.result(run).view
    return {} if view is None else view.outcome
