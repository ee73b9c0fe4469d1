"""The real deepspeed launcher, slow tier: layouts through it, SIGKILL at random steps and a bit-identical resume."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pretrain.config.loading import load_config
from tests.launch.launcher import command, environment, lines, ranks_of, run, session
from tests.pretrain.report.boards import read, steps_of
from tests.pretrain.runs import assert_bit_identical, events, metrics, plain_trace

TINY = Path(__file__).resolve().parents[2] / "configs" / "switchall_tiny.json"
pytestmark = pytest.mark.slow


def test_the_plain_command_compiles_nothing(prepared: Path, tmp_path: Path) -> None:
    """No --num_gpus, no variable set: one CPU process (a rank per NUMA node), and no C++ extension at start-up."""
    line = [part for part in command(1, prepared, tmp_path / "run", "train.steps=2") if part not in ("--num_gpus", "1")]
    env = {**environment(), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "HOME": str(tmp_path)}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not list(tmp_path.rglob("*.so")), "an extension was compiled"
    assert len(metrics(tmp_path / "run")) == 2


def test_a_refusal_is_the_last_line_and_with_a_quiet_launcher_the_only_one(prepared: Path, tmp_path: Path) -> None:
    """On stderr; on stdout DeepSpeed's launcher reports the exit code, unless it is told not to."""
    line = command(2, prepared, tmp_path / "run", "train.stepz=2")
    sentence = "error: train.stepz: unknown key; the nearest known key is train.steps\n"
    loud = _finished(line, tmp_path, environment())
    assert (loud.returncode, loud.stderr) == (2, sentence)
    place = line.index("--num_gpus")
    quiet = [*line[:place], "--log_level", "critical", *line[place:]]
    done = _finished(quiet, tmp_path, {**environment(), "DS_ACCELERATOR": "cpu"})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def _finished(line: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)


SAME = (
    "train.steps=20",
    "train.precision=fp32",
    "evaluate.sequences=0",
    "batch.global_sequences=4",
    "batch.micro_sequences=1",
    "model.sequence_length=4",
    "model.feedforward.expert_size=16",
    "train.seed=15",
)
"""Few tokens, narrow experts and this seed keep every routing choice away from a tie and every ReLU away from its kink:
there rounding, which differs with the CPU and its threads, decides how training goes on."""


def test_launcher_gives_one_process_losses(prepared: Path, tmp_path: Path) -> None:
    _assert_same_as_one_process(prepared, tmp_path, 4, "parallel.zero=3")


def test_eight_ranks_in_three_dimensions_give_one_process_losses(prepared: Path, tmp_path: Path) -> None:
    """TP2 x PP2 x DP2 with sequence parallelism, ZeRO 1, 20 steps, through the real launcher."""
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "parallel.zero=1")
    _assert_same_as_one_process(prepared, tmp_path, 8, *layout)


def _assert_same_as_one_process(prepared: Path, folder: Path, ranks: int, *layout: str) -> None:
    trace = plain_trace(load_config(TINY, [f"data.manifest={prepared}", *SAME]), 20, ())
    # Measured: 20 steps of rounding move an activation by up to 4e-6.
    assert trace.smallest_margin > 2e-5, "choose a seed"
    assert trace.smallest_activation > 2e-5, "choose a seed"
    run(*command(1, prepared, folder / "one", *SAME, "parallel.zero=0"), cwd=folder)
    run(*command(ranks, prepared, folder / "many", *SAME, *layout), cwd=folder)
    for ours, theirs in zip(metrics(folder / "many"), metrics(folder / "one"), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours["step"])


@pytest.mark.parametrize("zero, victim", [(1, "rank"), (2, "launcher"), (3, "rank")])
def test_sigkill_at_a_random_step_and_resume_is_bit_identical(
    prepared: Path, tmp_path: Path, zero: int, victim: str
) -> None:
    keys = (
        "train.steps=24",
        "evaluate.sequences=0",
        "checkpoint.every_steps=5",
        "batch.global_sequences=8",
        "batch.micro_sequences=2",
        f"parallel.zero={zero}",
        "model.dropout=0.1",
        "monitor.tensorboard=true",
        "monitor.details_every_steps=4",
    )
    run(*command(2, prepared, tmp_path / "unbroken", *keys), cwd=tmp_path)
    run_dir, kills = tmp_path / "killed", 0
    draw = random.Random(zero)
    for target in (draw.randint(2, 9), draw.randint(12, 20)):
        with session(command(2, prepared, run_dir, *keys), cwd=tmp_path) as process:
            deadline = time.monotonic() + 300
            while len(lines(run_dir)) < target and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            ranks = ranks_of(process)
            assert len(ranks) == 2, "the run was over before it could be killed"
            if victim == "rank":
                draw.choice(ranks).send_signal(signal.SIGKILL)
            else:
                for parent in [process.pid, *[p.ppid() for p in ranks]]:
                    if psutil.pid_exists(parent):
                        os.kill(parent, signal.SIGKILL)
            process.wait(timeout=120)
            _, alive = psutil.wait_procs(ranks, timeout=60)
            assert not alive, "a rank survived"
        kills += 1
    run(*command(2, prepared, run_dir, *keys), cwd=tmp_path)
    assert kills == 2
    assert_bit_identical(run_dir, tmp_path / "unbroken")
    assert events(run_dir, "resumed") and events(run_dir, "superseded_metrics")
    board = read(run_dir / "tensorboard")
    assert steps_of(board, "loss/train") == list(range(1, 25))
    assert steps_of(board, "gradient norm by group/experts") == [1, 4, 8, 12, 16, 20, 24]
