"""Training on two nodes of a real SLURM: whatever ends a start, the finished run has the unbroken run's losses, bit by
bit."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from common.paths import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import finish, lines, said, submit, wait_until

pytestmark = pytest.mark.slurm
UNBROKEN_SECONDS = 80.0
"""Training time of the unbroken run, from which its steps follow."""


@dataclass
class Training:
    """Runs of one configuration that differ in nothing that changes the numbers."""

    cluster: Cluster
    folder: Path
    data: Path
    steps: int = 0

    def run_dir(self, name: str) -> Path:
        return self.folder / f"it's {name}"  # a blank and a quote in every path

    def start(self, name: str, *arguments: str, stop_after: int) -> str:
        overrides = (
            f"data.manifest={self.data}",
            "train.steps=100000",
            f"train.stop_after_steps={stop_after}",
            "batch.global_sequences=8",
            "batch.micro_sequences=4",
            "model.dropout=0.1",
            "evaluate.every_steps=0",
            "evaluate.sequences=8",
            "checkpoint.every_steps=10",
            "monitor.tensorboard=false",
        )
        line = ["--config", str(REPOSITORY / "configs" / "switchall_tiny.json"), "--nodes", "2", "--cpu"]
        line += ["--run-dir", str(self.run_dir(name)), *(arguments or ("--time", "60"))]
        line += [part for override in overrides for part in ("--set", override)]
        [number] = submit(self.cluster, "submit.py", *line, cwd=self.folder)
        return number

    def logs(self, name: str) -> Path:
        return self.run_dir(name) / "slurm"

    def finish(self, name: str, number: str, state: str = "COMPLETED") -> dict[str, str]:
        fields = finish(self.cluster, number, self.logs(name))
        assert fields["JobState"] == state, said(self.logs(name))
        return fields

    def wait_for_steps(self, name: str, steps: int) -> None:
        run_dir = self.run_dir(name)
        wait_until(lambda: len(lines(run_dir)) >= steps, "steps", seconds=300, say=lambda: said(self.logs(name)))

    def assert_unbroken(self, name: str, steps: int) -> None:
        """Every step once, with the loss and the gradient norm of the unbroken run; which holds for weights that are
        the same in every bit alone."""
        ours, theirs = lines(self.run_dir(name)), lines(self.run_dir("unbroken"))[:steps]
        assert [values["step"] for values in ours] == list(range(1, steps + 1))
        for mine, its in zip(ours, theirs, strict=True):
            for key in ("loss", "grad_norm", "lr", "tokens"):
                assert mine[key] == its[key], (key, mine["step"])


@pytest.fixture(scope="module")
def runs(cluster: Cluster, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(cluster, tmp_path_factory.mktemp("runs of a night"), prepared)


@pytest.fixture(scope="module")
def training(runs: Training) -> Training:
    """With the unbroken run finished: a job that nothing happens to."""
    # In its first seconds a run imports beside its steps, which take twice as long for it.
    runs.finish("first look", runs.start("first look", stop_after=45))
    seconds = statistics.median(values["step_seconds"] for values in lines(runs.run_dir("first look"))[25:])
    runs.steps = min(3000, max(60, int(UNBROKEN_SECONDS / seconds)))
    fields = runs.finish("unbroken", runs.start("unbroken", stop_after=runs.steps))
    assert fields["Restarts"] == "0"
    assert len(lines(runs.run_dir("unbroken"))) == runs.steps
    return runs


def test_the_time_limit_is_a_pause(training: Training) -> None:
    """USR1 before a limit of two minutes: checkpoint, requeue, resume, until the run is finished. SLURM looks every
    30 s and would rather be early: the signal comes 45 to 75 s after the start."""
    number = training.start("limit", "--time", "2", "--signal-seconds", "45", stop_after=training.steps)
    fields = training.finish("limit", number)
    text = (training.logs("limit") / f"{number}.log").read_text()
    restarts = int(fields["Restarts"])
    assert restarts >= 1 and text.count("stopped by a signal (exit code 85); requeued") == restarts
    assert "resuming from" in (training.logs("limit") / f"{number}.rank0.log").read_text()
    training.assert_unbroken("limit", training.steps)


def test_ranks_that_miss_the_limit_are_requeued_too(runs: Training) -> None:
    """SIGTERM at the limit: requeued while SLURM already ends the job. The "ranks" do not hear the warning."""
    deaf = runs.folder / "deaf"
    deaf.write_text("#!/bin/bash\ntrap '' USR1\n[ -z \"$SLURM_RESTART_COUNT\" ] || exit 0\nexec sleep 600\n")
    deaf.chmod(0o755)
    number = runs.start("deaf", "--time", "1", "--python", str(deaf), stop_after=10)
    assert runs.finish("deaf", number)["Restarts"] == "1"
    text = (runs.logs("deaf") / f"{number}.log").read_text()
    # SLURM tells ranks and job at once: on a busy machine the job may see the end of its ranks first.
    why = "time limit reached before the ranks were done", "a rank failed (exit code 143; 128 + N: signal N)"
    assert any(f"{words}; requeued, newest checkpoint: none" in text for words in why), text


def python_of(cluster: Cluster, node: str) -> psutil.Process:
    """The rank on a node."""
    [rank] = [p for p in cluster.tasks(node) if any(part.endswith("pretrain.py") for part in p.cmdline())]
    return rank


def test_a_killed_task_starts_again_on_the_same_nodes(training: Training) -> None:
    steps = max(30, training.steps // 3)
    number = training.start("killed task", stop_after=steps)
    training.wait_for_steps("killed task", steps // 2)
    python_of(training.cluster, "node2").kill()
    fields = training.finish("killed task", number)
    assert fields["Restarts"] == "0"
    assert (
        "(exit code 137; 128 + N: signal N); again on the same nodes, newest checkpoint: step-"
        in (training.logs("killed task") / f"{number}.log").read_text()
    )
    training.assert_unbroken("killed task", steps)


def test_with_no_repeats_a_killed_task_is_a_requeue(training: Training) -> None:
    steps = max(30, training.steps // 3)
    number = training.start("requeued", "--time", "60", "--repeats", "0", stop_after=steps)
    training.wait_for_steps("requeued", steps // 2)
    python_of(training.cluster, "node2").kill()
    assert training.finish("requeued", number)["Restarts"] == "1"
    text = (training.logs("requeued") / f"{number}.log").read_text()
    assert "(exit code 137; 128 + N: signal N); requeued, newest checkpoint: step-" in text
    training.assert_unbroken("requeued", steps)


def test_a_bad_node_is_excluded(runs: Training) -> None:
    """The "rank" fails on one of the two nodes alone."""
    picky = runs.folder / "picky"
    picky.write_text('#!/bin/bash\n[ "$SLURMD_NODENAME" != node1 ] || kill -9 $$\nexit 0\n')
    picky.chmod(0o755)
    number = runs.start("bad node", "--nodes", "1", "--time", "60", "--python", str(picky), stop_after=10)
    fields = runs.finish("bad node", number)
    assert (fields["Restarts"], fields["ExcNodeList"], fields["NodeList"]) == ("1", "node1", "node2")
    text = (runs.logs("bad node") / f"{number}.log").read_text()
    assert "two starts in a row failed on node1 alone: excluded from this job from now on" in text


def test_a_lost_node_is_a_requeue(training: Training) -> None:
    """The first node dies as in a power failure, with rank 0, srun and the job's script, so that SLURM itself has to
    notice and to requeue; the node comes back later."""
    steps = max(30, training.steps // 3)
    number = training.start("lost node", stop_after=steps)
    training.wait_for_steps("lost node", steps // 2)
    training.cluster.kill_node("node1")
    wait_until(
        lambda: int(training.cluster.job(number)["Restarts"]) > 0,
        "requeue",
        seconds=180,
        say=training.cluster.logs,
    )
    training.cluster.start_node("node1")
    fields = training.finish("lost node", number)
    assert fields["Restarts"] == "1"
    text = (training.logs("lost node") / f"{number}.log").read_text()
    assert "requeued, newest" not in text, "the script was alive"
    training.assert_unbroken("lost node", steps)


def test_a_user_stops_for_good_and_goes_on_later(training: Training) -> None:
    """Saving and stopping (Requeue=0, USR1), then scancel, which a requeue must not revive, then to the end."""
    steps, cluster = max(30, training.steps // 3), training.cluster
    first = training.start("stopped", stop_after=steps)
    training.wait_for_steps("stopped", 5)
    cluster.run("scontrol", "update", f"JobId={first}", "Requeue=0")
    cluster.run("scancel", "--signal=USR1", first)
    assert training.finish("stopped", first, "FAILED")["ExitCode"] == "85:0"
    assert "not requeued, as Requeue=0 asks" in (training.logs("stopped") / f"{first}.log").read_text()
    second = training.start("stopped", stop_after=steps)
    training.wait_for_steps("stopped", len(lines(training.run_dir("stopped"))) + 5)
    cluster.run("scancel", second)
    training.finish("stopped", second, "CANCELLED")
    time.sleep(10)
    assert cluster.job(second)["JobState"] == "CANCELLED"
    training.finish("stopped", training.start("stopped", stop_after=steps))
    training.assert_unbroken("stopped", steps)


def test_a_refusal_is_final(training: Training) -> None:
    """A setting that a resumed run may not change: refused on the login node, and as exit code 2 by the job."""
    number = training.start("first look", stop_after=30)
    script = max(training.logs("first look").glob("pretrain-*.sbatch"), key=lambda path: path.stat().st_mtime)
    training.finish("first look", number)
    changed = script.read_text().replace("batch.global_sequences=8", "batch.global_sequences=16")
    other = script.with_name("changed.sbatch")
    other.write_text(changed)
    number = training.cluster.run("sbatch", "--parsable", str(other)).stdout.strip()
    fields = training.finish("first look", number, "FAILED")
    assert fields["ExitCode"] == "2:0" and fields["Restarts"] == "0"
    assert "refused (exit code 2)" in (training.logs("first look") / f"{number}.log").read_text()
