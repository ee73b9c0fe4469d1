"""launch/sweep.py: what a stop does to the sweep and to the run in training, and what is said of that run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.run_lock import FolderLock
from launch.sweeps import training
from launch.sweeps.command import main
from tests.harness import forked
from tests.launch.launcher import ROOT, environment
from tests.launch.sweep_case import VARY, Case


def sweep_in(output: Path, number: int, line: list[str]) -> int:
    """A sweep in this process, whose prints go into a file."""
    signal.signal(number, signal.SIG_DFL)  # what nohup, or a shell's job in the background, ignores stays ignored
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, sys.stdout.fileno())
    return main(line)


def wait_until_it_trains(case: Case, is_alive: Callable[[], bool]) -> None:
    while not (case.folder / "waits").exists():
        assert is_alive()
        time.sleep(0.05)


def assert_stopped(case: Case, number: int, printed: str) -> None:
    """What a signal does to a sweep whose first run was in training; then the same command goes on."""
    assert (case.folder / "got").read_text() == str(number)
    assert printed.endswith("stopped at step 2\nstopped; the same command goes on\n")
    assert case.trained == ["1e-3"]
    case.ends()
    assert case.run(*VARY) == 0
    assert case.trained == ["1e-3", "1e-3", "2e-3"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_of_the_sweep_alone_is_handed_on_and_the_same_command_goes_on(case: Case, number: int) -> None:
    case.ends(**{"1e_3": "waits"})
    said = case.folder / "said"
    with forked(sweep_in, said, number, case.line("--launcher", case.launcher, *VARY)) as process:
        wait_until_it_trains(case, process.is_alive)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode == 128 + number
    assert_stopped(case, number, said.read_text())


@pytest.mark.usefixtures("no_pictures")
def test_a_stop_by_ctrl_c_of_the_command_itself(case: Case) -> None:
    """Beside Python's own handling of Ctrl-C, and that of common/interruption.py."""
    case.ends(**{"1e_3": "waits"})
    # What a shell's job in the background ignores stays ignored.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    sweep = [sys.executable, str(ROOT / "launch" / "sweep.py"), *case.line("--launcher", case.launcher, *VARY)]
    command = [sys.executable, "-c", heard, *sweep]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_until_it_trains(case, lambda: process.poll() is None)
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert_stopped(case, signal.SIGINT, printed)


def test_a_run_that_was_stopped_by_itself_stops_the_sweep(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.ends(**{"1e_3": 85})
    assert case.run(*VARY) == 85
    assert capsys.readouterr().out.endswith("stopped at step 2\nstopped; the same command goes on\n")
    assert case.trained == ["1e-3"]


def test_the_progress_of_a_run_says_that_its_loss_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "LINE_SECONDS", 0.0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    lock = FolderLock(tmp_path)
    try:
        training.Progress("run 1 of 2", tmp_path).show()
    finally:
        lock.release()
    assert capsys.readouterr().out == "run 1 of 2: step 1, loss not finite\n"


def test_the_time_that_is_left_is_that_of_the_runs_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On average, for the run that begins and those after it; a run that is passed over takes none."""
    clock, goes_on = [0.0], SimpleNamespace(goes_on=True)
    runs: Any = [SimpleNamespace(name=name) for name in ("a", "elsewhere", "b", "c")]
    sweep: Any = SimpleNamespace(
        result=lambda run: SimpleNamespace(state=goes_on if run.name == "elsewhere" else None),
        arguments=lambda run: [],
        run_dir=lambda run: Path(run.name),
    )

    def train(*_: object) -> int:
        clock[0] += 60
        return 0

    monkeypatch.setattr(training, "_train", train)
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    assert training.train_all(sweep, runs, ["train"]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert titles == [
        "run 1 of 4  a",
        f"run 2 of 4  elsewhere  (about {training.duration(180)} for those that are left)",
        f"run 3 of 4  b  (about {training.duration(120)} for those that are left)",
        f"run 4 of 4  c  (about {training.duration(60)} for those that are left)",
    ]
