"""Ranks from the variables that srun sets (as printed by a real SLURM 22.05)."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common import run_lock as lock
from common import slurm
from common.errors import UserError
from pretrain.ranks import Ranks
from pretrain.resilience.signals import is_launched

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "node[1-4]",
}


def answer(monkeypatch: pytest.MonkeyPatch, **answers: str) -> list[tuple[str, ...]]:
    """scontrol without a cluster: {last but one argument: output}; records the calls."""
    calls: list[tuple[str, ...]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(tuple(command))
        if command[-2] not in answers:
            raise subprocess.CalledProcessError(1, command, stderr="not known")
        return subprocess.CompletedProcess(command, 0, answers[command[-2]], "")

    monkeypatch.setattr(slurm.subprocess, "run", run)
    return calls


def unresolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise socket.gaierror("not known")

    monkeypatch.setattr(slurm.socket, "getaddrinfo", fail)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without variables of a launcher, also after the test, which sets them."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "")  # restored to absence
        monkeypatch.delenv(key)
    return monkeypatch


def test_the_place_of_a_task(launched: pytest.MonkeyPatch) -> None:
    for key, value in {**TASK, "MASTER_ADDR": "10.0.0.1"}.items():
        launched.setenv(key, value)
    assert Ranks.from_environment() == Ranks(rank=5, local_rank=1, world_size=7, local_size=2)


@pytest.mark.parametrize("changes", [{"WORLD_SIZE": "4"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_another_launcher_and_a_single_task_are_left_alone(changes: dict[str, str]) -> None:
    assert slurm.launcher_variables({**TASK, **changes}) == {}


def test_variables_that_a_container_derives_from_sruns_lack_the_size_of_the_node(
    launched: pytest.MonkeyPatch,
) -> None:
    """As pyxis and enroot's hook 50-slurm-pytorch set them in an image that has PYTORCH_VERSION."""
    hook = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "MASTER_ADDR": "node1", "MASTER_PORT": "61005"}
    assert slurm.launcher_variables({**TASK, **hook}) == {"LOCAL_SIZE": "2"}
    for name, value in {**TASK, **hook}.items():
        launched.setenv(name, value)
    assert Ranks.from_environment() == Ranks(rank=5, local_rank=1, world_size=7, local_size=2)
    for others in ({"LOCAL_WORLD_SIZE": "7"}, {"LOCAL_SIZE": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "56"}):
        assert slurm.launcher_variables({**TASK, **hook, **others}) == {}
    known = {name: value for name, value in TASK.items() if name not in ("SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")}
    assert slurm.launcher_variables({**known, "WORLD_SIZE": "56"}) == {}, "nothing is asked that is not needed"


def test_outside_of_srun_nothing_is_set() -> None:
    assert slurm.launcher_variables({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0"}) == {}


def test_names_that_resolve_need_no_question_to_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, hostnames="localhost\nnode2\n")
    variables = slurm.launcher_variables(TASK)
    assert variables["MASTER_ADDR"] == "localhost" and calls == [("scontrol", "show", "hostnames", "node[1-4]")]


def test_names_that_do_not_resolve_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    unresolved(monkeypatch)
    answer(monkeypatch, hostnames="node1\nnode2\n", node="NodeName=node1 NodeAddr=10.1.2.3 NodeHostName=host")
    assert slurm.launcher_variables(TASK)["MASTER_ADDR"] == "10.1.2.3"


def test_no_address_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    unresolved(monkeypatch)
    answer(monkeypatch, hostnames="node1\n")
    with pytest.raises(UserError, match=r"show node node1 failed .not known.; export MASTER_ADDR"):
        slurm.launcher_variables(TASK)


def test_all_tasks_derive_the_same_port_and_neighbours_another(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, hostnames="localhost\n")
    ports = {slurm.launcher_variables({**TASK, "SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(7)}
    assert len(ports) == 1
    others = [slurm.job_port({**TASK, "SLURM_JOB_ID": str(job)}) for job in range(1000, 1100)]
    assert len(set(others)) == 100 and all(10_000 <= port < 30_000 for port in others)
    requeued = [slurm.job_port({**TASK, "SLURM_RESTART_COUNT": str(count)}) for count in range(3)]
    assert len(set(requeued)) == 3, "that of the start before may be held yet"
    assert slurm.launcher_variables({**TASK, "MASTER_PORT": "99"})["MASTER_PORT"] == "99"


def test_tasks_per_node() -> None:
    assert slurm.tasks_per_node("2(x3),1") == [2, 2, 2, 1] and slurm.tasks_per_node("8") == [8]


def test_a_task_of_srun_ends_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("CROSS_RANK", "WORLD_SIZE", *TASK):
        monkeypatch.delenv(key, raising=False)
    assert not is_launched()
    for key, value in TASK.items():
        monkeypatch.setenv(key, value)
    assert is_launched()


def test_a_requeued_job_waits_for_the_lock_of_its_lost_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal (code 2) would end the job; another job's lock is refused at once."""
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    own = {**lock.process_identity(1), "host": "lost-node", "token": "x"}
    left = tmp_path / "lock-1.json"
    left.write_text(json.dumps({**own, "job": "8"}))
    with pytest.raises(UserError, match="is in use by process 1 on lost-node"):
        lock.FolderLock(tmp_path)
    left.write_text(json.dumps({**own, "job": "7"}))
    taken = lock.FolderLock(tmp_path)
    assert taken.taken_over == ["process 1 on lost-node"]
    taken.release()


@pytest.mark.parametrize(
    "variables, share",
    [
        ({}, 2),
        ({"SLURM_CPU_BIND_TYPE": "mask_cpu:"}, 16),
        ({"SLURM_CPU_BIND_TYPE": "none"}, 2),
        ({"SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_STEP_NUM_TASKS": "1"}, 2),
    ],
)
def test_cores_that_srun_gave_to_one_task_are_not_divided_again(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], share: int
) -> None:
    from pretrain.device import own_cores
    from pretrain.ranks import Ranks

    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    assert own_cores(Ranks(5, 1, 16, 8), {**TASK, **variables}) == share
    assert own_cores(Ranks(5, 1, 16, 32), {}) == 1
