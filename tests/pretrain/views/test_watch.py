"""launch/status.py --watch: runs that end, go away, or have not begun."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.run_lock import FolderLock, SignOfLife
from pretrain.cli.status import fitting, main, updated
from pretrain.views import reading
from pretrain.views.jobs import mark_submitted
from pretrain.views.reading import RunView
from tests.pretrain.views.status_case import CONFIG, row, shown, write


@pytest.mark.parametrize("term, clears", [("xterm", True), ("dumb", False), ("", False)])
def test_watching_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, term: str, clears: bool
) -> None:
    """And clears the screen between two looks, where a terminal can; then a look takes no more lines than there are."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    folder = write(tmp_path / "run")
    lock = FolderLock(folder)

    def end() -> None:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row(11)) + "\n")
        (folder / "outcome.json").write_text('{"exit_code": 85, "reason": "SIGTERM to rank 1"}')
        lock.release()

    timer = threading.Timer(0.5, end)
    timer.start()
    assert main([str(folder), "--watch", "--every", "0.1"]) == 0
    timer.join()
    printed = capsys.readouterr().out
    assert printed.startswith(str(folder)[:40]) and "running: " in printed  # a long path is cut
    assert "stopped: SIGTERM to rank 1" in printed and "step       11 of 40" in printed
    assert ("\x1b" in printed) == clears
    assert (max(len(screen.splitlines()) for screen in printed.split("\x1b[H\x1b[2J")) < 20) == clears


def test_a_run_that_starts_again_between_two_looks_at_its_files_is_not_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose lock was not there yet, and whose outcome of the start before is there no more."""
    folder = write(tmp_path / "run", exit_code=85)
    look, locks = reading.last_sign_of_life, list[FolderLock]()

    def look_and_start(path: Path) -> SignOfLife | None:
        found = look(path)
        if not locks:
            locks.append(FolderLock(folder))
            (folder / "outcome.json").unlink()
        return found

    monkeypatch.setattr(reading, "last_sign_of_life", look_and_start)
    try:
        assert RunView.open(folder).state.goes_on
    finally:
        locks[0].release()


def test_a_watched_table_fits_the_terminal_and_keeps_what_goes_on(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"run-{number}", 3, exit_code=0) for number in range(30)]
    (folders[20] / "outcome.json").unlink()
    lock = FolderLock(folders[20])
    try:
        views = [RunView.open(folder) for folder in folders]
        assert fitting(views, 32) == views
        shown = fitting(views, 24)
    finally:
        lock.release()
    assert [view.path.name for view in shown] == [*(f"run-{number}" for number in range(20)), "run-20"]
    assert len(fitting(views, 1)) == 1


def test_what_a_watched_table_leaves_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(write(tmp_path / f"run-{number}", 3, exit_code=0)) for number in range(12)]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(folders) == 0 and "more, without --watch" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*folders, "--watch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[0].startswith("run ") and lines[-1] == "and 5 more, without --watch"

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    patched = SimpleNamespace(sleep=stop, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr("pretrain.cli.status.time", patched)
    assert main([*folders, str(tmp_path / "not begun"), "--watch"]) == 0  # which a line below says is waited for
    assert "and 6 more, without --watch" in capsys.readouterr().out


def test_a_run_that_is_removed_ends_no_watch_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, other = write(tmp_path / "ended", exit_code=0), write(tmp_path / "other", 20)
    locks = [FolderLock(write(tmp_path / "removed")), FolderLock(other)]

    def sleep(seconds: float) -> None:
        (tmp_path / "removed").rename(tmp_path / "away")
        locks[1].release()  # so that the watch ends

    monkeypatch.setattr(
        "pretrain.cli.status.time", SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    )
    monkeypatch.delenv("COLUMNS", raising=False)  # which pytest's workers have; tables are then as wide as they are
    try:
        assert main([str(ended), str(tmp_path / "removed"), str(other), "--watch"]) == 0
    finally:
        for lock in locks:
            lock.release()
    said = capsys.readouterr()
    first, second = (table.splitlines() for table in said.out.split("run ")[1:])
    assert (len(first), len(second)) == (4, 3) and str(other) in second[2]
    assert said.err == f"passed over: {tmp_path / 'removed'} cannot be read: No such file or directory\n"


@pytest.mark.parametrize("number, ends", [(errno.ESTALE, False), (errno.EACCES, True)])
def test_a_file_system_that_does_not_answer_for_a_moment_ends_no_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, ends: bool
) -> None:
    view, answering = RunView.open(write(tmp_path / "run")), reading.last_sign_of_life

    def failing(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(reading, "last_sign_of_life", failing)
    if ends:
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            updated([view])
        return
    kept, [error] = updated([view])
    why = f"{view.path} cannot be read: {os.strerror(number)}"
    assert kept == [view] and str(error) == f"RUN: {why}"
    monkeypatch.setattr(reading, "last_sign_of_life", answering)
    lock, looks = FolderLock(view.path), list[float]()

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        monkeypatch.setattr(reading, "last_sign_of_life", failing if len(looks) == 1 else answering)
        if len(looks) == 2:
            lock.release()

    monkeypatch.setattr(
        "pretrain.cli.status.time", SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    )
    assert main([str(view.path), "--watch"]) == 0
    assert len(looks) == 2 and capsys.readouterr().err == f"shown as it was: {why}\n"


@pytest.mark.parametrize("left", [None, "slurm", ".hidden", "checkpoints", "smoke-1"])
def test_a_watch_waits_for_a_run_that_is_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: str | None
) -> None:
    """Without its folder, or with what submitting it has left there; a folder of something else is none to wait for."""
    folder, looks = tmp_path / "run", list[float]()
    if left is not None:
        (folder / left).mkdir(parents=True)

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(CONFIG))
            (folder / "outcome.json").write_text('{"exit_code": 2, "reason": "no data"}')

    monkeypatch.setattr(
        "pretrain.cli.status.time", SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    )
    assert main([str(folder), "--watch"]) == 0
    said = capsys.readouterr()
    assert len(looks) == 2 and said.err == f"waiting for {folder}: no run has begun in it yet\n"
    assert said.out.count("failed: no data") == 1


def test_who_waits_for_a_run_goes_on_where_the_only_other_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    removed, later, looks = write(tmp_path / "removed", exit_code=0), tmp_path / "later", list[float]()

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            removed.rename(tmp_path / "away")
        else:
            write(later, exit_code=0)

    monkeypatch.setattr(
        "pretrain.cli.status.time", SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    )
    assert main([str(removed), str(later), "--watch"]) == 0
    assert len(looks) == 2 and f"passed over: {removed} cannot be read" in capsys.readouterr().err


def test_one_that_is_waited_for_keeps_its_place_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a folder that turns out to be of something else ends nothing."""
    later, ended, neither = tmp_path / "later", write(tmp_path / "ended", exit_code=0), tmp_path / "neither"

    def sleep(seconds: float) -> None:
        write(later, exit_code=0)
        neither.mkdir()
        (neither / "notes").write_text("mine")

    monkeypatch.setattr(
        "pretrain.cli.status.time", SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    )
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main([*map(str, (later, ended, neither)), "--watch"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(
        f"waiting for {later}, {neither}: no run has begun in them yet\npassed over: {neither} is"
    )
    assert [line.split()[0] for line in said.out.split("run ")[-1].splitlines()[1:]] == [str(later), str(ended)]


class Slurm:
    """A squeue that lists `jobs`, and a clock that only sleeping moves."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, then: list[Callable[[], object]]) -> None:
        self.answer, self.calls, self.now, self._then = folder / "answer", folder / "calls", 0.0, then
        squeue = folder / "squeue"
        squeue.write_text(f'#!/bin/sh\necho "$*$SQUEUE_USERS" >> {self.calls}\n. {self.answer}\n')
        squeue.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setattr("pretrain.cli.status.time", self)

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._then.pop(0)()

    def says(self, line: str) -> None:
        self.answer.write_text(line + "\n")


UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
DOWN = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


def test_a_watch_waits_for_a_job_that_is_back_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And asks SLURM seldom; a controller that is down for a while ends nothing, nor does what the user's own squeue
    leaves out, such as the jobs of others."""
    monkeypatch.setenv("SQUEUE_USERS", "me")
    folder = write(tmp_path / "run", exit_code=85, reason="SIGUSR1")
    (folder / "slurm").mkdir()
    (folder / "slurm" / "11.started").touch()
    os.utime(folder / "slurm" / "11.started", (1, 1))
    (folder / "slurm" / "12.started").touch()
    (tmp_path / "bin").mkdir()

    def start_again() -> None:
        lock.append(FolderLock(folder))

    def finish() -> None:
        (folder / "outcome.json").write_text('{"exit_code": 0, "reason": "finished"}')
        lock.pop().release()

    lock, then = list[FolderLock](), list[Callable[[], object]]()
    slurm = Slurm(tmp_path / "bin", monkeypatch, then)
    slurm.says("echo 12")
    then += [lambda: None, lambda: None, lambda: slurm.says(DOWN), lambda: slurm.says("echo 12"), start_again, finish]
    assert main([str(folder), "--watch", "--every", "20"]) == 0
    said = capsys.readouterr()
    assert not then and said.out.count("stopped: SIGUSR1") == 5 and said.out.count("running: ") == 1
    assert said.err == f"waiting for {folder}: its job 12 has not ended (squeue --job 12)\n"
    assert slurm.calls.read_text() == "--noheader --format=%A %r --jobs=11,12\n" * 3, "after 0, 40 and 80 s"


def test_a_smoke_test_while_the_job_waits_ends_no_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has a job of its own, started last in the run's folder; of two in the queue the newer one is named."""
    folder = write(tmp_path / "run", exit_code=85, reason="SIGUSR1")
    (folder / "slurm").mkdir()
    for place, job in enumerate(("9", "12", "13"), start=1):
        (folder / "slurm" / f"{job}.started").touch()
        os.utime(folder / "slurm" / f"{job}.started", (place, place))
    (tmp_path / "bin").mkdir()
    then = list[Callable[[], object]]()
    slurm = Slurm(tmp_path / "bin", monkeypatch, then)
    slurm.says("echo 12; echo 9")
    then.append(lambda: slurm.says("exit 0"))
    assert main([str(folder), "--watch", "--every", "40"]) == 0 and not then
    assert capsys.readouterr().err == f"waiting for {folder}: its job 12 has not ended (squeue --job 12)\n"


@pytest.mark.parametrize("answer", [UNKNOWN, DOWN, "exit 0"])
def test_a_watch_ends_where_the_job_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str
) -> None:
    folder = write(tmp_path / "run", exit_code=1, reason="x")
    (folder / "slurm").mkdir()
    (folder / "slurm" / "12.started").touch()
    (tmp_path / "bin").mkdir()
    Slurm(tmp_path / "bin", monkeypatch, []).says(answer)
    assert main([str(folder), "--watch"]) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("code", [0, 2, 3, 6])
def test_nobody_waits_for_a_job_that_is_never_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = write(tmp_path / "run", exit_code=code, reason="x")
    (folder / "slurm").mkdir()
    (folder / "slurm" / "12.started").touch()
    (tmp_path / "bin").mkdir()
    slurm = Slurm(tmp_path / "bin", monkeypatch, [])
    slurm.says("echo 12")
    assert main([str(folder), "--watch"]) == 0 and not slurm.calls.exists()


def test_a_watch_waits_for_a_job_that_was_submitted_since_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However it ended: while the job waits, and while it starts. And says where it waits for a person."""
    folder = write(tmp_path / "run", exit_code=2, reason="no data")
    (folder / "slurm").mkdir()
    os.utime(folder / "outcome.json", (1, 1))
    mark_submitted(folder, "12")
    (tmp_path / "bin").mkdir()

    def start() -> None:
        (folder / "slurm" / "12.started").touch()

    def finish() -> None:
        (folder / "outcome.json").write_text('{"exit_code": 0, "reason": "finished"}')
        os.utime(folder / "slurm" / "12.started", (2, 2))

    then = list[Callable[[], object]]()
    slurm = Slurm(tmp_path / "bin", monkeypatch, then)
    slurm.says("echo '12 JobHeldUser'")
    then += [lambda: slurm.says("echo '12 DependencyNeverSatisfied'"), lambda: slurm.says("echo '12 None'"), start]
    then.append(finish)
    assert main([str(folder), "--watch", "--every", "40"]) == 0 and not then
    said = capsys.readouterr()
    assert said.out.count("failed: no data") == 4 and said.out.count("state      finished") == 1
    assert said.err.splitlines() == [
        f"waiting for {folder}: its job 12 is held, JobHeldUser (scontrol release 12)",
        f"waiting for {folder}: its job 12 waits for one that has failed, and will never start (scancel 12)",
        f"waiting for {folder}: its job 12 has not ended (squeue --job 12)",
    ]


def test_a_job_that_has_started_since_the_run_ended_is_named(tmp_path: Path) -> None:
    """Its node may have failed before it opened the run; what stands there is of the start before. A smoke test, which
    has a job of its own, and a job whose start the outcome is of, are none."""
    folder = write(tmp_path / "run", exit_code=85, reason="SIGUSR1")
    (folder / "slurm").mkdir()
    os.utime(folder / "outcome.json", (10, 10))
    for job, begun, trains in (("11", 9, True), ("12", 11, True), ("13", 12, False)):
        (folder / "slurm" / f"{job}.started").touch()
        os.utime(folder / "slurm" / f"{job}.started", (begun, begun))
        if trains:
            mark_submitted(folder, job)
    wanted = f"job 12 has started since, and has not come to open the run so far; its log is {folder}/slurm/12.log"
    assert "".join(wanted.split()) in "".join(shown(folder).split())  # a long path goes over the ends of lines
    os.utime(folder / "outcome.json", (20, 20))
    assert " has started since" not in shown(folder)


def test_of_a_run_that_has_not_begun_a_watch_knows_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    (folder / "slurm").mkdir(parents=True)
    mark_submitted(folder, "12")
    (tmp_path / "bin").mkdir()
    then = list[Callable[[], object]]()
    slurm = Slurm(tmp_path / "bin", monkeypatch, then)
    slurm.says(DOWN)  # which says nothing of the job

    then += [lambda: slurm.says("echo '12 JobHeldAdmin'"), lambda: slurm.says(DOWN), lambda: slurm.says(UNKNOWN)]
    assert main([str(folder), "--watch", "--every", "40"]) == 0 and not then
    assert capsys.readouterr().err.splitlines() == [
        f"waiting for {folder}: no run has begun in it yet",
        f"waiting for {folder}: its job 12 is held, JobHeldAdmin (scontrol release 12)",
        f"passed over: {folder}: its job 12 has ended, and no run has begun ({folder}/slurm/12.log)",
    ]
