"""gloo itself: how long a message of all ranks takes around its ring and in rounds, on one machine's loopback."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from benchmarks.scale.figures import Figure
from common.errors import UserError
from common.ports import free_port
from pretrain.parallel import rounds
from pretrain.parallel.rounds import maximum

REPEATS = 30


def figures(ranks: int) -> list[Figure]:
    """Medians over messages; the processes share this machine's cores. Raises UserError if one of them fails."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=_rank, args=(rank, ranks, port, sender)) for rank in range(ranks)]
    for process in processes:
        process.start()
    sender.close()  # else nobody would notice that all ranks have ended without an answer
    try:
        values = receiver.recv()
    except EOFError:
        raise UserError(f"--sockets: {ranks} processes did not meet, and said why") from None
    finally:
        for process in processes:
            process.join()
    return [
        Figure("to meet and connect", values["meet"], "ms"),
        Figure("sockets of rank 0", values["sockets"], "sockets"),
        Figure("step message around the ring", values["ring"], "ms"),
        Figure("step message in rounds", values["rounds"], "ms"),
    ]


def _rank(rank: int, ranks: int, port: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0, timeout=timedelta(seconds=300))
    started = time.perf_counter()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    dist.barrier()
    values = {"meet": 1e3 * (time.perf_counter() - started)}
    for name, around in (("ring", ranks), ("rounds", 1)):
        rounds.AROUND_THE_RING = around
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            message = torch.zeros(5, dtype=torch.int64)
            began = time.perf_counter()
            maximum(message, dist.group.WORLD)
            times.append(1e3 * (time.perf_counter() - began))
        values[name] = statistics.median(times)
    if rank == 0:
        places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        links = [os.readlink(place) for place in places if os.path.lexists(place)]
        values["sockets"] = float(sum(link.startswith("socket:") for link in links))
        sender.send(values)
    dist.barrier()
    dist.destroy_process_group()
