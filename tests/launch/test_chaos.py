"""SIGKILL at random moments, again and again, through the real launcher: nothing is lost but time.

python -m pytest -m slow -s tests/launch/test_chaos.py      # 5 minutes on a quiet machine; prints every kill
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pretrain.checkpoint import Checkpoint, list_checkpoints
from tests.launch.launcher import command, lines, ranks_of, run, session
from tests.pretrain.runs import assert_bit_identical, metrics

pytestmark = pytest.mark.slow
STEPS, KILLS, KILLS_DURING_A_SAVE, SECONDS_TO_START = 150, 12, 3, 180
KEYS = (
    f"train.steps={STEPS}",
    "evaluate.sequences=0",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=2",
    "batch.global_sequences=8",
    "batch.micro_sequences=2",
    "model.dropout=0.1",
)


@dataclass
class Kill:
    """One of the launcher's starts and how it ended."""

    moment: str
    victim: str
    steps: int
    """Lines of metrics.jsonl when the signal was sent."""
    unfinished_save: bool
    """A checkpoint was being written: its .partial folder outlived every rank."""


def wait_for_moment(moment: str, run_dir: Path, launcher: subprocess.Popen[str], draw: random.Random) -> None:
    """Returns when the signal is due. `start`: the ranks exist; `step`: some steps further; `save`: a checkpoint is
    being written and a random part of a millisecond to 60 milliseconds have passed."""
    began, steps = time.monotonic(), len(lines(run_dir))
    wanted = steps + draw.randint(1, 8)
    while time.monotonic() < began + SECONDS_TO_START:
        assert launcher.poll() is None, "the run ended before it could be killed"
        if moment == "start" and len(ranks_of(launcher)) == 2:
            time.sleep(draw.uniform(0.0, 8.0))
            return
        if moment == "step" and len(lines(run_dir)) >= wanted:
            time.sleep(draw.uniform(0.0, 0.2))
            return
        if moment == "save" and any((run_dir / "checkpoints").glob("step-*.partial/*")):
            time.sleep(draw.choice((0.0, draw.uniform(0.0, 0.06))))
            return
        time.sleep(0.0005 if moment == "save" else 0.01)
    raise AssertionError(f"waited {SECONDS_TO_START} s for: {moment}")


def kill_once(prepared: Path, run_dir: Path, moment: str, victim: str, draw: random.Random) -> Kill:
    for stale in (run_dir / "checkpoints").glob("*.partial"):  # so that what is found afterwards is of this start
        shutil.rmtree(stale)
    with session(command(2, prepared, run_dir, *KEYS), cwd=run_dir.parent) as launcher:
        wait_for_moment(moment, run_dir, launcher, draw)
        steps, ranks = len(lines(run_dir)), ranks_of(launcher)
        tree = [launcher.pid, *(p.ppid() for p in ranks), *(p.pid for p in ranks)]
        for pid in {"a rank": [draw.choice(ranks).pid], "the whole job": dict.fromkeys(tree)}[victim]:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.wait(timeout=180)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive, "a rank survived"
    return Kill(moment, victim, steps, any((run_dir / "checkpoints").glob("step-*.partial")))


def test_twelve_kills_lose_nothing(prepared: Path, tmp_path: Path) -> None:
    draw = random.Random(6)
    run(*command(2, prepared, tmp_path / "unbroken", *KEYS), cwd=tmp_path)
    run_dir, kills = tmp_path / "killed", []
    moments = ["start", "save", "step", "save", "step", "save"]
    # More saves are tried, for a save may be committed between the look and the signal.
    while len(kills) < KILLS or sum(kill.unfinished_save for kill in kills) < KILLS_DURING_A_SAVE:
        assert len(kills) < 3 * KILLS, kills
        moment = moments[len(kills) % len(moments)] if len(kills) < KILLS else "save"
        kills.append(kill_once(prepared, run_dir, moment, draw.choice(("a rank", "the whole job")), draw))
        print(kills[-1], flush=True)
        for path in list_checkpoints(run_dir / "checkpoints"):
            assert Checkpoint.open(path).damaged_file() is None, path
    run(*command(2, prepared, run_dir, *KEYS), cwd=tmp_path)
    assert {kill.victim for kill in kills} == {"a rank", "the whole job"}
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert_bit_identical(run_dir, tmp_path / "unbroken")
    print(f"{len(kills)} kills, {sum(kill.unfinished_save for kill in kills)} of them during a save", flush=True)
