"""Data preparation as array jobs of a real SLURM gives the bytes of one process, also when a task is killed."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from data_prep.cli import main as data_prep
from launch.slurm.preparation import STEPS
from tests.data_prep.raw_corpus import write_corpus
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import finish, said, submit, wait_until

pytestmark = pytest.mark.slurm
NOT_COMPARED = {".lock", "run.json", "slurm"}
"""What depends on host and time, by design."""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NOT_COMPARED}


def test_an_array_gives_the_bytes_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "raw files"
    folder.mkdir()
    common = write_corpus(folder)
    for output in ("one", "array"):
        (tmp_path / f"{output}.json").write_text(json.dumps({**common, "output": str(tmp_path / output)}))
    assert data_prep(["run", "--config", str(tmp_path / "one.json")]) == 0
    line = ["--config", str(tmp_path / "array.json"), "--tasks", "3", "--time", "30", "--cpus-per-task", "1"]
    jobs = submit(cluster, "submit_data_prep.py", *line, cwd=tmp_path)
    logs = tmp_path / "array" / "slurm"

    def preparing() -> list[psutil.Process]:
        return [task for task in cluster.tasks() if "data_prep" in task.cmdline()]  # not what its script asks before

    wait_until(lambda: bool(preparing()), "task", seconds=60, say=lambda: said(logs))
    preparing()[0].kill()
    assert len(jobs) == len(STEPS)
    for number in jobs[1:]:  # not the array: scontrol shows one task of it at a time
        assert finish(cluster, number, logs)["JobState"] == "COMPLETED", said(logs)
    assert "exit code 137; requeued" in said(logs)
    one, array = content(tmp_path / "one"), content(tmp_path / "array")
    assert one.keys() == array.keys() and "manifest.json" in one
    for name in one:
        assert one[name] == array[name], name
    dropped = json.loads(one["manifest.json"])["provenance"]["dropped"]
    assert dropped.keys() == {"quarantined", "filtered", "duplicates"}
