"""CPU threads that each take whole tasks (experts), and scratch memory that stays mapped.

Why the threads inside each operator do not do it: an expert's GEMM takes about a millisecond, and every operator ends
in a barrier that waits for its slowest thread. Where two ranks, a data loader or a test share the cores, that
barrier lasts until the scheduler's next slice, and sigma-MoE took ten times as long (docs/kernels.md).
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

BLOCK_TOKENS = 1024
"""Tokens of one task: a [1024, 512] fp32 block is 2 MB, the second-level cache of one core."""

_pool: ThreadPoolExecutor | None = None
_local = threading.local()


def run_tasks(sizes: Sequence[int], task: Callable[[int], None]) -> None:
    """Calls task(i) for every i with sizes[i] > 0, the largest first, each whole on one worker.

    As many workers as the calling thread may use, but no more than can be busy while the largest task runs; threads
    that are left over work inside the operators. Tasks must write to disjoint memory: then the result does not depend
    on which worker takes which.
    """
    todo = sorted((i for i, size in enumerate(sizes) if size > 0), key=lambda i: -sizes[i])
    if not todo:
        return
    threads = torch.get_num_threads()
    num_workers = min(threads, max(1, round(sum(sizes) / sizes[todo[0]])))
    if num_workers == 1:
        with torch.no_grad():
            for i in todo:
                task(i)
        return
    counter = itertools.count()  # next() on it is atomic

    def work() -> None:
        torch.set_num_threads(threads // num_workers)
        with torch.no_grad():
            while (position := next(counter)) < len(todo):
                task(todo[position])

    futures = [_workers(threads - 1).submit(work) for _ in range(num_workers - 1)]
    try:
        work()
    finally:
        # Even after an error nothing may still write into the caller's tensors.
        errors = [future.exception() for future in futures]
        torch.set_num_threads(threads)
    for error in errors:
        if error is not None:
            raise error


def run_blocks(num_tokens: int, task: Callable[[slice], None]) -> None:
    """Calls task(block) for consecutive blocks of BLOCK_TOKENS tokens, on the workers of `run_tasks`.

    The blocks do not depend on the number of threads, nor does then a sum over them.
    """
    blocks = [slice(start, min(start + BLOCK_TOKENS, num_tokens)) for start in range(0, num_tokens, BLOCK_TOKENS)]
    run_tasks([block.stop - block.start for block in blocks], lambda i: task(blocks[i]))


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised CPU memory of the calling thread, valid until it asks for the same name and dtype again.

    Kept for the life of the thread: memory above glibc's largest mmap threshold (32 MB) is otherwise mapped, zeroed and
    unmapped at every call, which takes longer than copying it.
    """
    buffers: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    numel, buffer = math.prod(shape), buffers.get((name, dtype))
    if buffer is None or buffer.numel() < numel:
        buffer = buffers[name, dtype] = torch.empty(numel, dtype=dtype, device="cpu")
    return buffer[:numel].view(shape)


def _workers(count: int) -> ThreadPoolExecutor:
    """The process's pool with at least `count` threads."""
    global _pool
    if _pool is None or _pool._max_workers < count:
        _pool = ThreadPoolExecutor(count, thread_name_prefix="switchall-kernels")
    return _pool


def _forget_pool() -> None:
    """A forked child has the pool's locks but none of its threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)
