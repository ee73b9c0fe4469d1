"""Tells a user what happens to a run: a command of the user's, which rank 0 starts beside training.

Training never waits for a command. Each has a thread of its own, which starts it, gives it the event, and kills it when
it takes too long. Whatever goes wrong with commands is one warning.
"""

from __future__ import annotations

import collections
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.line_log import Row
from common.strict_json import dumps
from common.tables import shortened
from common.terminal import visible
from pretrain.config.alert_kinds import command_words
from pretrain.config.watching import MonitorConfig
from pretrain.report.event_text import describe

LIMIT_SECONDS = 30.0
"""Longest time that a command may take."""
END_SECONDS = 5.0
"""Longest time that the end of a run waits for commands; shorter than what signals.py grants to one that must leave."""
LONGEST = 500
"""Characters of a sentence. What is longer loses its middle: it begins with what happened, and ends with what to do."""
OUTLIVES = ("/bin/sh", "-c", "trap '' TERM; exec \"$@\"", "sh")
"""What starts a command. A launcher sends SIGTERM to all that a rank has started as soon as another rank has failed,
and the alert of that must outlive it. And the start of a program from a file system that hangs holds sh, not Python."""


@dataclass(frozen=True)
class Alert:
    """One event, for one call of the command."""

    run_dir: Path
    event: Row
    left_out: dict[str, int] = field(default_factory=dict)
    """By kind, how many were not told since the last one that was."""
    text: str | None = None
    """What happened, of a caller who has the words; None: the event has them."""

    @property
    def sentence(self) -> str:
        """One line, of about LONGEST characters at most. It begins with no dash: no program takes it for an option."""
        more = ", ".join(f"{count} x {kind}" for kind, count in self.left_out.items())
        ending = f" (left out before: {more})" if more else ""
        what = describe(self.event) if self.text is None else f"{self.event['event'].replace('_', ' ')}: {self.text}"
        text = " ".join(visible(f"run {self.run_dir.name}: {what}").split())
        room = max(LONGEST - len(ending), LONGEST // 2)
        return shortened(text, room) + ending

    def line(self) -> str:
        """One line of JSON."""
        told = {"text": self.sentence, "run": str(self.run_dir.absolute()), "left_out": self.left_out}
        return dumps({**told, "event": self.event}) + "\n"


class Command:
    """One call of the command. `run` may be called in any thread, `kill` in any other."""

    def __init__(self, words: Sequence[str], alert: Alert, *, is_shown: bool = False) -> None:
        """`is_shown`: what it prints is printed."""
        self._words, self._alert, self._output = words, alert, None if is_shown else subprocess.DEVNULL
        self._process: subprocess.Popen[str] | None = None

    def run(self, seconds: float) -> str | None:
        """Waits for its end, or kills it after `seconds`. Why it failed; None: it did not. What ends the wait, such as
        Ctrl-C, ends the command as well."""
        try:
            process = self._process = subprocess.Popen(
                [*OUTLIVES, *self._words, self._alert.sentence.encode()],  # UTF-8 in every locale, as stdin
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,  # Ctrl-C is not for it, and what it starts can be killed with it
                text=True,
                encoding="utf-8",
            )
            process.communicate(self._alert.line(), timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a zombie would stay; a disk that hangs may keep it
                process.wait(1.0)
            return f"{self._words[0]} did not end within {seconds:g} s and was killed"
        except Exception as error:  # whatever it is, training goes on
            self.kill()
            return f"{self._words[0]}: {error}"
        except BaseException:  # a signal to launch/alert.py; no thread gets it
            self.kill()
            raise
        return f"{self._words[0]} ended with exit code {process.returncode}" if process.returncode else None

    def kill(self) -> None:
        """Ends it, and what it has started, if it runs."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Alerts:
    """Calls monitor.alert_command for the events of monitor.alerts. Every method may be called from any thread."""

    def __init__(self, config: MonitorConfig, run_dir: Path) -> None:
        """Prints a warning if the command is no program here."""
        self._words, self._kinds = command_words(config.alert_command), frozenset(config.alerts)
        self._pause = 60.0 * config.alert_minutes
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}
        """By kind, when the last command began."""
        self._running: dict[str, tuple[threading.Thread, Command]] = {}
        self._left_out: collections.Counter[str] = collections.Counter()
        self._has_failed = False
        try:
            check_command(config)
        except UserError as error:
            self._warn(str(error))

    def hear(self, event: Row, *, is_end: bool = False) -> None:
        """Starts the command, unless nobody asked for this kind or it is too early for another one of it. `is_end`: no
        other event follows, so this one tells what was left out of every kind."""
        kind = event["event"]
        if not self._words or kind not in self._kinds:
            return
        with self._lock:
            now = time.monotonic()
            is_early = kind in self._told and now - self._told[kind] < self._pause
            if is_early or (kind in self._running and self._running[kind][0].is_alive()):
                self._left_out[kind] += 1
                return
            self._told[kind] = now
            named = [one for one in self._left_out if is_end or one == kind]
            command = Command(self._words, Alert(self._run_dir, event, {one: self._left_out.pop(one) for one in named}))
            thread = threading.Thread(target=self._call, args=(command,), name="alert", daemon=True)
            self._running[kind] = thread, command
            try:
                thread.start()
            except RuntimeError as error:  # the system gives no more threads
                del self._running[kind]
                failure = str(error)
            else:
                return
        self._warn(failure)

    def finish(self) -> None:
        """Waits END_SECONDS at most for commands that run, and kills those that still do."""
        deadline = time.monotonic() + END_SECONDS
        with self._lock:
            running = list(self._running.values())
        for thread, _ in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        for thread, command in running:
            if thread.is_alive():
                self._warn(f"{self._words[0]} did not end within {END_SECONDS:g} s of the end of the run; it is killed")
                command.kill()

    def _call(self, command: Command) -> None:
        failure = command.run(LIMIT_SECONDS)
        if failure is not None:
            self._warn(failure)

    def _warn(self, failure: str) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        key = "" if failure.startswith("monitor.alert_command: ") else "monitor.alert_command: "
        print(
            f"warning: {key}{failure}. The run goes on, and this is said once; "
            f"`python launch/alert.py {shlex.quote(str(self._run_dir))}` tries the command",
            file=sys.stderr,
            flush=True,
        )


def check_command(config: MonitorConfig) -> None:
    """Raises UserError if the first word of the command is no program here."""
    words = command_words(config.alert_command)
    if words and shutil.which(words[0]) is None:
        raise UserError(
            f"monitor.alert_command: there is no program {words[0]} here; give the path of one that may be executed "
            f"(no ~ and no $VARIABLE is expanded)"
        )
