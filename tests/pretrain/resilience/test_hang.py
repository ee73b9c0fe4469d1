"""A rank that does not arrive is named with its phase, every stack is written, and no process is left."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import torch

import pretrain.resilience.step_limit
import pretrain.resilience.watchdog
import tests.harness as harness
from common.ports import free_port
from common.run_lock import UNSEEN
from pretrain.config.watching import ResilienceConfig
from pretrain.phases import Phases, Record, read
from pretrain.report.exit_codes import ExitCode
from pretrain.resilience.guard import collective_timeout
from pretrain.resilience.signals import Stop
from pretrain.resilience.watchdog import LISTED, MESSAGE, READER, Peers, Report, Watchdog, describe, read_reports
from pretrain.trainer import Trainer
from tests.pretrain.resilience.faults import outcome, train_with
from tests.pretrain.runs import events, small_config

LIMIT = "resilience.hang_timeout_seconds = 30"
"""That a message names."""


def exit_codes(function: object, world_size: int, *args: object, timeout_seconds: float) -> list[int | None]:
    """Runs `function(rank, *args)` on forked ranks and waits until all have left by themselves; their exit codes."""
    port, processes = free_port(), []
    for rank in range(world_size):
        _, sender = harness._context.Pipe(duplex=False)
        process = harness._context.Process(
            target=harness._rank_main, args=(sender, function, rank, world_size, port, args), daemon=True
        )
        process.start()
        processes.append(process)
    deadline = time.monotonic() + timeout_seconds
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def train_and_leave(rank: int, *args: Any) -> None:
    """`train_with`, and the exit code that launch/pretrain.py has for how it ended."""
    os._exit(ExitCode[train_with(rank, *args).partition(":")[0]])


def stop_in(trainer: Trainer, rank: int, phase: str, step: int, sleeps: bool) -> None:
    """In a phase of a step `rank` is stopped (SIGSTOP), or its main thread sleeps."""
    enter = trainer.setup.phases.enter

    def entered(name: str, **options: bool) -> None:
        enter(name, **options)
        if name == phase and trainer.setup.phases.step == step and torch.distributed.get_rank() == rank:
            if sleeps:
                time.sleep(1000)
            else:
                os.kill(os.getpid(), signal.SIGSTOP)

    trainer.setup.phases.enter = entered


def hang(prepared: Path, run_dir: Path, rank: int, phase: str, step: int, *, sleeps: bool) -> list[int | None]:
    """Three ranks, of which `rank` is stopped; their exit codes. Where start-up takes longer than the limit, as on one
    busy core, and is reported in its place, again with a longer one."""
    for seconds in (10, 40, 320):
        shutil.rmtree(run_dir, ignore_errors=True)
        limit = f"resilience.hang_timeout_seconds={seconds}"
        config = small_config(prepared, "train.steps=9", "evaluate.sequences=0", limit)
        config = config.replaced("batch", global_sequences=6, micro_sequences=2)
        codes = exit_codes(
            train_and_leave, 3, config, run_dir, stop_in, rank, phase, step, sleeps, timeout_seconds=130 + 4 * seconds
        )
        if f"of step {step}" in (run_dir / "hang" / "message.txt").read_text():
            break
    return codes


@pytest.mark.slow  # test_slow_is_not_hung_and_patient_phases_may_take_their_time has a fast watchdog
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_is_named_and_killed(prepared: Path, tmp_path: Path, stopped: int) -> None:
    """Rank 0 too, although it hosts the store by which the ranks have met."""
    run_dir = tmp_path / "run"
    codes = hang(prepared, run_dir, stopped, "forward", 3, sleeps=False)
    assert [code for rank, code in enumerate(codes) if rank != stopped] == [5, 5]
    # Woken for its stacks it may see before it is killed that the others have left.
    assert codes[stopped] not in (0, None)
    message = (run_dir / "hang" / "message.txt").read_text()
    assert f"Did not arrive: rank {stopped}: no sign of life" in message
    assert "is stopped (SIGSTOP), last seen in phase 'forward' of step 3" in message
    assert f"Waiting: ranks {'1-2' if stopped == 0 else '0-1'}, for " in message
    assert re.search(rf"Collectives: all_reduce of .*, of rank {stopped} there is no record\. Stacks", message)
    assert events(run_dir, "hang")[0]["message"] == message.strip()
    for rank in range(3):
        stacks = (run_dir / "hang" / f"rank-{rank:05d}.stacks").read_text()
        assert "Thread" in stacks and "micro_steps.py" in stacks, rank
    if stopped != 0:
        assert outcome(run_dir)["exit_code"] == 5 and outcome(run_dir)["reason"] == message.strip()


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named(prepared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    codes = hang(prepared, run_dir, 1, "reading batches", 2, sleeps=True)
    assert codes == [5, 5, 5]
    message = (run_dir / "hang" / "message.txt").read_text()
    assert "Did not arrive: rank 1: still in phase 'reading batches' of step 2" in message
    assert "Waiting: ranks 0, 2," in message
    # The one message of the step, in which ranks say whether they have their batches.
    assert re.search(
        r"Collectives: all_?reduce of long \[\d+\], call \d+ of the group of ranks 0-2: rank 1 did not call it, ranks "
        r"0, 2 did\. Stacks",
        message,
    )
    assert "in entered" in (run_dir / "hang" / "rank-00001.stacks").read_text()


def stop_after_measured_steps(trainer: Trainer, phase: str) -> None:
    """Rank 1 sleeps in a phase of step 25, when steps have a limit of seconds."""
    pretrain.resilience.step_limit.LEAST_SECONDS = 10.0
    stop_in(trainer, 1, phase, 25, sleeps=True)


@pytest.mark.slow  # test_a_rank_that_waits_in_a_long_phase_for_a_hung_step_reports_too has watchdogs alone
@pytest.mark.parametrize("phase", ["forward", "reading the step's sums"])
def test_a_hung_step_is_ended_by_its_own_limit(prepared: Path, tmp_path: Path, phase: str) -> None:
    """Where it reads the step's sums, the others wait for it in a phase that may take long."""
    run_dir, long = tmp_path / "run", "resilience.hang_timeout_seconds=3600"
    config = small_config(prepared, "train.steps=30", "evaluate.sequences=0", long)
    config = config.replaced("batch", global_sequences=6, micro_sequences=2)
    codes = exit_codes(train_with, 3, config, run_dir, stop_after_measured_steps, phase, timeout_seconds=400)
    assert codes == [5, 5, 5]
    message = (run_dir / "hang" / "message.txt").read_text()
    assert f"Did not arrive: rank 1: still in phase '{phase}' of step 25" in message
    assert "Waiting: ranks 0, 2," in message and "(a step's limit of " in message


def test_a_collective_waits_longer_than_the_watchdog_which_can_say_why() -> None:
    """It ends a run when the time is over and reports, for which it waits 30 s at most, were read."""
    for seconds in (60.0, 600.0, 3600.0):
        assert collective_timeout(ResilienceConfig(hang_timeout_seconds=seconds)) > 1.5 * seconds + 30.0
    assert collective_timeout(ResilienceConfig(hang_timeout_seconds=0.0)) == 1800.0


def test_phases_can_be_read_from_outside(tmp_path: Path) -> None:
    phases = Phases()
    phases.keep_in(tmp_path / "phase")
    phases.step = 3
    phases.enter("x" * 100)
    found = read(tmp_path / "phase")
    assert found is not None and (found.step, found.count, found.name) == (3, 1, "x" * 64)
    assert read(tmp_path / "none") is None


def test_slow_is_not_hung_and_patient_phases_may_take_their_time(tmp_path: Path) -> None:
    """A rank that goes on while others are waited for withdraws its report."""
    phases, goes_on, codes = Phases(), threading.Event(), list[int]()
    phases.enter("patient", patient=True)
    identities = [{"host": "a", "boot": "b", "namespace": "n", "pid": os.getpid(), "start": 1}] * 2
    watchdog = Watchdog(tmp_path, phases, leaving(codes), Peers(0, identities), hang_timeout_seconds=0.3, lock=None)
    waits_until(watchdog, goes_on)
    time.sleep(0.8)
    assert not (tmp_path / "hang").exists()
    phases.enter("slow")
    deadline = time.monotonic() + 60
    while not (tmp_path / "hang" / READER).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "hang" / "rank-00000.json").exists()
    phases.enter("next", patient=True)
    goes_on.set()
    while (tmp_path / "hang" / "rank-00000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not (tmp_path / "hang" / "rank-00000.json").exists()
    watchdog.close()
    assert not (tmp_path / "ranks").exists() and not codes


def test_a_run_that_ends_while_its_last_phase_is_reported_was_only_slow(tmp_path: Path) -> None:
    """Its end takes the report back, and waits for nobody's."""
    phases, codes = Phases(), list[int]()
    identities = [{"host": "a", "boot": "b", "namespace": "n", "pid": os.getpid(), "start": 1}] * 2
    watchdog = Watchdog(tmp_path, phases, leaving(codes), Peers(0, identities), hang_timeout_seconds=0.3, lock=None)
    waits_until(watchdog, threading.Event())
    phases.enter("ending")
    deadline = time.monotonic() + 60
    while not (tmp_path / "hang" / READER).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    watchdog.close()
    assert not watchdog._thread.is_alive() and not codes
    assert [path.name for path in (tmp_path / "hang").iterdir()] == ["rank-00000.stacks"]


class Left(Stop):
    """Notes with which code and reason the process would have been left."""

    def __init__(self, codes: list[int]) -> None:
        super().__init__()
        self.codes = codes
        self.reason = ""

    def leave(self, code: ExitCode, message: str, reason: str = "") -> NoReturn:
        self.codes.append(code)
        self.reason = reason or message
        raise SystemExit  # ends the watchdog's thread


def leaving(codes: list[int]) -> Left:
    stop = Left(codes)
    stop.standing = lambda: "Step 2 is saved"
    return stop


def waits_until(watchdog: Watchdog, over: threading.Event) -> None:
    """Its time for the reports of others is over when `over` is set, if it is the reader by then."""
    watchdog._grace = 600.0
    watchdog._all_have_reported = over.is_set


def ranks_of_two(tmp_path: Path, codes: list[int]) -> tuple[list[Phases], list[Watchdog]]:
    """Two watched ranks in a process, whose steps have a limit of 0.2 s and all else one of a minute."""
    identities = [{"host": f"node-{rank}", "boot": "", "namespace": "", "pid": 1, "start": 1} for rank in range(2)]
    phases = [Phases(), Phases()]
    for own in phases:
        own.step, own.step_limit = 3, 0.2
    return phases, [
        Watchdog(tmp_path, own, leaving(codes), Peers(rank, identities), hang_timeout_seconds=60.0, lock=None)
        for rank, own in enumerate(phases)
    ]


def test_a_file_system_that_does_not_answer_does_not_end_the_watchdog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that looks for the report of another."""
    (phases, _), watchdogs = ranks_of_two(tmp_path, [])
    for watchdog in watchdogs:
        watchdog.close()

    def unanswered(*args: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    phases.enter("reading batches")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", unanswered)
        assert not watchdogs[0]._is_called(phases.since + 20.0)
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang" / READER).touch()
    assert watchdogs[0]._is_called(phases.since + 40.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", ["does not say what is there", "does not give a report back", "another"])
def test_a_hang_ends_whatever_its_report_meets(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file system may be what hangs."""
    codes: list[int] = []
    if fault == "does not say what is there":
        monkeypatch.setattr("pretrain.resilience.watchdog.exists", lambda path: False)
    elif fault == "does not give a report back":
        monkeypatch.setattr("pretrain.resilience.watchdog.read_reports", lambda hang: {})
    else:
        monkeypatch.setattr("pretrain.resilience.watchdog.describe", lambda *args: dict[str, str]()["of nobody"])
    identity = {"host": "a", "boot": "", "namespace": "", "pid": 1, "start": 1}
    phases, stop = Phases(), leaving(codes)
    phases.enter("patient", patient=True)
    watchdog = Watchdog(tmp_path, phases, stop, Peers(0, [identity]), hang_timeout_seconds=0.1, lock=None)
    watchdog._grace = 0.1
    phases.enter("forward")
    watchdog._thread.join(timeout=60)
    watchdog.close()
    assert codes == [ExitCode.HUNG]
    assert "phase 'forward'" in stop.reason, stop.reason
    assert capfd.readouterr().err.count("error: hang: ") == (fault != "another")


def test_what_follows_from_a_hang_has_its_code_on_a_rank_that_was_woken(tmp_path: Path) -> None:
    """It reported nothing, and meets the end of the others' connections."""
    codes: list[int] = []
    _, watchdogs = ranks_of_two(tmp_path, codes)
    for watchdog in watchdogs:
        watchdog.settle()
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang" / MESSAGE).write_text("error: hang: rank 1 is stopped\n")
    for watchdog in watchdogs:
        with pytest.raises(SystemExit):
            watchdog.settle()
        assert cast(Left, watchdog._stop).reason == "error: hang: rank 1 is stopped"
        watchdog.close()
    assert codes == [ExitCode.HUNG] * 2


def test_while_a_whole_job_is_suspended_nobody_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that comes far too late shows it: what passed since the one before does not count."""
    clock, looks = iter([100.0, 101.0, 5000.0, 5001.0]), iter([False, False, False, True])
    monkeypatch.setattr(pretrain.resilience.watchdog, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    watchdog, phases, waited = Watchdog.__new__(Watchdog), SimpleNamespace(since=100.0), list[float]()
    vars(watchdog).update(
        _timeout=60.0,
        _lock=None,
        _phases=phases,
        _ended=SimpleNamespace(wait=lambda pause: next(looks)),
        _has_hung=lambda now: waited.append(now - phases.since),
        _is_called=lambda now: False,
    )
    watchdog._watch()
    assert waited == [1.0, 1.0, 2.0]


def test_the_limit_of_a_step_holds_in_quick_phases_alone(tmp_path: Path) -> None:
    """By an invented clock."""
    (phases, _), watchdogs = ranks_of_two(tmp_path, [])
    watchdog = watchdogs[0]
    for other in watchdogs:
        other.close()
    phases.step_limit = 20.0
    phases.enter("forward", quick=True)
    assert not watchdog._has_hung(phases.since + 19.0) and watchdog._has_hung(phases.since + 21.0)
    phases.may_take_long()
    assert not watchdog._has_hung(phases.since + 59.0) and watchdog._has_hung(phases.since + 61.0)
    phases.enter("reading batches")
    assert not watchdog._has_hung(phases.since + 59.0) and watchdog._has_hung(phases.since + 61.0)
    phases.enter("forward", quick=True)
    phases.step_limit = None
    assert not watchdog._has_hung(phases.since + 59.0) and watchdog._has_hung(phases.since + 61.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_waits_in_a_long_phase_for_a_hung_step_reports_too(tmp_path: Path) -> None:
    codes: list[int] = []
    phases, watchdogs = ranks_of_two(tmp_path, codes)
    phases[1].enter("forward")
    phases[1].enter("waiting for the batches of other ranks")
    phases[0].enter("forward", quick=True)
    for watchdog in watchdogs:
        watchdog._thread.join(timeout=60)
        watchdog.close()
    assert codes == [5, 5]
    message = (tmp_path / "hang" / "message.txt").read_text()
    assert "Did not arrive: rank 0: still in phase 'forward' of step 3 on node-0. Waiting: rank 1, for " in message
    assert "(a step's limit of 0 s, resilience.step_timeout_factor)" in message
    assert message.endswith(f"write them: {tmp_path / 'hang'}. Step 2 is saved\n")
    for watchdog in watchdogs:  # what the outcome and an alert say, of whichever rank writes them
        assert isinstance(watchdog._stop, Left) and watchdog._stop.reason == message.strip()


@pytest.mark.parametrize("grace", [2.0, 0.0], ids=["after it", "before it"])
def test_a_rank_that_was_called_goes_on_with_the_one_that_called_it(tmp_path: Path, grace: float) -> None:
    """Whether its time is over after that one's, or shortly before."""
    codes: list[int] = []
    phases, watchdogs = ranks_of_two(tmp_path, codes)
    hang, deadline, goes_on = tmp_path / "hang", time.monotonic() + 60, threading.Event()
    phases[1].enter("waiting for the batches of other ranks")
    waits_until(watchdogs[0], goes_on)
    watchdogs[1]._grace = grace
    phases[0].enter("forward", quick=True)
    while len(list(hang.glob("rank-*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.0 if grace else 0.3)
    phases[0].enter("backward")
    goes_on.set()
    while list(hang.glob("rank-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not list(hang.glob("rank-*.json")) and not codes
    assert not (hang / "message.txt").exists() and not (hang / "reader").exists()
    for watchdog in watchdogs:
        watchdog.close()


def test_a_step_that_ended_late_and_is_being_written_down_is_no_hang(tmp_path: Path) -> None:
    """Rank 0 has read the sums of the step and is still in the same phase, in which it writes."""
    codes: list[int] = []
    phases, watchdogs = ranks_of_two(tmp_path, codes)
    hang, deadline, is_written = tmp_path / "hang", time.monotonic() + 60, threading.Event()
    watchdogs[1].close()
    waits_until(watchdogs[0], is_written)
    watchdogs[0]._wake_silent_ranks_here = list  # as one that is on another node
    phases[0].enter("reading the step's sums", quick=True)
    while not (hang / "reader").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    phases[0].may_take_long()
    is_written.set()
    while (hang / "reader").exists() and not codes and time.monotonic() < deadline:
        time.sleep(0.01)
    watchdogs[0].close()
    assert not codes and not (hang / "message.txt").exists() and not list(hang.glob("rank-*.json"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("namespace", ["", UNSEEN], ids=["nodes", "containers with the host's /proc"])
def test_one_rank_reads_the_reports_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    """Five nodes of a rank each: if every rank read all reports, N ranks would read N x N files."""
    reads: list[int] = []

    def counted(hang: Path) -> dict[int, Report]:
        found = read_reports(hang)
        reads.append(len(found))
        return found

    monkeypatch.setattr("pretrain.resilience.watchdog.read_reports", counted)
    identities = [
        {"host": f"node-{rank}", "boot": "", "namespace": namespace, "pid": 1, "start": 1} for rank in range(5)
    ]
    codes: list[int] = []
    stops, phases = [Left(codes) for _ in range(5)], [Phases() for _ in range(5)]
    for own in phases:
        own.enter("start-up", patient=True)
    watchdogs = [
        Watchdog(tmp_path, phases[rank], stops[rank], Peers(rank, identities), hang_timeout_seconds=0.2, lock=None)
        for rank in range(5)
    ]
    for own, watchdog in zip(phases, watchdogs, strict=True):
        watchdog._grace = 60.0
        own.enter("forward")
    deadline = time.monotonic() + 120
    while len(codes) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    for watchdog in watchdogs:
        watchdog.close()
    assert codes == [5] * 5 and reads == [5]
    message = (tmp_path / "hang" / "message.txt").read_text()
    assert [stop.reason for stop in stops] == [message.strip()] * 5
    assert "no rank is behind" in message and "Waiting: ranks 0-4," in message
    assert [event["message"] for event in events(tmp_path, "hang")] == [message.strip()]


def test_a_message_names_some_of_many_absent_ranks() -> None:
    record = Record(0.0, 7, 2, "forward")
    reports = {rank: Report(rank, {"host": "a"}, 31.0, record) for rank in range(100, 200)}
    reports[150] = Report(150, {"host": "b"}, 31.0, Record(0.0, 6, 2, "reading batches"))
    text = describe(reports, list(range(100)), {rank: f"process {rank}" for rank in range(LISTED)}, LIMIT, Path("hang"))
    assert (
        text.count("no sign of life") == LISTED
        and f"; and {100 + 1 - LISTED} more. Waiting: ranks 100-149, 151-199" in text
    )
    few = describe(reports, [3], {3: "process 3"}, LIMIT, Path("hang"))
    assert (
        "rank 3: no sign of life" in few and "rank 150: still in phase 'reading batches'" in few and "more" not in few
    )


def test_nobody_is_blamed_if_all_are_in_the_same_phase() -> None:
    record = Record(0.0, 7, 2, "adding up over ranks")
    reports = {rank: Report(rank, {"host": "a"}, 31.0, record) for rank in range(3)}
    text = describe(reports, [], {}, LIMIT, Path("hang"))
    assert text.startswith(
        "hang: phase 'adding up over ranks' of step 2 does not end. Did not arrive: no rank is behind"
    )
    assert "Waiting: ranks 0-2, for 31 s (resilience.hang_timeout_seconds = 30)" in text
