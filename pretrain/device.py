"""Where this process computes: device, collective backend, threads. Every branch that only a GPU takes is here.

Branches marked `GPU-ONLY name` were never executed in development; docs/untested-on-gpu.md lists them and a test
compares the two.
"""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pretrain.errors import UserError
from pretrain.slurm import launcher_variables


class Unreachable(RuntimeError):
    """The ranks do not find each other: a fault of nodes or network, which the next start may not meet."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the job, from the environment of the launcher or of srun; a single process without
    one."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int

    @classmethod
    def from_environment(cls) -> Ranks:
        """Under srun also sets the variables that a launcher would have set. Raises UserError."""
        env = os.environ
        env.update(launcher_variables(env))
        world_size = int(env.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(env.get("RANK", "0")),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            world_size=world_size,
            local_size=int(env.get("LOCAL_SIZE", env.get("LOCAL_WORLD_SIZE", str(world_size)))),
        )


def device_type() -> str:
    """`cuda` if a GPU is usable, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def start(ranks: Ranks, threads: int | None, *, timeout_seconds: float = 1800.0) -> torch.device:
    """Sets threads, joins the process group and returns the device of this rank. Call once, before any model.
    `timeout_seconds`: after which the ranks no longer wait for each other, here and in collectives. Raises UserError
    and Unreachable."""
    _set_threads(ranks, threads)
    for key, value in {
        "RANK": ranks.rank,
        "LOCAL_RANK": ranks.local_rank,
        "WORLD_SIZE": ranks.world_size,
        "LOCAL_SIZE": ranks.local_size,
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(key, str(value))
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if device_type() == "cuda":  # GPU-ONLY nccl-backend
        device, backend = torch.device("cuda", ranks.local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates: a line per rank that no user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    if device.type == "cpu":
        # Otherwise DeepSpeed compiles its shared-memory collectives at the first start (94 s), and a killed compile
        # leaves a lock file on which every later run waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        try:
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout_seconds))
        except dist.DistNetworkError as error:
            port, reason = os.environ["MASTER_PORT"], str(error).splitlines()[0]
            where = f"launch: the ranks cannot meet at {os.environ['MASTER_ADDR']}:{port} ({reason})"
            if "EADDRINUSE" in reason:
                raise UserError(
                    f"{where}; another job uses the port, choose one: deepspeed --master_port {int(port) + 1} ..."
                ) from None
            raise Unreachable(f"{where}; a rank did not come, or the network between the nodes is closed") from None
    return device


def on_collective_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the default group's collectives can take it: NCCL has no CPU tensors."""
    if dist.get_backend() == "nccl":  # GPU-ONLY collective-device
        return tensor.cuda()
    return tensor


def control_group(timeout_seconds: float) -> Any:
    """All ranks, by collectives of CPU tensors that wait for no kernel; collective."""
    if dist.get_backend() == "nccl":  # GPU-ONLY control-group
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return dist.group.WORLD


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def synchronize(device: torch.device) -> None:
    """Waits for queued kernels, so that a wall-clock time means something."""
    if device.type == "cuda":  # GPU-ONLY synchronize
        torch.cuda.synchronize(device)


def host_buffer(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 in CPU memory that is really there: every page was touched."""
    if torch.cuda.is_available():  # GPU-ONLY pinned-buffer
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(num_bytes, dtype=torch.uint8).fill_(1)  # zeros() would wait for the first write


def _set_threads(ranks: Ranks, threads: int | None) -> None:
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(
            1,
            len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
            // ranks.local_size,
        )
    if threads is not None:
        torch.set_num_threads(threads)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
