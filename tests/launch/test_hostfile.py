"""What docs/training.md says of DeepSpeed's launcher on several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.launcher import multinode_runner, runner


class _Launched(Exception):
    pass


def exported(monkeypatch: pytest.MonkeyPatch, folder: Path, accelerator: object, env: dict[str, str]) -> dict[str, str]:
    """The variables that the nodes of a hostfile get of a shell that has `env` alone."""
    found: dict[str, str] = {}

    def get_cmd(self: multinode_runner.PDSHRunner, *_: object) -> None:
        found.update(self.exports)
        raise _Launched

    hostfile = folder / "HOSTS"
    hostfile.write_text("node1 slots=8\nnode2 slots=8\n")
    monkeypatch.setattr(multinode_runner.PDSHRunner, "get_cmd", get_cmd)
    monkeypatch.setattr(multinode_runner.PDSHRunner, "backend_exists", lambda self: True)
    monkeypatch.setattr(runner.subprocess, "check_call", lambda *_, **options: 0)  # ssh
    monkeypatch.setattr(runner, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_PATHS", [str(folder)])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(_Launched):
        runner.main(["--hostfile", str(hostfile), "--master_addr", "node1", "launch/pretrain.py"])
    return found


def test_the_nodes_of_a_hostfile_get_few_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "8", "PYTHONUNBUFFERED": "1"}
    with_gpu = exported(monkeypatch, tmp_path, CUDA_Accelerator(), env)
    assert with_gpu["NCCL_SOCKET_IFNAME"] == "ib0" and with_gpu["PYTHONUNBUFFERED"] == "1"
    assert not with_gpu.keys() & {"GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"}
    assert "NCCL_SOCKET_IFNAME" not in exported(monkeypatch, tmp_path, CPU_Accelerator(), env)
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=8\n")
    named = exported(monkeypatch, tmp_path, CPU_Accelerator(), env)
    assert named["GLOO_SOCKET_IFNAME"] == "eth0" and named["OMP_NUM_THREADS"] == "8"
