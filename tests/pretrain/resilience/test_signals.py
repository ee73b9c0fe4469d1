"""Signals at any moment: all ranks stop after the same step, and the resumed run is the unbroken one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

import pretrain.loop
from common.paths import REPOSITORY
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.phases import Phases
from pretrain.resilience.signals import ProcessState, Stop
from tests.harness import run_ranks
from tests.pretrain.report.test_alerts import has_ended
from tests.pretrain.resilience.faults import outcome
from tests.pretrain.runs import assert_bit_identical, events, light_config, metrics, train_runs

KEYS = (
    "train.steps=5",
    "evaluate.sequences=24",
    "evaluate.every_steps=2",
    "checkpoint.every_steps=2",
    "resilience.replica_check_every_steps=1",
)
# (phase, which time it is entered, signal, rank that gets it, steps after which the run stops)
QUICK = [
    ("building the engine", 1, signal.SIGUSR1, 1, 0),
    ("forward", 3, signal.SIGTERM, 0, 3),
    ("validation", 2, signal.SIGTERM, 1, 2),
    ("checkpoint", 1, signal.SIGUSR1, 1, 2),
]
THOROUGH = [
    ("looking for a checkpoint", 1, signal.SIGTERM, 0, 0),
    ("reading batches", 1, signal.SIGTERM, 1, 0),
    ("agreeing on what is next", 2, signal.SIGINT, 1, 2),
    ("validation", 6, signal.SIGUSR1, 0, 5),
    ("comparing replicas", 3, signal.SIGHUP, 0, 3),
    ("ending", 1, signal.SIGTERM, 1, 5),
]


@pytest.mark.parametrize("moments", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.slow)], ids=["quick", "thorough"])
def test_a_signal_in_any_phase_stops_all_ranks_and_loses_nothing(
    prepared: Path, tmp_path: Path, moments: list[tuple]
) -> None:
    config = light_config(prepared, *KEYS, ranks=2)
    run_ranks(train_runs, 2, [(config, tmp_path / "unbroken")])
    cases = [(*moment, tmp_path / str(number)) for number, moment in enumerate(moments)]
    both = run_ranks(_stop_and_resume, 2, config, cases)
    assert both[0] == both[1]
    for (phase, _, number, rank, steps, run_dir), (code, saved, again) in zip(cases, both[0], strict=True):
        # While ending, the outcome is decided.
        assert code == ("FINISHED" if phase == "ending" else "STOPPED"), phase
        assert saved == steps, phase
        assert again == "FINISHED", phase
        stops = events(run_dir, "stopped")
        if phase != "ending":
            assert [(e["step"], e["reason"]) for e in stops] == [(steps, f"{number.name} to rank {rank}")], phase
        assert_bit_identical(run_dir, tmp_path / "unbroken")
        saved_steps = [e["step"] for e in events(run_dir, "checkpoint")]
        assert 0 not in saved_steps and len(set(saved_steps)) == len(saved_steps), phase
        validated = [e["step"] for e in events(run_dir, "validation")]
        assert validated == [2, 4, 5], phase
        assert outcome(run_dir)["exit_code"] == 0
        left = {p.name for p in run_dir.iterdir()} - {"config.json", "metrics.jsonl", "events.jsonl", "outcome.json"}
        left = {name for name in left if not name.startswith("code-")}  # of a checkout that is being changed
        assert left == {"checkpoints"}, phase


def _stop_and_resume(rank: int, config: Config, cases: list[tuple]) -> list[tuple[str, int, str]]:
    results = []
    enter = Phases.enter
    for phase, occurrence, number, target, _, run_dir in cases:
        seen = [0]

        def entered(self: Phases, name: str, **options: bool) -> None:
            enter(self, name, **options)
            seen[0] += name == phase  # noqa: B023
            if name == phase and seen[0] == occurrence and rank == target:  # noqa: B023
                os.kill(os.getpid(), number)  # noqa: B023
                deadline = time.monotonic() + 60
                while stop.requested is None and stop.state is not ProcessState.ENDING and time.monotonic() < deadline:  # noqa: B023
                    time.sleep(0.01)  # until the thread has heard of it, which takes its time on one busy core

        stop = Stop()
        stop.state = ProcessState.STARTING
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the case before left it ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop.install(launched=False)
        Phases.enter = entered
        try:
            code = pretrain.loop.train(config, Sources.load(config), run_dir, torch.device("cpu"), stop)
        finally:
            Phases.enter = enter
        dist.barrier()
        saved = len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
        dist.barrier()
        again = pretrain.loop.train(config, Sources.load(config), run_dir, torch.device("cpu"))
        results.append((code.name, saved, again.name))
    return results


def run_process(body: str, *, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """A Python process with a Stop called `stop`."""
    script = "import os, signal, subprocess, sys, time\nimport pretrain.resilience.signals as signals\n"
    script += "from pretrain.resilience.signals import ProcessState, Stop\nstop = Stop()\n" + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_a_rank_that_steps_aside_is_ended_without_a_word_or_speaks_itself() -> None:
    aside = "signals.ASIDE_SECONDS = {seconds}\nstop.install(launched=False)\nprint('ready', flush=True)\n"
    ended = "signals.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)\n"  # once it waits for that
    done = run_process(aside.format(seconds=20) + ended + "print(stop.step_aside())")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "ready\n", "")
    alone = run_process(aside.format(seconds=0.1) + "print(stop.step_aside())")
    assert (alone.returncode, alone.stdout, alone.stderr) == (0, "ready\nTrue\n", "")
    srun = "os.environ.update(SLURM_PROCID='1', SLURM_STEP_NUM_TASKS='2')\n" + aside.format(seconds=120)
    assert run_process(srun + "print(stop.step_aside())", timeout=60).stdout == "ready\nTrue\n"


def test_what_one_rank_alone_has_found_is_said_with_its_number() -> None:
    say = "from pretrain.ranks import Ranks\nstop.say_refusal(ValueError('no GPU'), Ranks({rank}, {local}, 16, 8))"
    srun = "os.environ.update(SLURM_PROCID='9', SLURM_STEP_NUM_TASKS='16')\n"
    assert run_process(srun + say.format(rank=9, local=1)).stderr == "error: rank 9: no GPU\n"
    assert run_process(srun + say.format(rank=8, local=0)).stderr == "error: no GPU\n"


def test_only_the_first_rank_of_a_node_says_that_it_was_stopped_before_the_start() -> None:
    script = "stop.install(launched=False)\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(20)"
    others = run_process(f"os.environ['LOCAL_RANK'] = '1'\n{script}")
    assert (others.returncode, others.stderr) == (85, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_before_the_ranks_have_met_a_signal_ends_the_process_at_once(name: str) -> None:
    # A shell's background jobs ignore SIGINT, which is inherited and then left alone.
    script = f"signal.signal(signal.{name}, signal.SIG_DFL)\nstop.install(launched=False)\n"
    done = run_process(f"{script}os.kill(os.getpid(), signal.{name})\ntime.sleep(20)\nprint('no')")
    assert (done.returncode, done.stdout) == (85, "")
    assert f"{name} during start-up" in done.stderr


def test_a_signal_that_comes_while_they_are_being_taken_over_is_heard() -> None:
    done = run_process(
        """
        taken = signal.signal
        def take(number, handler):
            taken(number, handler)
            if number == signal.SIGUSR1:
                os.kill(os.getpid(), number)
        signal.signal = take
        stop.install(launched=False)  # before the ranks have met: a signal ends the process
        time.sleep(20)
        print("no")
        """
    )
    assert (done.returncode, done.stdout) == (85, "")
    assert "SIGUSR1 during start-up" in done.stderr


def test_while_the_program_is_loading_a_signal_waits_for_the_run_to_be_known() -> None:
    """So that the run folder can say how the start ended; not for ever, if the loading hangs."""
    script = """
        signals.START_UP_SECONDS = {seconds}
        stop.enter(ProcessState.LOADING)
        stop.install(launched=False)
        os.kill(os.getpid(), signal.SIGTERM)
        while stop.requested is None:
            time.sleep(0.01)
        time.sleep({loading})
        stop.before_leaving.append(lambda code, message: print("left with", int(code), message, flush=True))
        stop.enter(ProcessState.JOINING)
        print("no")
        """
    done = run_process(script.format(seconds=600, loading=0.0))
    assert (done.returncode, done.stdout) == (85, "left with 85 SIGTERM during start-up: nothing was trained\n")
    assert run_process(script.format(seconds=0.1, loading=20)).returncode == 85


def test_a_second_signal_counts_after_a_while_and_works_although_the_main_thread_waits() -> None:
    done = run_process(
        """
        signals.SECOND_SIGNAL_SECONDS = 600.0
        stop.state = ProcessState.TRAINING
        (read, write), (hears, told), process, ask = os.pipe(), os.pipe(), os.getpid(), stop._ask

        def asked(reason):
            ask(reason)
            print("goes on", flush=True)
            signals.SECOND_SIGNAL_SECONDS -= 300.0  # of the third signal none are left
            os.write(told, b".")

        stop._ask = asked
        stop.install(launched=False)
        stop.before_leaving.append(lambda code, message: print("left with", int(code), flush=True))
        if os.fork() == 0:
            os.close(told)
            os.kill(process, signal.SIGTERM)
            while os.read(hears, 1):
                os.kill(process, signal.SIGTERM)
            os._exit(0)
        import ctypes
        ctypes.CDLL(None).read(read, ctypes.create_string_buffer(1), 1)  # blocks, and is begun again
        while True:
            ctypes.CDLL(None).read(read, ctypes.create_string_buffer(1), 1)
        """
    )
    assert done.returncode == 86, done.stderr
    assert done.stdout == "goes on\ngoes on\nleft with 86\n"
    assert "SIGTERM after SIGTERM: leaving at once. Nothing was trained\n" in done.stderr


def test_the_outcome_repeats_no_word_of_the_terminal() -> None:
    done = run_process(
        """
        from pretrain.report.exit_codes import ExitCode
        stop.before_leaving.append(lambda code, message: print(int(code), message, flush=True))
        stop.leave(ExitCode.FOLDER_LOST, "error: this run folder is gone")
        """
    )
    assert (done.returncode, done.stdout) == (6, "6 this run folder is gone\n")
    assert done.stderr.endswith("error: this run folder is gone\n")


@pytest.mark.parametrize("kind", ["second signal", "dead neighbour"])
@pytest.mark.parametrize("state", [ProcessState.TRAINING, ProcessState.ENDING])
def test_a_run_that_ends_while_its_checkpoints_are_looked_for_is_not_left(
    kind: str, state: ProcessState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system may take a while; meanwhile the main thread goes on, and comes to its own end."""
    monkeypatch.setattr("pretrain.resilience.signals.PEER_SECONDS", 0.0)
    monkeypatch.setattr("pretrain.resilience.signals.SECOND_SIGNAL_SECONDS", -1.0)
    stop, left = Stop(), Mock()
    monkeypatch.setattr(stop, "leave", left)
    stop.peer_is_dead = lambda: True

    def standing() -> str:
        stop.state = state
        return "Step 2 is saved"

    stop.standing, stop.state = standing, ProcessState.TRAINING
    stop._ask("SIGTERM")
    if kind == "second signal":
        stop._ask("SIGTERM")
    else:
        stop._look_at_peers()
    assert left.call_count == (state is ProcessState.TRAINING)
    assert all(call.args[1].endswith(". Step 2 is saved") for call in left.call_args_list)


def test_a_stop_that_finds_no_safe_moment_during_start_up_leaves_in_time() -> None:
    done = run_process(
        """
        signals.START_UP_SECONDS = 1.0
        stop.state = ProcessState.STARTING
        stop.install(launched=False)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(20)
        """
    )
    assert done.returncode == 85


def test_a_dead_neighbour_ends_a_rank_that_was_asked_to_stop() -> None:
    done = run_process(
        """
        signals.PEER_SECONDS = 0.2
        stop.state = ProcessState.TRAINING
        stop.install(launched=False)
        stop.peer_is_dead = lambda: True
        stop.standing, signals.STANDING_SECONDS = (lambda: time.sleep(20)), 0.1  # the file system hangs
        time.sleep(1.5)  # its own error may come first; the launcher's SIGTERM says that it is over
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
        """
    )
    assert done.returncode == 7
    assert done.stderr == "another rank of this machine has died. Its checkpoints cannot be read now\n"


RANK = """
import os, time
os.environ["WORLD_SIZE"] = "2"
import pretrain.resilience.signals as signals
signals.LAUNCHER_SECONDS = {seconds}
stop = signals.Stop()
stop.state = signals.ProcessState.TRAINING
stop.install(launched=True)
with open({ready!r} + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, {ready!r})
while stop.requested is None:
    time.sleep(0.05)
time.sleep(0.8)  # the checkpoint
open({saved!r}, "w").close()
"""


@pytest.mark.parametrize(
    "told", ["never", pytest.param("before the launcher", marks=pytest.mark.slow), "after the launcher"]
)
def test_a_rank_dies_with_its_launcher_unless_it_was_told_to_stop(tmp_path: Path, told: str) -> None:
    """The launcher is killed alone; or with the whole job by SIGUSR1, which it does not know: then the rank saves, also
    if it hears of that last."""
    child, seconds = tmp_path / "rank.py", 0.1 if told == "never" else 60
    child.write_text(RANK.format(ready=str(tmp_path / "ready"), saved=str(tmp_path / "saved"), seconds=seconds))
    wait = {"never": "", "before the launcher": "kill -USR1 {}", "after the launcher": "sleep 0.3; kill -USR1 {}"}[told]
    done = run_process(
        f"""
        process = subprocess.Popen([sys.executable, {str(child)!r}], env={{**os.environ, "PYTHONPATH": "."}})
        while not os.path.exists({str(tmp_path / "ready")!r}):
            time.sleep(0.05)
        tell = subprocess.Popen(["sh", "-c", {wait!r}.format(process.pid)])
        if {told.startswith("before")}:
            tell.wait()
        os.kill(os.getpid(), signal.{"SIGKILL" if told == "never" else "SIGUSR1"})
        time.sleep(20)
        """
    )
    assert done.returncode == -(signal.SIGKILL if told == "never" else signal.SIGUSR1)
    pid = int((tmp_path / "ready").read_text())
    deadline = time.monotonic() + 60
    while not has_ended(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended(pid)
    assert (tmp_path / "saved").exists() == (told != "never")
