"""Where this process computes: device, collective backend, threads. Branches that only a GPU takes are here and in
gpus.py.

No test executes branches marked `GPU-ONLY name`; docs/untested-on-gpu.md says which have run, and a test
compares the two.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import PassingError, UserError
from common.limits import usable_cores
from common.open_files import allow_open_files
from common.ports import reserved_port
from common.resident import resident_bytes
from common.slurm import is_task_of_many
from pretrain.config.schema import TrainConfig
from pretrain.gpus import (
    ask_cublas_for_determinism,
    ask_nccl_for_determinism,
    device_type,
    let_the_watchdog_speak_first,
    own_gpu,
    refusing_a_shared_gpu,
    set_numerics,
    what_nccl_says,
)
from pretrain.ranks import Ranks

NAME_SECONDS = 60.0
"""How long a name server may take to learn the name of the first node."""
REMINDER_SECONDS = 15.0
"""After this time a rank says what it waits for: ranks start within seconds of each other, unless one is missing."""

LEAVE_SECONDS = 30.0
"""How long leaving the process group may take: launchers end the other ranks only when a failed one has left."""

HISTORY_EVENTS = 50_000
"""The newest allocations and frees of a GPU that are kept: a few KB of the host's memory each, says torch. Without a
limit a long run would keep all of them."""

_left: list[bool] = []
"""Filled when this process leaves its process group, whose ranks DeepSpeed remembers for ever."""

EACH_WITH_EACH = 64
"""Up to so many ranks gloo connects each with each when a group is made: 63 connections a group and rank."""


NCCL_FILES = 16_384
"""Files that a rank may have open between GPUs. Where NCCL speaks over sockets it opens up to 64 for a connection
(NCCL_SOCKET_NTHREADS x NCCL_NSOCKS_PERTHREAD), for some neighbours and channels of each communicator."""


class Unreachable(RuntimeError):
    """The ranks cannot reach each other: a fault of a node or of the network, which the next start may not meet."""


def start(ranks: Ranks, settings: TrainConfig, *, timeout_seconds: float = 1800.0) -> torch.device:
    """Sets threads, joins the process group and returns the device of this rank. Call once, before any model.
    `timeout_seconds`: how long the ranks wait for each other, here and in collectives. Raises UserError and
    Unreachable."""
    if _left:
        raise UserError(
            "this process has begun a training before, and DeepSpeed takes one a process; start each in a process of "
            "its own, as launch/sweep.py does"
        )
    device_name = device_type(settings.device)
    _set_threads(ranks, settings.threads)
    for key, value in {
        "RANK": ranks.rank,
        "LOCAL_RANK": ranks.local_rank,
        "WORLD_SIZE": ranks.world_size,
        "LOCAL_SIZE": ranks.local_size,
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(key, str(value))
    held = None
    if "MASTER_PORT" not in os.environ:
        held = reserved_port()  # importing DeepSpeed takes seconds, in which another run may ask for a free port
        os.environ["MASTER_PORT"] = str(held.getsockname()[1])
    if device_name == "cuda":  # GPU-ONLY nccl-backend
        if settings.deterministic:
            ask_cublas_for_determinism()
            if ranks.world_size > 1:
                ask_nccl_for_determinism()
        device, backend = own_gpu(ranks), "nccl"
        set_numerics(device, deterministic=settings.deterministic)
        if importlib.util.find_spec("triton") is not None:
            from model.kernels.triton.cache import share_on_this_node  # here: it imports triton

            share_on_this_node(speaks=ranks.local_rank == 0)
        let_the_watchdog_speak_first(timeout_seconds, speaks=ranks.rank == 0)
    else:
        device, backend = torch.device("cpu"), "gloo"
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else DeepSpeed would look for a device by itself

    leave_out_warnings()
    import deepspeed

    if device.type == "cpu":
        # Otherwise DeepSpeed compiles its shared-memory collectives at the first start (94 s), and a killed compile
        # leaves a lock file on which every later run waits for ever. Set as a whole: a look at DeepSpeed's own table
        # makes it, by a probe of every op, one of which compiles a program. RELIES-ON deepspeed-operators
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if not dist.is_initialized():
        _prepare_connections(ranks.world_size, by_nccl=backend == "nccl")
        _meet(ranks, device, backend, timeout_seconds)
    if held is not None:
        held.close()
    return device


def leave_out_warnings() -> None:
    """Of libraries: what no user can act on, and every rank would say."""
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Said of every barrier that names none, although torch takes this rank's own, which the first one named (_meet).
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")


def _prepare_connections(world_size: int, *, by_nccl: bool = False) -> None:
    """For many ranks: lets gloo connect two ranks when they first speak, and this process open enough connections.
    Each with each would take N - 1 connections of every rank for every group, and of the store by which they meet 8 N^3
    bytes: each rank lists a number for each other one, and reads everybody's list. Raises UserError."""
    if by_nccl and world_size > 1:
        allow_open_files(NCCL_FILES)  # as far as the machine lets it
    if world_size <= EACH_WITH_EACH:
        return
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # Rank 0 has one to every rank for the store and, while a checkpoint is written, one for the saver's group.
    needed = 2 * world_size + 1024
    if (allowed := allow_open_files(needed)) < needed:
        raise UserError(
            f"ulimit -n: {world_size} ranks need {needed} open files in a process, and this machine allows {allowed}; "
            f"raise its hard limit (nofile in /etc/security/limits.conf, LimitNOFILE of slurmd)"
        )


def _meet(ranks: Ranks, device: torch.device, backend: str, timeout_seconds: float) -> None:
    """Joins the process group, and says what it waits for if that takes long."""
    import deepspeed

    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _await_name(address, ranks, min(timeout_seconds, NAME_SECONDS))
    others = f"the other {ranks.world_size - 1} of {ranks.world_size} ranks" if ranks.rank == 0 else "rank 0"
    words = f"rank {ranks.rank} waits for {others} at {address}:{port}, for up to {timeout_seconds:.0f} s"
    reminder = threading.Timer(REMINDER_SECONDS, print, [words], {"file": sys.stderr, "flush": True})
    reminder.daemon = True
    if ranks.local_rank == 0:
        reminder.start()
    try:
        with refusing_a_shared_gpu():
            # Not by DeepSpeed 0.19.8, which binds this rank's GPU to the group. Bound, torch 2.13 makes each further
            # group at once, for which all ranks wait, and sends to the stages before and after this one in one queue.
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout_seconds))
            if backend == "nccl" and ranks.world_size > 1:
                # NCCL connects ranks in their first collective. Unless told, torch takes the GPU of the number rank %
                # GPUs for it, which is another rank's or nobody's where nodes have more GPUs than ranks; the next
                # collective, on this rank's own, would then wait for ever. Later barriers take that of the first one.
                dist.barrier(device_ids=[device.index])
    except dist.DistError as error:
        if (said := what_nccl_says(error)) is not None:
            raise Unreachable(
                f"launch: NCCL cannot connect the ranks ({said}); name the network between the nodes in "
                f"NCCL_SOCKET_IFNAME, or set NCCL_DEBUG=INFO to see what it tries"
            ) from None
        reason = str(error).splitlines()[0]
        where = f"launch: the ranks cannot meet at {address}:{port} ({reason})"
        if "EADDRINUSE" in reason:
            other = int(port) + 1 if int(port) < 65535 else int(port) - 1
            raise UserError(
                f"{where}; another job uses the port, choose one: deepspeed --master_port {other} ..."
            ) from None
        raise Unreachable(
            f"{where}; a rank did not come within {timeout_seconds:.0f} s, MASTER_ADDR and MASTER_PORT are not those "
            f"of rank 0, or the network between the nodes is closed"
        ) from None
    finally:
        reminder.cancel()


def _await_name(address: str, ranks: Ranks, seconds: float) -> None:
    """Waits until a name server knows `address`: a cluster's name servers may learn a node's name only after it has
    started. Raises Unreachable."""
    deadline, has_said = time.monotonic() + seconds, False
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be a name
            reason = getattr(error, "strerror", None) or str(error)
        if time.monotonic() >= deadline:
            raise Unreachable(
                f"MASTER_ADDR: no name server knows {address!r} ({reason}); export the name or the address of the node "
                f"of rank 0"
            )
        if not has_said and ranks.local_rank == 0:
            print(
                f"rank {ranks.rank} waits for a name server to know MASTER_ADDR = {address} ({reason}), for up to "
                f"{seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        has_said = True
        time.sleep(min(1.0, seconds))


def on_collective_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on a device that the default group's collectives accept: NCCL takes no CPU tensors."""
    if dist.get_backend() == "nccl":  # GPU-ONLY collective-device
        return tensor.cuda()
    return tensor


def gloo_address(env: Mapping[str, str]) -> str | None:
    """Where gloo listens on this machine, as torch 2.13 chooses (ProcessGroupGloo::createDefaultDevice): at the first
    address of the machine's name that is its own, else at the loopback. None where GLOO_SOCKET_IFNAME says it."""
    if env.get("GLOO_SOCKET_IFNAME"):
        return None
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, place in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as own:
                own.bind(place)
                return str(place[0])
    return "127.0.0.1"


def control_group(timeout_seconds: float, first_message: Callable[[Any], object]) -> Any:
    """A group of all ranks for collectives of CPU tensors, which wait for no kernel. `first_message` is exchanged in
    it: many ranks connect only then. Collective; raises PassingError where the ranks reach each other by NCCL alone:
    the node of one of them may just have died."""
    if dist.get_backend() == "nccl":  # GPU-ONLY control-group
        try:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds), group_desc="control")
            first_message(group)
            return group
        except RuntimeError as error:
            raise PassingError(
                f"GLOO_SOCKET_IFNAME: NCCL connects the ranks, but gloo, by which they agree on CPUs, does not "
                f"({str(error).splitlines()[0]}); if that comes back, set it to the name of the network between the "
                f"nodes (ip -brief address), or let the name of each node resolve to its address there"
            ) from None
    return dist.group.WORLD


class CudaGraph:
    """Work that is recorded once and then replayed on the same tensors; see pretrain/engine/graphed.py."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def recording(self) -> Any:
        """Context in which what is queued is recorded and not computed. Threads that read data or write a checkpoint go
        on calling CUDA meanwhile, so only this thread may not wait for the GPU."""
        return torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local")

    def replay(self) -> None:
        self._graph.replay()


def graph_maker(device: torch.device) -> Callable[[], CudaGraph]:
    """Makes graphs that share memory, for those that are replayed in the order in which they were recorded: what one
    has freed belongs to the next."""
    with torch.cuda.device(device):  # GPU-ONLY cuda-graph
        pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


def stop(code: int | None = None) -> None:
    """Leaves the process group. NCCL's waits until all that is queued has ended, and with it for the other ranks, which
    never come to what a rank has queued that failed alone. `code`: that of this process, which ends with it if the
    group has not let it go after LEAVE_SECONDS, and whatever the group says; without it waits, and raises."""
    if not dist.is_initialized():
        return
    late = threading.Timer(LEAVE_SECONDS, os._exit, (code,))
    late.daemon = True
    if code is not None:
        late.start()
    _left.append(True)
    try:
        dist.destroy_process_group()
    except RuntimeError as error:
        if code is None:
            raise
        print(f"the process group could not be left in order: {error}", file=sys.stderr, flush=True)
    finally:
        late.cancel()


def synchronize(device: torch.device) -> None:
    """Waits for queued kernels, so that a wall-clock time means something."""
    if device.type == "cuda":  # GPU-ONLY synchronize
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU, or the processor's architecture."""
    if device.type == "cuda":  # GPU-ONLY device-name
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}"


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Memory of this process now and at its peak: allocated tensors on a GPU, and what torch has reserved for them;
    resident pages on a CPU. Keys of metrics.jsonl. Waits for no kernel."""
    if device.type == "cuda":  # GPU-ONLY memory-bytes
        return {
            "memory_bytes": torch.cuda.memory_allocated(device),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(device),
            "memory_reserved_bytes": torch.cuda.memory_reserved(device),
        }
    now, peak = resident_bytes()
    return {"memory_bytes": now, "memory_peak_bytes": peak}


def memory_before(device: torch.device) -> int:
    """Bytes that `memory_bytes` counts in this process now although nothing of a run is there yet: on a CPU code and
    libraries, on a GPU nothing."""
    return memory_bytes(device)["memory_bytes"] if device.type == "cpu" else 0


def record_memory_history(device: torch.device) -> None:
    """From now on torch notes the Python stack of each allocation on a GPU, for `write_memory_snapshot`. A CPU has no
    such history."""
    if device.type == "cuda":  # GPU-ONLY memory-history, RELIES-ON torch-memory
        # Frames of C++ say little of who holds memory, and to name them takes minutes at the snapshot.
        torch.cuda.memory._record_memory_history(
            enabled="all", context="alloc", stacks="python", max_entries=HISTORY_EVENTS, device=device
        )


def write_memory_snapshot(path: Path, device: torch.device) -> bool:
    """What holds the memory of a GPU, in the format of torch's memory_viz, a pickle that nothing here reads. Returns
    whether there is one: a CPU has none. Blocks have stacks where `record_memory_history` was called before they were
    allocated. Raises OSError."""
    if device.type != "cuda":
        return False
    torch.cuda.memory._dump_snapshot(str(path))  # GPU-ONLY memory-snapshot
    return True


def host_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8 in CPU memory that is really allocated, for copies from `device`: every page was touched."""
    if device.type == "cuda":  # GPU-ONLY pinned-buffer
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(num_bytes, dtype=torch.uint8).fill_(1)  # zeros() would allocate at the first write


def _set_threads(ranks: Ranks, threads: int | None) -> None:
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = own_cores(ranks, os.environ)
    if threads is not None:
        torch.set_num_threads(threads)


def own_cores(ranks: Ranks, env: Mapping[str, str]) -> int:
    """Cores for this rank alone: those on which it may run, its share of them where all ranks of the node may run on
    the same. srun gives each task its own unless it is told not to bind them. Ranks in a container share its quota."""
    binding = env.get("SLURM_CPU_BIND_TYPE", "")
    is_bound = is_task_of_many(env) and binding.startswith(("mask_cpu", "map_cpu", "rank"))
    cores = usable_cores()
    return cores if is_bound else max(1, cores // ranks.local_size)
