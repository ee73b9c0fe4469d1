"""The device of a run: what train.device and the machine decide, what is said of a GPU that cannot be used, and the
order in which a rank touches CUDA, seen by a torch.cuda that only records."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import _cur_sdpa_kernel_backends

from common.errors import UserError
from model.kernels.triton import cache
from pretrain import device, gpus
from pretrain.config.schema import TrainConfig
from pretrain.gpus import device_type, own_gpu, planned_device_type, why_unusable
from pretrain.ranks import ON_NODE, Ranks, place_on_node

SIGNS = (
    "DS_ACCELERATOR",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "CROSS_SIZE",
    "SLURM_JOB_GPUS",
    "SLURM_STEP_GPUS",
    "SLURM_GPUS_ON_NODE",
)
OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine without a sign of a GPU, whose torch was built for CUDA. Files of /dev come from tmp_path / "dev"."""
    for name in SIGNS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError(OLD)))
    return monkeypatch


def gpu_file(tmp_path: Path, mode: int = 0o666) -> None:
    """A file as the driver makes one per GPU, and the driver's own."""
    (tmp_path / "dev" / "nvidia0").touch()
    (tmp_path / "dev" / "nvidia0").chmod(mode)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n")


def test_without_a_sign_of_a_gpu_auto_is_the_cpu(machine: pytest.MonkeyPatch) -> None:
    assert device_type() == planned_device_type("auto") == "cpu"
    assert device_type("cpu") == "cpu"
    machine.setattr(torch.cuda, "is_available", lambda: True)
    assert device_type() == device_type("cuda") == planned_device_type("auto") == "cuda"
    assert device_type("cpu") == planned_device_type("cpu") == "cpu"


def test_a_dry_run_needs_no_gpu(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu_file(tmp_path)  # one that torch cannot use is a dry run's affair no more than none
    assert planned_device_type("cuda") == "cuda" and planned_device_type("auto") == "cpu"
    machine.setenv("DS_ACCELERATOR", "cpu")
    assert planned_device_type("cuda") == "cuda" and planned_device_type("auto") == "cpu"


def test_cuda_without_a_gpu_is_refused(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^train\.device: is cuda, .*--set train\.device=cpu trains on the CPU .*no sign"
    ):
        device_type("cuda")
    machine.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match=r"^DS_ACCELERATOR: is cuda, .*; unset it to train on the CPU .*no sign"):
        device_type()


def test_a_card_that_does_not_tell_its_name_is_passed_over(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, said in enumerate((b"IRQ: 1\n", b"Model: \xff\n", b"IRQ: 2\nModel: \t A\n", b"Model: B\n")):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        (tmp_path / "gpus" / str(number) / "information").write_bytes(said)
    assert gpus.card_name() == "A"


@pytest.mark.parametrize("wanted, named", [("cuda", "cpu"), ("cpu", "cuda")])
def test_config_and_environment_must_agree(machine: pytest.MonkeyPatch, wanted: str, named: str) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setenv("DS_ACCELERATOR", named)
    with pytest.raises(UserError, match=rf"train\.device: is {wanted}, but DS_ACCELERATOR is {named}"):
        device_type(wanted)
    assert device_type("auto") == named


def test_a_driver_that_is_too_old_is_no_reason_to_train_on_the_cpu(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu_file(tmp_path)
    with pytest.raises(
        UserError, match=r"driver is too old .torch is built for CUDA 13.0, driver 535.104.05.; update it"
    ):
        device_type()
    with pytest.raises(UserError, match=r"^train\.device: is cuda, .*too old"):
        device_type("cuda")
    assert device_type("cpu") == "cpu"
    machine.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert device_type() == "cpu"


def test_reasons(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each cause has its own words, and the first that explains the rest is named."""
    in_container = {"NVIDIA_VISIBLE_DEVICES": "all"}
    assert "no GPU was given to this container" in str(why_unusable(in_container))
    assert "no GPU was given" in str(why_unusable({"SLURM_JOB_GPUS": "0,1"}))
    assert "no GPU was given" in str(why_unusable({"CUDA_VISIBLE_DEVICES": "0"}))
    # DeepSpeed's launcher sets it on a machine without GPUs too.
    assert why_unusable({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}) is None
    assert why_unusable({"CUDA_VISIBLE_DEVICES": "NoDevFiles", **in_container}) is None
    assert why_unusable({"NVIDIA_VISIBLE_DEVICES": "void", "SLURM_GPUS_ON_NODE": "0"}) is None
    machine.setattr(gpus.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "no GPU was given" in str(why_unusable({}))

    gpu_file(tmp_path)
    machine.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("No CUDA GPUs are available")))
    assert "CUDA_VISIBLE_DEVICES = GPU-77 names no GPU" in str(why_unusable({"CUDA_VISIBLE_DEVICES": "GPU-77"}))
    machine.setattr(
        torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("Error 802: not yet initialized\n x"))
    )
    assert "torch says: Error 802: not yet initialized (torch is built for CUDA 13.0" in str(why_unusable({}))
    machine.setattr(os, "access", lambda path, mode: False)
    assert "may not open" in str(why_unusable({})) and "nvidia0" in str(why_unusable({}))
    machine.setattr(torch.version, "cuda", None)
    assert "was built without CUDA; install" in str(why_unusable({}))


class Cuda:
    """Stands in for torch.cuda: notes every call in order, and knows `count` GPUs."""

    ASKING = ("is_available", "device_count")
    """Calls that start nothing on any GPU."""

    def __init__(self, count: int, capability: tuple[int, int] = (9, 0)) -> None:
        self.count, self.capability, self.calls = count, capability, []  # type: int, tuple[int, int], list[Any]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((name, args))
            answers = {"is_available": True, "device_count": self.count, "get_device_capability": self.capability}
            return answers.get(name)

        return call

    def touched(self) -> list[tuple[str, Any]]:
        """The calls that may start CUDA on a GPU."""
        return [call for call in self.calls if call[0] not in self.ASKING]


@pytest.mark.parametrize(
    "visible, count, local_rank, index",
    [
        (None, 8, 5, 5),
        ("0,1,2,3,4,5,6,7", 8, 0, 0),
        ("2,3", 2, 1, 1),
        ("GPU-1a,GPU-2b", 2, 1, 1),  # UUIDs
        ("3", 1, 3, 0),  # one alone: --gpus-per-task
        ("GPU-8e6c9e6e-0000", 1, 7, 0),
        ("0", 1, 0, 0),
    ],
)
def test_a_rank_touches_its_own_gpu_first(
    machine: pytest.MonkeyPatch, visible: str | None, count: int, local_rank: int, index: int
) -> None:
    """All of device.start up to the process group, with nothing of CUDA before set_device."""
    cuda = Cuda(count)
    machine.setattr(torch, "cuda", cuda)
    if visible is not None:
        machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    launchers = ("LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_SIZE")
    for name in (*launchers, ON_NODE, gpus.NCCL_HEARTBEAT):
        machine.setenv(name, "")  # so that what start sets is undone
        machine.delenv(name)
    met, shared = [], []  # type: list[Any], list[bool]
    machine.setattr(device, "_meet", lambda *args: met.append((args, cuda.touched(), os.environ["LOCAL_RANK"])))
    machine.setattr(dist.distributed_c10d, "default_pg_nccl_timeout", timedelta(seconds=600))
    machine.setattr(dist, "is_initialized", lambda: False)
    machine.setattr(cache, "share_on_this_node", lambda speaks: shared.append(speaks))
    machine.setattr(gpus, "sdpa_kernel", lambda order, set_priority: contextlib.nullcontext())
    machine.setitem(sys.modules, "deepspeed", SimpleNamespace())  # the real one chooses its device once a process
    flags = SimpleNamespace(allow_bf16_reduced_precision_reduction=True, allow_fp16_reduced_precision_reduction=True)
    machine.setattr(torch.backends.cuda, "matmul", flags)

    ranks = Ranks(rank=local_rank, local_rank=local_rank, world_size=8, local_size=8)
    found = device.start(ranks, TrainConfig(device="cuda"), timeout_seconds=1140.0)
    assert found == torch.device("cuda", index)
    (((_, own, backend, seconds), touched, seen_by_deepspeed),) = met
    assert (own, backend, seconds) == (found, "nccl", 1140.0)
    assert touched[0] == ("set_device", (torch.device("cuda", index),)) and seen_by_deepspeed == str(index)
    assert {arguments for _, arguments in touched} == {(torch.device("cuda", index),)}, "another GPU was touched"
    assert os.environ["DS_ACCELERATOR"] == "cuda"
    assert not flags.allow_bf16_reduced_precision_reduction and not flags.allow_fp16_reduced_precision_reduction
    assert shared == [local_rank == 0], "kernels are compiled once a node"
    assert place_on_node(os.environ) == (local_rank, 8), "by which ranks share the files of their node's disk"
    # NCCL waits no less than our own limit.
    assert os.environ[gpus.NCCL_HEARTBEAT] == "1140"
    assert gpus.NVLS not in os.environ, "switches add up unless train.deterministic forbids it"
    assert dist.distributed_c10d.default_pg_nccl_timeout == timedelta(seconds=1140)


def switches() -> list[Any]:
    """torch's, that decide how products and attention round."""
    matmul = torch.backends.cuda.matmul
    deterministic: Any = torch.utils.deterministic  # whose attribute is a property of the module
    return [
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        deterministic.fill_uninitialized_memory,
        _cur_sdpa_kernel_backends(with_priority=True),
    ]


@pytest.fixture
def numerics(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """torch's switches as they were, afterwards."""
    before = switches()
    with contextlib.ExitStack() as held:
        monkeypatch.setattr(gpus, "_NUMERICS", held)
        yield monkeypatch
    assert switches() == before


@pytest.mark.parametrize(
    "capability, deterministic, order",
    [
        ((9, 0), False, ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]),
        ((8, 0), False, None),  # torch's own order
        ((10, 0), False, None),
        ((9, 0), True, ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]),
    ],
)
def test_order_of_fused_attention(
    numerics: pytest.MonkeyPatch, capability: tuple[int, int], deterministic: bool, order: list[str] | None
) -> None:
    """What torch itself says that it would try, in this order."""
    before = _cur_sdpa_kernel_backends(with_priority=True)
    numerics.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpus.set_numerics(torch.device("cuda", 0), deterministic=deterministic)
    names = [backend.name for backend in _cur_sdpa_kernel_backends(with_priority=True)]
    assert names == (order or [backend.name for backend in before])
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    assert settings.fill_uninitialized_memory is not deterministic
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    gpus._NUMERICS.close()
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_cublas_and_nccl_are_asked_before_cuda_starts(machine: pytest.MonkeyPatch) -> None:
    """And another wish of the environment is refused before a GPU is touched."""
    cuda = Cuda(8)
    machine.setattr(torch, "cuda", cuda)
    machine.setenv(gpus.CUBLAS, ":0:0")
    machine.setenv(gpus.NVLS, "2")
    settings, ranks = TrainConfig(device="cuda", deterministic=True), Ranks(0, 0, 2, 2)
    for name in ("LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_SIZE"):
        machine.setenv(name, "")
        machine.delenv(name)
    with pytest.raises(UserError, match=r"train\.deterministic: cuBLAS .* = :4096:8 or :16:8, but it is ':0:0'"):
        device.start(ranks, settings)
    machine.delenv(gpus.CUBLAS)
    with pytest.raises(UserError, match=r"train\.deterministic: NCCL .* NCCL_NVLS_ENABLE = 0, but it is '2'"):
        device.start(ranks, settings)
    assert cuda.touched() == []
    machine.setattr(device, "own_gpu", lambda ranks: pytest.exit(os.environ[gpus.NVLS]))
    with pytest.raises(pytest.exit.Exception, match=r"^2$"):
        device.start(Ranks(0, 0, 1, 1), settings)  # a rank alone adds up nothing by NCCL
    machine.delenv(gpus.NVLS)
    machine.setattr(device, "own_gpu", lambda ranks: pytest.exit(f"{os.environ[gpus.CUBLAS]} {os.environ[gpus.NVLS]}"))
    with pytest.raises(pytest.exit.Exception, match=r"^:4096:8 0$"):
        device.start(ranks, settings)


@pytest.mark.parametrize("visible, count", [(None, 1), ("0,1,2", 1), ("0,1", 2), ("1", 2)])
def test_more_ranks_than_gpus_are_refused(machine: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    """The launcher's list of three on a machine with one GPU is not a GPU of this task's own."""
    cuda = Cuda(count)
    machine.setattr(torch, "cuda", cuda)
    if visible is not None:
        machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=rf"LOCAL_RANK: is 2, but this process sees {count} GPU"):
        own_gpu(Ranks(rank=2, local_rank=2, world_size=3, local_size=3))
    assert cuda.touched() == []


@pytest.mark.parametrize(
    "near, own, is_far",
    [("0-3,8", {4, 8}, False), ("0-3,8", {4, 5}, True), ("", {4}, False), ("0-x", {4}, False), (None, {4}, False)],
)
def test_cores_are_far_from_a_gpu_at_another_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, near: str | None, own: set[int], is_far: bool
) -> None:
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=1)
    if near is not None:
        (tmp_path / "0000:dc:01.0").mkdir()
        (tmp_path / "0000:dc:01.0" / "local_cpulist").write_text(f"{near}\n")
    monkeypatch.setattr(gpus, "PCI", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: own)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    assert gpus.is_far_from_its_cores(torch.device("cuda", 0)) is is_far
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())  # an older torch
    assert not gpus.is_far_from_its_cores(torch.device("cuda", 0))
    assert not gpus.is_far_from_its_cores(torch.device("cpu"))
