"""Alerts of the job scripts: what the user's command hears that no rank knows, under bash, with an srun and a scontrol
that only write down how they were called."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import pytest

from common.files import write_json
from common.paths import REPOSITORY
from launch.slurm import job
from tests.launch.slurm.bench import Bench, make_bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)


def test_the_users_command_hears_what_the_script_alone_knows(bench: Bench) -> None:
    got = bench.folder / "got"
    write = f"import sys; print(sys.argv[1], file=open({str(got)!r}, 'a'))"
    tree = json.loads((REPOSITORY / "configs" / "switchall_tiny.json").read_text())
    tree["monitor"] = {"alert_command": shlex.join([sys.executable, "-c", write])}
    (bench.run_dir / "checkpoints").mkdir(parents=True)
    write_json(bench.run_dir / "config.json", tree)
    fails = {"SRUN_CODE": "1", "TASKS": json.dumps(["node2: task 3: Killed"]), "FAULTS": "9"}
    code, output = bench.train(**fails)
    assert (code == 1 and not bench.excluded()) or bench.excluded() == ["ExcNodeList=node2"], output
    told = [line.partition("job 7: ")[2] for line in got.read_text().splitlines()]
    why = "a rank failed (exit code 1; 128 + N: signal N)"
    assert told[0] == f"{why}; again on the same nodes, newest checkpoint: none", output
    assert told[1] == "two starts in a row failed on node2 alone: excluded from this job from now on"
    assert told[2:] == [f"{why}; requeued, newest checkpoint: none"]
    got.unlink()
    for variables in ({"SRUN_CODE": "0"}, {"SRUN_CODE": "3"}, {"SRUN_CODE": "85", "REQUEUES": "0"}):
        bench.train(**variables)
    told = [line.partition("job 7: ")[2] for line in got.read_text().splitlines()]
    assert len(told) == 2 and told[0].startswith("diverged (exit code 3)") and "0 restarts were allowed" in told[1]
    tree["monitor"]["alert_command"] = "false"
    write_json(bench.run_dir / "config.json", tree)
    code, output = bench.train(SRUN_CODE="3")
    assert code == 3 and "the alert was not sent: job_ended" in output


def test_an_alert_outlives_slurms_end_of_the_job(bench: Bench) -> None:
    """SLURM signals every process of a job that it has requeued, in the middle of what the alert does."""
    python, got = bench.folder / "python", bench.folder / "got"
    python.write_text(f'#!/bin/sh\nkill -TERM $$\necho "$@" >> {shlex.quote(str(got))}\n')
    python.chmod(0o755)
    bench.run_dir.mkdir(parents=True)
    (bench.run_dir / "config.json").write_text('{"monitor": {"alert_command": "tell"}}')
    code, output = bench.train(SRUN_CODE="85", PYTHON=str(python), ENDS="1")
    assert code == 85 and "not sent" not in output, output
    assert "--event requeued --text job 7: stopped by a signal" in got.read_text()
    # And where SLURM ends it at its limit, while the ranks save.
    waits = {"RANKS_STAY": "1", "SRUN_CODE": "85", "REASON": "TimeLimit", "REQUEUES": "0", "PYTHON": str(python)}
    process = bench.open(job.FOLDER / "pretrain.sbatch", "--config", "c.json", **waits)
    bench.terminate(process, starts=2)
    output, _ = process.communicate(timeout=300)
    assert "--event job_ended --text job 7: time limit reached before the ranks were done; not req" in got.read_text()


@pytest.mark.parametrize("where", ["file", "option", "folder"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_the_users_command_hears_of_a_first_start_that_was_refused(bench: Bench, where: str, joint: str) -> None:
    """It has written no configuration into the run folder. A run that is called as the folder is, by either way to
    write an option; `folder`: by that of another run, whose configuration is meant."""
    got = bench.folder / "got"
    write = f"import sys; print(sys.argv[1], file=open({str(got)!r}, 'a'))"
    words = shlex.join([sys.executable, "-c", write])
    tree = json.loads((REPOSITORY / "configs" / "switchall_tiny.json").read_text())
    if where != "option":
        tree["monitor"] = {"alert_command": words}
    config = "other/config.json" if where == "folder" else "c.json"
    (bench.folder / "other").mkdir()
    write_json(bench.folder / config, tree)
    given = [("--config", config.removesuffix("/config.json"))]
    given += [("--set", f"monitor.alert_command={words}")] if where == "option" else []
    given += [("--set", "train.seed=1")]
    line = [word for pair in given for word in ([f"{pair[0]}={pair[1]}"] if joint == "=" else pair)]
    code, output = bench.start(job.FOLDER / "pretrain.sbatch", *line, SRUN_CODE="2")
    assert code == 2 and not (bench.run_dir / "config.json").exists()
    assert got.read_text().startswith(f"run {bench.run_dir.name}: job ended: job 7: refused (exit code 2)"), output


def test_a_stop_that_a_person_has_asked_for_alarms_nobody(bench: Bench) -> None:
    """As docs/operations.md has it: Requeue=0, then SIGUSR1. At the limit the job's end may be news."""
    python, got = bench.folder / "python", bench.folder / "got"
    python.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(got))}\n')
    python.chmod(0o755)
    bench.run_dir.mkdir(parents=True)
    (bench.run_dir / "config.json").write_text('{"monitor": {"alert_command": "tell"}}')
    stopped = {"SRUN_CODE": "85", "REQUEUE": "0", "REQUEUE_CODE": "1", "PYTHON": str(python)}
    ends = {name: str(int(time.time()) + seconds) for name, seconds in (("early", 3600), ("late", 240))}
    code, output = bench.train(**stopped, SLURM_JOB_END_TIME=ends["early"])
    assert code == 85 and not bench.requeues() and not got.exists(), output
    assert "not requeued, as Requeue=0 asks. Submitted again, the run continues from none" in output
    for variables in ({"SLURM_JOB_END_TIME": ends["late"]}, {"SLURM_JOB_END_TIME": ends["early"], "REQUEUE": "1"}):
        bench.train(**{**stopped, **variables})
    assert got.read_text().count("--event job_ended --text job 7: stopped by a signal") == 2
