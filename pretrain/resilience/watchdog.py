"""A thread beside the main one: it gives signs of life for the lock, and ends a run whose ranks wait for one of them.

Nothing is sent while all is well. A rank whose main thread has not entered a new phase for the time allowed writes a
report and its stacks into RUN_DIR/hang; all ranks that are alive do so at about the same time, because they wait for
the same one. Then the first of them reads all reports and names those that wrote nothing, or are behind the others.
That needs neither network nor rank 0.

In a step's own work the time allowed is short (step_limit.py). The rank that it catches may be waited for by others in
a phase that may take long. Those look for a report of another, and write theirs too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import exists  # pathlib's raises if the file system does not answer, which would end the thread
from pathlib import Path
from typing import Any, NoReturn

from common.files import write_file, write_json
from common.run_lock import BEAT_SECONDS, FolderLock, LockLost, is_alive, is_same_machine, process_state
from common.strict_json import dumps
from pretrain.phases import Phases, Record, read
from pretrain.ranks import ranks_text
from pretrain.report.exit_codes import ExitCode
from pretrain.resilience import collectives
from pretrain.resilience.signals import Stop

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks, in a C-level handler that needs no interpreter lock."""

MESSAGE = "message.txt"
"""In RUN_DIR/hang: what the hang was. All ranks leave for it."""
READER = "reader"
"""Empty file in RUN_DIR/hang: the rank that made it reads all reports."""
READ_SECONDS = 0.002
"""For each report, how long the others wait for the message of the one that reads them all."""
LISTED = 16
"""Absent ranks that the message names."""


@dataclass(frozen=True)
class Report:
    """What a rank says about itself when it has waited for too long."""

    rank: int
    identity: dict[str, Any]
    waited_seconds: float
    record: Record

    def write(self, hang: Path) -> None:
        write_json(hang / f"rank-{self.rank:05d}.json", asdict(self))


@dataclass(frozen=True)
class Peers:
    """The processes of a run, as one of them knows them."""

    rank: int
    """This process's rank."""
    identities: list[dict[str, Any]]
    """run_lock.process_identity of every rank."""


class Watchdog:
    """Watches this rank from construction to `close`."""

    def __init__(
        self,
        run_dir: Path,
        phases: Phases,
        stop: Stop,
        peers: Peers,
        *,
        hang_timeout_seconds: float,
        lock: FolderLock | None,
    ) -> None:
        """A timeout of 0 watches nothing but the lock."""
        self._folder, self._hang = run_dir / "ranks", run_dir / "hang"
        self._run_dir = run_dir
        self._phases, self._stop, self._lock = phases, stop, lock
        self._rank, self._identities = peers.rank, peers.identities
        self._timeout = hang_timeout_seconds
        self._grace = min(30.0, max(2.0, hang_timeout_seconds / 4))
        """How long to wait for reports: ranks begin to wait within a step of each other."""
        self._pause = min(2.0, 0.1 * max(1.0, len(peers.identities) / 64))
        """Between two looks for the message: all ranks together look about a thousand times a second at most."""
        self._listened = 0.0
        """When this rank last looked for a report of another."""
        self._folder.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # a full disk: the last words of this rank are missed, no more
            phases.keep_in(self._folder / f"rank-{self._rank:05d}.phase")
        self._stacks = open(self._folder / f"rank-{self._rank:05d}.stacks", "w")  # noqa: SIM115 (for faulthandler)
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._ended = threading.Event()
        self._reporting = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and removes what it kept."""
        self._ended.set()
        self._thread.join(timeout=10)
        faulthandler.unregister(DUMP_SIGNAL)
        self._stacks.close()
        self._phases.close()
        with contextlib.suppress(OSError):  # a disk that takes nothing any more must not change how the run ends
            for kind in ("phase", "stacks"):
                (self._folder / f"rank-{self._rank:05d}.{kind}").unlink(missing_ok=True)
            self._folder.rmdir()  # the last rank's call succeeds

    def settle(self) -> None:
        """Called by a main thread that met an error: if a hang is being reported, the error is only what follows from
        it (ranks were killed or have left), and the report ends this process with the hang's code. So it is on a rank
        that reported nothing, because it was stopped and has been woken: a launcher may look at its code first."""
        if self._reporting.is_set():
            self._thread.join(timeout=60)
        if exists(self._hang / MESSAGE):
            self._leave()

    def _watch(self) -> None:
        pause = min(1.0, self._timeout / 10) if self._timeout else 1.0
        looked = beaten = time.monotonic()
        while not self._ended.wait(pause):
            now = time.monotonic()
            if now - looked > 5 * pause + 1.0:
                # This process was suspended, perhaps the whole job: time that passed meanwhile is nobody's fault.
                self._phases.since += now - looked
            looked = now
            if self._lock is not None and now - beaten > BEAT_SECONDS:
                beaten = now
                try:
                    self._lock.beat()
                except LockLost as error:
                    self._stop.leave(ExitCode.FOLDER_LOST, f"error: {error}; this one stops writing")
            if self._timeout and (self._has_hung(now) or self._is_called(now)):
                try:
                    self._report()
                except Exception as error:  # a full disk, or a fault of the report: the hang must end all the same
                    what = f"{type(error).__name__}: {error}"
                    if isinstance(error, OSError):
                        what = f"{error.filename or self._hang} cannot be written: {error.strerror}"
                    self._stop.leave(ExitCode.HUNG, f"error: rank {self._rank}: hang in {self._phases.record}; {what}")

    def _limit(self) -> tuple[float, str]:
        """Seconds that the phase may take, and what says so."""
        phases = self._phases
        if phases.is_quick and phases.step_limit is not None and phases.step_limit < self._timeout:
            return phases.step_limit, f"a step's limit of {phases.step_limit:.0f} s, resilience.step_timeout_factor"
        return self._timeout, f"resilience.hang_timeout_seconds = {self._timeout:g}"

    def _has_hung(self, now: float) -> bool:
        """Whether this rank's phase has taken too long."""
        return not self._phases.is_patient and now - self._phases.since > self._limit()[0]

    def _is_called(self, now: float) -> bool:
        """Whether another rank has reported, and this one may wait for it. Half of the limit: ranks begin to wait
        within a step of each other."""
        limit = self._phases.step_limit
        if self._phases.is_patient or limit is None or now - self._phases.since < limit / 2:
            return False
        if now - self._listened < min(self._grace / 3, max(1.0, len(self._identities) / 1000)):
            return False
        self._listened = now
        return exists(self._hang / READER)

    def _report(self) -> None:
        """Says what this rank waits for and, unless it goes on meanwhile, ends it."""
        self._reporting.set()
        record, waited = self._phases.record, time.monotonic() - self._phases.since
        path = self._hang / f"rank-{self._rank:05d}.json"
        self._hang.mkdir(exist_ok=True)
        with open(path.with_suffix(".stacks"), "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        try:
            collectives.record(self._hang, self._rank)
        except Exception as error:  # torch's recorder is private, and a report without it is one as well
            self._say(f"rank {self._rank}: no record of its collectives: {type(error).__name__}: {error}")
        own = Report(self._rank, self._identities[self._rank], waited, record)
        own.write(self._hang)
        # One that was called reads for nobody: if the rank that called it goes on, so must this one.
        is_reader = self._has_hung(time.monotonic()) and self._becomes_reader()
        deadline = time.monotonic() + self._grace
        message = self._hang / MESSAGE
        while time.monotonic() < deadline and not exists(message) and not (is_reader and self._all_have_reported()):
            if self._ended.wait(self._pause):
                break
        # Once the message is out, ranks are woken and killed, so it means nothing if this one then gets further.
        # The file of a reader is its own, and tells it nothing: its phase may have become one that may take long.
        is_called = not is_reader and exists(self._hang / READER)
        has_moved = self._ended.is_set() or self._phases.record.count != record.count
        is_stuck = not has_moved and (self._has_hung(time.monotonic()) or is_called)
        if not is_stuck and not exists(message):
            self._go_on(path, is_reader)
            return
        deadline = time.monotonic() + 5.0 + READ_SECONDS * len(self._identities)
        while not exists(message) and time.monotonic() < deadline:
            # The one before went on.
            has_hung = self._has_hung(time.monotonic())
            is_reader = is_reader or (has_hung and self._becomes_reader())
            if is_reader:
                self._describe_for_all(message, own)
                break
            elif has_hung or exists(self._hang / READER) or exists(message):
                time.sleep(self._pause)
            else:  # the rank that called this one has just gone on
                self._go_on(path, is_reader)
                return
        silent = self._wake_silent_ranks_here()
        if not self._stop.launcher_ends_others:
            self._stop.before_leaving.append(lambda code, message: self._kill(silent))
        self._leave()

    def _leave(self) -> NoReturn:
        message, reason = self._hang / MESSAGE, ""
        with contextlib.suppress(OSError):  # the reader may not have got so far
            reason = message.read_text(encoding="utf-8").strip()
        self._stop.leave(ExitCode.HUNG, f"rank {self._rank}: leaving because of a hang, see {message}", reason)

    def _go_on(self, path: Path, is_reader: bool) -> None:
        """Takes back the report at `path`: slow, not hung."""
        path.unlink(missing_ok=True)
        path.with_suffix(collectives.SUFFIX).unlink(missing_ok=True)
        if is_reader:
            (self._hang / READER).unlink(missing_ok=True)
        self._reporting.clear()

    def _becomes_reader(self) -> bool:
        """Whether this rank is the one that reads all reports: the first to ask. If all did, a thousand ranks would
        open a million files, again and again."""
        try:
            os.close(os.open(self._hang / READER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        return True

    def _all_have_reported(self) -> bool:
        return sum(name.endswith(".json") for name in os.listdir(self._hang)) >= len(self._identities)

    def _describe_for_all(self, message: Path, own: Report) -> None:
        reports = {**read_reports(self._hang), self._rank: own}  # which the file system may not give back
        silent = [rank for rank in range(len(self._identities)) if rank not in reports]
        words = self._last_words(silent[:LISTED])
        try:
            calls = collectives.explain(collectives.read(self._hang))
        except Exception as error:  # what else is known must be said
            calls = [f"the records cannot be compared: {type(error).__name__}: {error}"]
        text = describe(reports, silent, words, self._limit()[1], self._hang, calls)
        self._publish(f"{text}. {self._stop.what_stands()}", message)

    def _last_words(self, silent: list[int]) -> dict[int, str]:
        """For each of the ranks `silent`: where it was last, and what its process does now."""
        words = {}
        for rank in silent:
            identity, record = self._identities[rank], read(self._folder / f"rank-{rank:05d}.phase")
            text = f"process {identity['pid']} on {identity['host']}"
            if self._is_here(rank):
                text += f" {process_state(identity['pid'])}"
            if record is not None and record.time:
                text += f", last seen in {record}"
            words[rank] = text
        return words

    def _publish(self, text: str, path: Path) -> None:
        self._say(f"error: {text}")
        with (
            contextlib.suppress(OSError),
            open(self._run_dir / "events.jsonl", "a", encoding="utf-8") as file,
        ):
            file.write(dumps({"event": "hang", "time": time.time(), "message": text}) + "\n")
        write_file(path, f"{text}\n".encode())

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody may be listening, and the hang must end all the same
            os.write(2, f"{text}\n".encode())

    def _wake_silent_ranks_here(self) -> list[int]:
        """Once per machine: makes its silent ranks write their stacks, if they can. Returns those ranks, nothing on the
        other ranks of the machine."""
        here = [rank for rank in range(len(self._identities)) if self._is_here(rank)]
        reported = [rank for rank in here if exists(self._hang / f"rank-{rank:05d}.json")]
        silent = [rank for rank in here if rank not in (*reported, self._rank)]
        if self._rank != min(set(here) - set(silent)):
            return []
        stacks = {}
        for rank in silent:
            with contextlib.suppress(OSError):  # opened now: a rank that is woken removes its file when it leaves
                stacks[rank] = open(self._folder / f"rank-{rank:05d}.stacks", "rb")  # noqa: SIM115
        victims = [self._identities[rank]["pid"] for rank in silent if self._runs(rank)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, DUMP_SIGNAL)
                os.kill(pid, signal.SIGCONT)  # a stopped process takes no signal but SIGKILL
        if victims:
            time.sleep(1.0)
        for rank, file in stacks.items():
            with contextlib.suppress(OSError), file:
                (self._hang / f"rank-{rank:05d}.stacks").write_bytes(file.read())
        return silent

    def _kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            if self._runs(rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._identities[rank]["pid"], signal.SIGKILL)

    def _is_here(self, rank: int) -> bool:
        # In a container with the host's /proc no number is seen, but this rank is where it is.
        return rank == self._rank or is_same_machine(self._identities[self._rank], self._identities[rank])

    def _runs(self, rank: int) -> bool:
        return is_alive(self._identities[rank])


def read_reports(hang: Path) -> dict[int, Report]:
    """The reports in the folder, by rank."""
    found = {}
    for path in hang.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            tree = json.loads(path.read_text(encoding="utf-8"))
            found[tree["rank"]] = Report(**{**tree, "record": Record(**tree["record"])})
    return found


def describe(
    reports: dict[int, Report],
    silent: list[int],
    last_words: dict[int, str],
    limit: str,
    folder: Path,
    calls: Sequence[str] = (),
) -> str:
    """One message that says which ranks did not arrive, and where. `limit`: which one they exceed. `calls`: what
    collectives.explain says."""
    furthest = max(reports.values(), key=lambda report: report.record.count)
    behind = {rank: report for rank, report in reports.items() if report.record.count < furthest.record.count}
    absent = [f"rank {rank}: no sign of life ({last_words[rank]})" for rank in silent[:LISTED]]
    absent += [
        f"rank {rank}: still in {report.record} on {report.identity['host']}"
        for rank, report in sorted(behind.items())[: LISTED - len(absent)]
    ]
    if (unnamed := len(silent) + len(behind) - len(absent)) > 0:
        absent.append(f"and {unnamed} more")
    if not absent:
        absent = ["no rank is behind: one is stuck inside this phase (see the stacks), or the network is"]
    waiting = [rank for rank in sorted(reports) if rank not in behind]
    told = f"Collectives: {'; '.join(calls)}. " if calls else ""
    return (
        f"hang: {furthest.record} does not end. Did not arrive: {'; '.join(absent)}. Waiting: "
        f"{ranks_text(waiting)}, for {furthest.waited_seconds:.0f} s ({limit}). "
        f"{told}Stacks of every rank that could write them: {folder}"
    )
