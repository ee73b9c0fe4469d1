"""How the ranks of a run meet, by NCCL and by gloo: what they ask of torch, and what is said where they cannot. Errors
and answers of torch and NCCL are made by hand."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from pretrain import device, gpus
from pretrain.ranks import Ranks
from pretrain.report.exit_codes import ExitCode, code_of
from tests.harness import run_ranks


def test_two_ranks_on_one_gpu_are_refused_in_our_words() -> None:
    words = "Last error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 4000"
    nccl = dist.DistBackendError(f"NCCL error in: NCCLUtils.cpp:77, invalid usage\n{words}")
    refused = pytest.raises(UserError, match=r"two ranks of a node have the same GPU .*rank 0 and rank 1 both")
    with refused, gpus.refusing_a_shared_gpu():
        raise nccl
    with pytest.raises(dist.DistBackendError, match="unhandled"), gpus.refusing_a_shared_gpu():
        raise dist.DistBackendError("NCCL error: unhandled system error")


@pytest.mark.parametrize("when", ["the group is made", "the first collective"])
def test_why_nccl_cannot_connect_is_said_in_its_own_words(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The words of torch 2.13, of which the first line has no reason. NCCL meets the other ranks by a socket, and
    connects to them by what it computes with in the first collective."""
    nccl = dist.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.29.7\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error. \nLast error:\nBootstrap : no socket interface found"
    )

    def fail(*_: Any, **options: Any) -> None:
        raise nccl

    def succeed(*_: Any, **options: Any) -> None:
        pass

    is_at_once = when == "the group is made"
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(init_distributed=succeed))
    monkeypatch.setattr(dist, "init_process_group", fail if is_at_once else succeed)
    monkeypatch.setattr(dist, "barrier", succeed if is_at_once else fail)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    said = r"NCCL cannot connect the ranks \(unhandled system error: Bootstrap : no socket interface found\); name"
    with pytest.raises(device.Unreachable, match=said):
        device._meet(Ranks(0, 0, 2, 1), torch.device("cuda", 0), "nccl", 5.0)
    if not is_at_once:
        device._meet(Ranks(0, 0, 1, 1), torch.device("cuda", 0), "nccl", 5.0)  # alone


def test_no_gpu_is_bound_to_the_group_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch 2.13 all ranks would wait in each new_group, whoever is in it, and messages between two pairs of stages
    would wait for each other. Asked of DeepSpeed's own code, with an accelerator that says it is a GPU."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    given: list[dict[str, Any]] = []
    barriers: list[Any] = []

    def join(*_: Any, **options: Any) -> None:
        given.append(options)

    accelerator = get_accelerator()
    monkeypatch.setattr(accelerator, "device_name", lambda index=None: "cuda")
    monkeypatch.setattr(accelerator, "device", lambda index=None: torch.device("cuda", index or 0))
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {"deepspeed_shm_comm": False})
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(given))
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    monkeypatch.setattr(dist, "barrier", lambda group=None, device_ids=None: barriers.append(device_ids))
    for name, value in {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    device._meet(Ranks(5, 1, 6, 2), torch.device("cuda", 1), "nccl", 5.0)
    assert given == [{"timeout": timedelta(seconds=5.0)}]
    assert barriers == [[1]], "torch would take GPU 5 % 8 of a node of eight for the first collective"
    assert deepspeed.comm.comm.cdb is not None


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "NCCL error in: a.cpp:9, invalid usage (run with X), NCCL version 2\nLast error:\n a\n b \n",
            "invalid usage: b",
        ),
        (
            "NCCL error in: a.cpp:9, invalid usage (run with X)\nncclInvalid.\nLast error:\n",
            "invalid usage: ncclInvalid.",
        ),
        ("NCCL error in: a.cpp:9, invalid usage\n\nLast error:\n", "invalid usage"),
        ("NCCL error in: a.cpp:9", "NCCL error in: a.cpp:9"),
        ("The client socket has timed out", None),
    ],
)
def test_nccl_s_last_reason_follows_the_kind_of_its_error_where_it_gives_one(words: str, said: str | None) -> None:
    assert gpus.what_nccl_says(dist.DistError(words)) == said


@pytest.mark.parametrize("when", ["the group is made", "the first message"])
def test_ranks_that_gloo_does_not_connect_hear_what_to_set(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """As where a network between the nodes is closed to it. More than 64 ranks connect when they first speak."""

    def fail(*_: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with SO_ERROR: Connection refused\nmore")

    def make(**options: Any) -> str:
        assert options["backend"] == "gloo"
        if when == "the group is made":
            fail()
        return "group"

    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", make)
    said = r"GLOO_SOCKET_IFNAME: .*Connection refused\); if that comes back, set it to the name of the network"
    with pytest.raises(UserError, match=said) as raised:
        device.control_group(60.0, fail)
    assert code_of(raised.type) is ExitCode.CUT_OFF, "a rank may have died meanwhile, and the job is requeued"


@pytest.mark.parametrize(
    "env, found, expected",
    [
        ({}, [(socket.AF_INET, "127.0.1.1")], "127.0.1.1"),
        ({}, [(socket.AF_INET, "203.0.113.7"), (socket.AF_INET, "127.0.0.1")], "127.0.0.1"),  # not its own
        ({}, [(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")], "::1"),
        ({}, [], "127.0.0.1"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, [(socket.AF_INET, "127.0.1.1")], None),
    ],
)
def test_gloo_listens_where_the_name_of_the_machine_leads(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], found: list[tuple[int, str]], expected: str | None
) -> None:
    def addresses(host: str, port: int, **options: Any) -> list[Any]:
        assert host == socket.gethostname()
        if not found:
            raise socket.gaierror("Name or service not known")
        return [(family, socket.SOCK_STREAM, 0, "", (address, 0)) for family, address in found]

    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        found = [(family, address) for family, address in found if family == socket.AF_INET]
        expected = "127.0.0.1" if expected == "::1" else expected
    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    assert device.gloo_address(env) == expected


def operators(rank: int) -> tuple[dict[str, bool], Any]:
    """DeepSpeed's table of its operators, unless a look at it would make it, and its shared-memory collectives."""
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    return dict(vars(deepspeed.ops)["__compatible_ops__"]), build_shm_op()


def test_on_cpus_deepspeed_tries_no_operator_and_compiles_none() -> None:
    assert run_ranks(operators, 1) == [({"deepspeed_shm_comm": False}, None)]


def test_a_heartbeat_of_the_user_stays_and_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist.distributed_c10d, "default_pg_nccl_timeout", timedelta(seconds=600))
    monkeypatch.setenv(gpus.NCCL_HEARTBEAT, "300")
    gpus.let_the_watchdog_speak_first(1140.0, speaks=True)
    assert os.environ[gpus.NCCL_HEARTBEAT] == "300"
    assert f"warning: {gpus.NCCL_HEARTBEAT} = 300 is shorter than the 1140 s" in capsys.readouterr().err
    for enough in ("2000", "1140", "no number"):
        monkeypatch.setenv(gpus.NCCL_HEARTBEAT, enough)
        gpus.let_the_watchdog_speak_first(1140.0, speaks=True)
        assert capsys.readouterr().err == ""


def test_groups_without_a_limit_of_their_own_follow_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What new_group(timeout=None) asks torch for, with the NCCL backend."""
    monkeypatch.setattr(dist.distributed_c10d, "default_pg_nccl_timeout", timedelta(seconds=600))
    monkeypatch.setenv(gpus.NCCL_HEARTBEAT, "2000")
    gpus.let_the_watchdog_speak_first(1830.0, speaks=False)
    assert dist.distributed_c10d._get_default_timeout(dist.Backend("nccl")) == timedelta(seconds=1830)


def test_names_that_torch_deprecates_are_not_said_by_every_rank() -> None:
    """Where DeepSpeed calls them; other warnings are heard, also of our own lines."""
    ours = "torch.distributed.nn.functional.all_reduce is deprecated, use another instead."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        device.leave_out_warnings()
        for text, module in (
            (ours, "model.routing"),
            ("anything", "torch.distributed.distributed_c10d"),
            ("barrier(): using the device under current context", "torch.distributed.distributed_c10d"),
            ("torch.other is deprecated", "a.layer"),
        ):
            warnings.warn_explicit(text, FutureWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in said] == [ours, "torch.other is deprecated"]
