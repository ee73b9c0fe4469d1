"""The test cluster itself: it goes down with everything that it started, also when a test fails."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_a_failure_leaves_nothing_behind() -> None:
    foreign = psutil.Popen(["sleep", "300"])
    before = psutil.Process().children(recursive=True)  # with the cluster of other tests, where it is up
    cluster = Cluster()
    processes: list[psutil.Process] = []

    def fail() -> None:
        with cluster:
            cluster.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 300")
            while len(cluster.tasks()) < 2:
                time.sleep(0.05)
            processes.extend(p for p in psutil.Process().children(recursive=True) if p not in before)
            assert {"munged", "slurmctld", "slurmd", "sleep"} <= {p.name() for p in processes}
            raise RuntimeError("the test failed")

    with pytest.raises(RuntimeError, match="the test failed"):
        fail()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not cluster.base.exists()
    assert foreign.is_running() and foreign.status() != psutil.STATUS_ZOMBIE, "it is not the cluster's"
    foreign.kill()
    foreign.wait()
