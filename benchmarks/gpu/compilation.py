"""Compiles what the shipped shapes launch, in several processes: each runs some cases once, and Triton's cache on the
disk keeps what it compiled for the parts that follow."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from benchmarks.gpu.command import Context, Failed
from benchmarks.gpu.equality import DTYPES, backends_on, results_by_triton
from benchmarks.gpu.timing import draw
from benchmarks.op_cases import Build
from benchmarks.op_shapes import MODELS, equality_cases, outlines, shipped_cases

PROCESSES = 16
"""At most; each holds a CUDA context and the tensors of one case."""


def builds(*, tiny: bool) -> list[Build]:
    """Odd shapes last."""
    shipped = [] if tiny else [b for model in MODELS for b in shipped_cases(model)]
    return shipped + equality_cases(small=tiny)


def compile_one(number: int, dtype: str, device: str, tiny: bool) -> float:
    """Runs case `number` of `builds`, forward and backward, by all backends with Triton kernels, in a process of its
    own. Returns its seconds."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    results_by_triton(draw(builds(tiny=tiny)[number], torch.device(device), DTYPES[dtype], seed=0), DTYPES[dtype])
    return time.perf_counter() - begin


def compile_all(context: Context, *, dtype: str) -> dict[str, Any]:
    """What did not compile in half of the time that is left is compiled where it is used; an exception fails the
    part."""
    device = context.device.type
    cases = outlines(builds(tiny=context.tiny))
    jobs = [
        number
        for number, case in enumerate(cases)
        if backends_on(case.op, device, DTYPES[dtype], case.widths).get("triton", "absent") is None
    ]
    processes = 2 if context.tiny else max(1, min(PROCESSES, (os.cpu_count() or 2) - 1))
    deadline = time.monotonic() + 0.5 * context.remaining()
    begin = time.perf_counter()
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    todo: dict[Future[float], str] = {}
    for number in jobs:
        name = f"{cases[number].op} {cases[number].shape} {dtype}"
        todo[pool.submit(compile_one, number, dtype, device, context.tiny)] = name
    running = set(todo)
    while running and time.monotonic() < deadline:
        ended, running = wait(running, timeout=deadline - time.monotonic(), return_when=FIRST_COMPLETED)
        for future in ended:
            try:
                seconds[todo[future]] = round(future.result(), 2)
            except Exception as error:  # a worker that died, too: the others of its pool say so as well
                failed[todo[future]] = f"{type(error).__name__}: {str(error)[:500]}"
    pool.shutdown(wait=not running, cancel_futures=True)
    result = {
        "wall_seconds": round(time.perf_counter() - begin, 1),
        "processes": processes,
        "seconds": seconds,
        "not_in_time": sorted(todo[future] for future in running),
        "errors": failed,
    }
    if failed:
        raise Failed("; ".join(f"{name}: {why}" for name, why in failed.items()), result)
    return result
