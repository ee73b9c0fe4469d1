"""Faults through the real launcher: which exit code comes out, what is left, and that nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.launch.launcher import command, environment, lines, members, ranks_of, run, session
from tests.pretrain.runs import assert_bit_identical, events, metrics

pytestmark = pytest.mark.slow
KEYS = (
    "train.steps=300",
    "evaluate.sequences=8",
    "evaluate.every_steps=10",
    "checkpoint.every_steps=20",
    "batch.global_sequences=8",
    "batch.micro_sequences=2",
    "resilience.hang_timeout_seconds=20",
)


@contextmanager
def started(prepared: Path, run_dir: Path, *overrides: str, keeps: str = "") -> Iterator[subprocess.Popen[str]]:
    """The deepspeed command in a session of its own. `keeps`: signals that a script ignores on its behalf."""
    line = command(2, prepared, run_dir, *KEYS, *overrides)
    script = f"trap '' {keeps}; exec \"$@\"" if keeps else 'exec "$@"'
    with (
        open(run_dir.with_suffix(".log"), "w") as log,
        session(["bash", "-c", script, "bash", *line], cwd=run_dir.parent, output=log) as process,
    ):
        yield process


def wait_for(condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def nobody_is_left(process: subprocess.Popen[str]) -> bool:
    return not members(process)


def outcome(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "outcome.json").read_text())


def log_of(run_dir: Path) -> str:
    return run_dir.with_suffix(".log").read_text()


@pytest.mark.parametrize(
    "how, code",
    [("USR1 to the job", 85), ("TERM to a rank", 85), ("TERM to the job", None), ("KILL to deepspeed", None)],
)
def test_a_stop_saves_and_gives_its_code_where_the_launcher_lets_it(
    prepared: Path, tmp_path: Path, how: str, code: int | None
) -> None:
    run_dir = tmp_path / "run"
    with started(prepared, run_dir, keeps="USR1" if "USR1" in how else "") as process:
        wait_for(lambda: len(lines(run_dir)) >= 5)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        if how == "TERM to a rank":
            ranks[1].terminate()
        elif how == "KILL to deepspeed":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGUSR1 if "USR1" in how else signal.SIGTERM)
        process.wait(timeout=120)
        wait_for(lambda: nobody_is_left(process), 60)
        if code is not None:
            assert process.returncode == code, log_of(run_dir)
    steps = len(lines(run_dir))
    assert outcome(run_dir)["exit_code"] == 85, log_of(run_dir)
    assert outcome(run_dir)["step"] == steps
    assert (run_dir / "checkpoints" / f"step-{steps:08d}").is_dir()
    assert not list(run_dir.glob("lock-*"))


def test_signals_at_random_moments_lose_nothing(prepared: Path, tmp_path: Path) -> None:
    """From the first instant on: in start-up, training, validation and checkpoints."""
    keys = ("train.steps=60", "evaluate.every_steps=3", "checkpoint.every_steps=4", "model.dropout=0.1")
    run(*command(2, prepared, tmp_path / "unbroken", *KEYS, *keys), cwd=tmp_path)
    run_dir, draw, codes = tmp_path / "run", random.Random(6), []
    for attempt in range(8):
        with started(prepared, run_dir, *keys, keeps="USR1") as process:
            wait_for(lambda: len(ranks_of(process)) == 2)
            if attempt % 2:  # training
                target = len(lines(run_dir)) + draw.randint(1, 6)
                wait_for(lambda: len(lines(run_dir)) >= target or process.poll() is not None)  # noqa: B023
            time.sleep(draw.uniform(0.5, 4.0))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGUSR1)
            codes.append(process.wait(timeout=180))
            wait_for(lambda: nobody_is_left(process), 60)
        if codes[-1] == 0:
            break
    assert codes.count(85) >= 4, codes
    assert set(codes) <= {0, 85}, codes
    run(*command(2, prepared, run_dir, *KEYS, *keys), cwd=tmp_path)
    assert_bit_identical(run_dir, tmp_path / "unbroken")
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 61))


def test_a_stopped_rank_ends_the_run_with_its_name(prepared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(prepared, run_dir, "resilience.hang_timeout_seconds=20") as process:
        wait_for(lambda: len(lines(run_dir)) >= 5)
        ranks_of(process)[1].suspend()
        began = time.monotonic()
        process.wait(timeout=120)
        took = time.monotonic() - began
        wait_for(lambda: nobody_is_left(process), 60)
    assert process.returncode == 5, log_of(run_dir)
    assert "Did not arrive: rank 1: no sign of life" in log_of(run_dir)
    assert "is stopped (SIGSTOP), last seen in phase" in log_of(run_dir)
    assert took < 60


def test_no_rank_survives_its_launcher_and_a_second_start_is_refused(prepared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(prepared, run_dir) as process:
        wait_for(lambda: len(lines(run_dir)) >= 5)
        ranks = ranks_of(process)
        second = subprocess.run(
            command(2, prepared, run_dir, *KEYS),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert second.returncode == 2
        assert f"in use by process {ranks[0].pid} on " in second.stdout + second.stderr
        before = len(lines(run_dir))
        wait_for(lambda: len(lines(run_dir)) > before, 60)  # it did not mind
        psutil.Process(ranks[0].ppid()).kill()
        wait_for(lambda: nobody_is_left(process), 10)
    assert len(lines(run_dir)) < 300
    assert list(run_dir.glob("lock-*"))
    run(*command(2, prepared, run_dir, *KEYS, "train.stop_after_steps=1"), cwd=tmp_path)  # taken over at once
    assert events(run_dir, "lock_taken_over")[0]["owner"].startswith(f"process {ranks[0].pid} on")
    assert not list(run_dir.glob("lock-*"))
