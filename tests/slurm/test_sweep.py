"""A sweep as jobs of a real SLURM: one at a time, none twice, and a job that is requeued still holds the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.paths import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import finish, said, wait_until

pytestmark = pytest.mark.slurm
RATE = "optimizer.learning_rate"


def test_jobs_of_a_sweep_run_one_at_a_time_and_none_is_submitted_twice(
    cluster: Cluster, prepared: Path, tmp_path: Path
) -> None:
    config, folder = REPOSITORY / "configs" / "switchall_tiny.json", tmp_path / "sweep"
    few = ("train.steps=3", "schedule.warmup_steps=1", "evaluate.sequences=8", "batch.global_sequences=8")
    settings = [part for setting in (f"data.manifest={prepared}", *few) for part in ("--set", setting)]

    def sweep(*arguments: str) -> str:
        line = [sys.executable, str(REPOSITORY / "launch" / "sweep.py"), "--sweep-dir", str(folder), *arguments]
        done = subprocess.run(
            line, env=cluster.environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    submission = ("--config", str(config), *settings, "--vary", f"{RATE}=1e-3,2e-3", "--submit", "--at-once", "1")
    options = ("--", "--nodes", "1", "--cpu", "--time", "10", "--cpus-per-rank", "1", "--allow-local")
    first, second = (line.split()[-1] for line in sweep(*submission, *options).splitlines() if ": submitted" in line)
    wait_until(lambda: cluster.job(first)["JobState"] == "RUNNING", "first job", seconds=60, say=lambda: cluster.logs())
    cluster.run("scontrol", "requeue", first)
    again = sweep(*submission, *options)
    assert again.count("is in the queue already") == 2 and "submitted" not in again
    waits = cluster.job(second)
    assert (waits["JobState"], waits["Reason"]) == ("PENDING", "Dependency"), "a requeued job has not ended"
    ends = []
    for number, rate in ((first, "1e-3"), (second, "2e-3")):
        logs = folder / f"switchall_tiny,learning_rate={rate}" / "slurm"
        assert finish(cluster, number, logs)["JobState"] == "COMPLETED", said(logs)
        ends.append(cluster.job(number))
    assert ends[0]["EndTime"] <= ends[1]["StartTime"] and int(ends[0]["Restarts"]) >= 1
    assert sweep("--table").count(" finished ") == 2
