"""How a start ends that has not come to open its run folder: written down for readers of the run, who would take the
outcome of the start before for its, and told to the user."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_json
from common.line_log import append_whole
from common.presence import exists
from common.run_lock import last_sign_of_life
from common.strict_json import dumps
from pretrain.config.validated import setting
from pretrain.config.watching import MonitorConfig
from pretrain.report.alerts import Alerts
from pretrain.report.exit_codes import ExitCode
from pretrain.report.run_folder import RunFolder, end_event
from pretrain.report.run_paths import SAVED_CONFIG
from pretrain.resilience.signals import Stop

OPENING_SECONDS = 1.0
"""How long an end waits for the folder that is being opened: that may wait a minute for the lock of a lost node, and
who leaves at once has 10 s (signals.py)."""


class EarlyEnd:
    """The end of one start, by the one rank that says why. Its methods may be called in any thread."""

    def __init__(self, run_dir: Path, monitor: Callable[[], MonitorConfig | None]) -> None:
        """`monitor`: asked when there is something to tell; None: the user cannot be told. Make it before the start
        does anything: an outcome that is written later is of this start, by another rank."""
        self._run_dir, self._monitor = run_dir, monitor
        self._before = _outcome(run_dir)
        self._folder: RunFolder | None = None
        self._is_closed = False
        self._noted_by: threading.Thread | None = None
        self._noted: dict[str, Any] | None = None
        """What outcome.json is to say."""
        self._lock = threading.RLock()

    def note(self, code: ExitCode, reason: str) -> None:
        """Writes the end down and sends its alert, for which it waits some seconds. Nothing if another rank has done
        it, for a second end, and after `close`."""
        is_alone = self._lock.acquire(timeout=OPENING_SECONDS)
        try:
            if self._is_closed or self._noted_by is not None:
                return
            self._noted_by = threading.current_thread()
            self._noted = {"exit_code": int(code), "reason": reason, "step": None, "time": time.time()}
            if self._folder is not None:
                self._folder.end(code, reason)
                self._folder.finish_alerts()
            elif _outcome(self._run_dir) == self._before:
                self._note(self._noted)
        finally:
            if is_alone:
                self._lock.release()

    def _note(self, outcome: dict[str, Any]) -> None:
        with contextlib.suppress(UserError, OSError):
            self._write(outcome)
        with contextlib.suppress(UserError, OSError):
            if (monitor := self._monitor()) is not None:
                alerts = Alerts(monitor, self._run_dir)
                alerts.hear(end_event(outcome), is_end=True)
                alerts.finish()

    def _write(self, outcome: dict[str, Any]) -> None:
        """Nothing where no start has opened the folder, where the run has ended for good, or where another process has
        it. Takes no lock: that of another machine, which is only silent, may be the lock of a run that goes on."""
        if not exists(self._run_dir / "events.jsonl") or _has_ended_for_good(self._run_dir):
            return
        sign = last_sign_of_life(self._run_dir)
        if sign is not None and sign.is_alive:
            return
        append_whole(self._run_dir / "events.jsonl", f"{dumps(end_event(outcome))}\n".encode())
        write_json(self._run_dir / "outcome.json", outcome)

    def hear(self, stop: Stop) -> None:
        """From now on a process that leaves at once notes that."""
        stop.before_leaving.append(self.note)

    def open(self, folder: Callable[[], RunFolder]) -> RunFolder:
        """Opens the run folder, which then writes the end down itself and gives up its lock."""
        with self._going_on():
            self._folder = folder()
            if self._noted is not None and self._folder.lock is not None:
                # Noted while the folder waited for a lock; opening it has removed that.
                self._folder.lock.release()
                with contextlib.suppress(UserError, OSError):
                    self._write(self._noted)
        return self._folder

    def close(self, stop: Stop) -> None:
        """From now on somebody else writes down how the start ends."""
        with self._going_on():
            self._is_closed = True
        if self.note in stop.before_leaving:
            stop.before_leaving.remove(self.note)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Nobody notes an end in the block. If another thread has, it ends the process as soon as it has sent its
        alert; opening the folder now would remove what it wrote."""
        with self._lock:
            if self._noted_by not in (None, threading.current_thread()):
                wait_for_the_end()
            yield


def wait_for_the_end() -> None:
    """Never returns: another thread ends the process."""
    threading.Event().wait()


def _has_ended_for_good(run_dir: Path) -> bool:
    """Whether the run has taken all steps of its configuration, or has diverged. It has, whatever was asked of it
    since."""
    outcome, steps = _tree(run_dir / "outcome.json"), setting(_tree(run_dir / SAVED_CONFIG), "train.steps")
    if outcome.get("exit_code") == ExitCode.DIVERGED:
        return True
    return outcome.get("exit_code") == ExitCode.FINISHED and outcome.get("step") == steps


def _outcome(run_dir: Path) -> bytes | None:
    """What outcome.json holds; None if there is none, or if it cannot be read. Not its time: a file server may answer
    that from a cache."""
    try:
        return (run_dir / "outcome.json").read_bytes()
    except (OSError, ValueError):  # the second: a null character in the name
        return None


def _tree(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # the last: too deep for Python
        return {}
    return found if isinstance(found, dict) else {}
