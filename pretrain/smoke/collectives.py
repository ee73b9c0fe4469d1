"""Every kind of collective between all ranks: is its result right, and how fast is it?

Rank r fills its buffer with base + r mod 1021, base[i] = i mod 251, so that every element of every result is a whole
number that fp32 holds exactly, whatever the order of the sum, up to 20,000 ranks. S is the size of the largest buffer
that a call reads or writes on a rank, W the number of ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.device import synchronize
from pretrain.parallel.agreement import of_all_ranks

REPEATS = 5
EVERY_PAIR = 64
"""Up to so many ranks every pair exchanges."""
APART = 1021
"""Ranks so far apart, or multiples, have the same numbers: were all different, sums of 6,000 ranks would be rounded."""
WIDTH = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
"""Bytes over the slowest link are this times S (W - 1) / W, as nccl-tests count them ("bus bandwidth")."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Measured:
    """One collective on all ranks."""

    name: str
    seconds: float
    """Median of REPEATS calls, of the slowest rank."""
    bytes_per_second: float
    """Over a link: bus bandwidth."""

    def __str__(self) -> str:
        return f"{self.name} {self.bytes_per_second / 1e9:.3g} GB/s"


def check_collectives(num_bytes: int, device: torch.device) -> tuple[list[Measured], list[str]]:
    """Collective. Measurements, and what was wrong (empty: nothing), both the same on every rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    elements = max(1, num_bytes // 4 // size) * size
    measured, faults = [], []
    for name, call, expected in _cases(rank, size, elements, device):
        faults += _agreed(_difference(name, rank, call(), expected))
        seconds = max(of_all_ranks(_median_seconds(call, device)))
        if name in WIDTH:
            moved = WIDTH[name] * elements * 4 * (size - 1) / size
            measured.append(Measured(name, seconds, moved / seconds))
    return measured + _pairs(rank, size, elements, device, faults), faults


def _cases(rank: int, size: int, elements: int, device: torch.device) -> Iterator[tuple[str, Call, Tensor]]:
    """Name, call and right result of each collective."""
    base = torch.arange(elements, device=device, dtype=torch.float32) % 251
    own, share = base + rank % APART, elements // size
    total = size * base + sum(other % APART for other in range(size))

    def all_reduce() -> Tensor:
        result = own.clone()
        dist.all_reduce(result)
        return result

    yield "all_reduce", all_reduce, total

    def all_gather() -> Tensor:
        result = torch.empty_like(base)
        dist.all_gather_into_tensor(result, own[:share].contiguous())
        return result

    yield "all_gather", all_gather, torch.cat([base[:share] + other % APART for other in range(size)])

    def reduce_scatter() -> Tensor:
        result = torch.empty_like(base[:share])
        dist.reduce_scatter_tensor(result, own)
        return result

    yield "reduce_scatter", reduce_scatter, total[rank * share : (rank + 1) * share]

    def all_to_all() -> Tensor:
        result = torch.empty_like(base)
        dist.all_to_all_single(result, own)
        return result

    mine = base[rank * share : (rank + 1) * share]
    yield "all_to_all", all_to_all, torch.cat([mine + other % APART for other in range(size)])

    def broadcast() -> Tensor:
        result = own.clone()
        dist.broadcast(result, src=size - 1)
        return result

    yield "broadcast", broadcast, base + (size - 1) % APART


def distances(size: int) -> list[int]:
    """Between ranks that exchange: all of them, so that every ordered pair does; for many ranks powers of two, or a
    thousand ranks would take a thousand rounds, in each of which every rank hears from every other."""
    return list(range(1, size)) if size <= EVERY_PAIR else [1 << bit for bit in range((size - 1).bit_length())]


def _pairs(rank: int, size: int, elements: int, device: torch.device, faults: list[str]) -> list[Measured]:
    """Point to point: in the round of distance s rank r sends to r + s and receives from r - s (`distances`). Of the
    bandwidths the slowest pair's is given, with its ranks: it tells which link or node is slow."""
    base = torch.arange(elements, device=device, dtype=torch.float32) % 251
    own = base + rank % APART
    slowest: tuple[float, str] | None = None
    for shift in distances(size):
        target, source = (rank + shift) % size, (rank - shift) % size

        def exchange(target: int = target, source: int = source) -> Tensor:
            result = torch.empty_like(own)
            operations = [dist.P2POp(dist.isend, own, target), dist.P2POp(dist.irecv, result, source)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            return result

        faults += _agreed(_difference(f"point to point from rank {source}", rank, exchange(), base + source % APART))
        seconds = of_all_ranks((_median_seconds(exchange, device), f"{source} to {rank}"))
        slowest = max([max(seconds), *([slowest] if slowest else [])])
    if slowest is None:
        return []
    return [Measured(f"slowest pair ({slowest[1]})", slowest[0], elements * 4 / slowest[0])]


def _median_seconds(call: Call, device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _difference(name: str, rank: int, result: Tensor, expected: Tensor) -> str | None:
    if torch.equal(result, expected):
        return None
    place = int((result != expected).nonzero()[0])
    return f"{name}: rank {rank} has {result[place].item()} at {place}, {expected[place].item()} is right"


def _agreed(fault: str | None) -> list[str]:
    """The faults of all ranks."""
    return [found for found in of_all_ranks(fault) if found is not None]
