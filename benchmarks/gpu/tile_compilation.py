"""Candidates compiled before they are timed, in processes that touch no GPU: registers, stack and shared memory.

A process runs the op on fake CUDA tensors (benchmarks/fake_cuda.py), writes down what it launches, and has Triton
compile just that for the card's architecture. Triton's cache on the disk keeps it under the key that the launch on the
card asks for. Without a GPU the same says which candidates spill.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.compiled_case import SHARED_BYTES, resource_usage
from benchmarks.gpu.tile_search import Search, Tiles, tiles_of
from benchmarks.gpu.timing import Inputs, draw

REGISTERS = 65536
"""Of a multiprocessor, for all threads of a block."""
PROCESSES = 15
"""At most; one core is left for the process that times."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the kernels of one candidate need; the largest of each number, where there are several kernels."""

    registers: int = 0
    """Per thread."""
    stack_bytes: int = 0
    """Per thread; what spills is there."""
    shared_bytes: int = 0
    """Per block."""
    error: str = ""
    """Why the compiler gave nothing."""

    def rejected(self, architecture: int, warps: int) -> str:
        """Why the candidate is not worth a launch, or ""."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.stack_bytes > 0:
            return f"{self.stack_bytes} bytes of stack per thread"
        if self.shared_bytes > SHARED_BYTES[architecture]:
            return f"{self.shared_bytes} bytes of shared memory, {SHARED_BYTES[architecture]} fit"
        if self.registers * 32 * warps > REGISTERS:
            return f"{self.registers} registers per thread in {warps} warps"
        return ""


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, as its host code gave it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


def launches_on_fake_cuda(search: Search, every: Sequence[Tiles]) -> list[list[Launch]]:
    """What the op launches of the kernels in their phase, with each of `every` tiles; the inputs are drawn once."""
    from benchmarks.fake_cuda import backward, fake_cuda
    from benchmarks.launch_counter import LaunchCounter

    launched: list[Launch] = []

    class Noting(LaunchCounter):
        def launched(self, kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
            launched.append(Launch(kernel, (), tuple(args), kwargs))

    def run(inputs: Inputs, tiles: Tiles) -> None:
        tensors = {
            name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in inputs.tensors.items()
        }
        if search.phase == "forward":
            with tiles_of(search, tiles):
                inputs.case.compute(tensors, search.backend)
            return
        outputs = inputs.case.compute(tensors, search.backend)
        loss = torch.stack([(y * u).float().sum() for y, u in zip(outputs, inputs.upstream, strict=True)]).sum()
        launched.clear()
        with tiles_of(search, tiles):
            backward(loss)

    found = []
    with fake_cuda(), Noting():
        inputs = draw(search.build, torch.device("cuda"), torch.bfloat16, 0)
        for tiles in every:
            launched.clear()
            run(inputs, tiles)
            found.append([launch for launch in launched if launch.name in search.kernels])
    return found


class _Target:
    """Triton's driver, as far as a compilation asks for it: an architecture and no GPU."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def _compiling_for(architecture: int) -> Iterator[None]:
    from triton.runtime.driver import driver

    with mock.patch.object(driver, "_active", _Target(architecture)):
        yield


def compile_tiles(search: Search, tiles: Tiles, architecture: int) -> Resources:
    """Compiles the kernels of one candidate."""
    needs: list[tuple[int, int, int]] = []
    try:
        (launches,) = launches_on_fake_cuda(search, [tiles])
        if not launches:
            raise RuntimeError(f"the op launches no {' or '.join(search.kernels)}")
        with _compiling_for(architecture):
            for launch in launches:
                args, kwargs = map(_typed, launch.args), {name: _typed(v) for name, v in launch.kwargs.items()}
                compiled = launch.kernel.run(*args, grid=(1,), warmup=True, **kwargs)
                usage = _usage(compiled.asm["cubin"])
                needs.append((usage["REG"], usage["STACK"], compiled.metadata.shared))
    except Exception as error:  # whatever the compiler dies of belongs in the record
        return Resources(error=f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")
    registers, stack, shared = map(max, zip(*needs, strict=True))
    return Resources(registers=registers, stack_bytes=stack, shared_bytes=shared)


def _typed(value: Any) -> Any:
    """Triton compiles for the dtype of a tensor, on 16 bytes."""
    from triton.runtime.jit import MockTensor

    return MockTensor(value.dtype) if isinstance(value, Tensor) else value


@functools.lru_cache(maxsize=8)
def _usage(cubin: bytes) -> dict[str, int]:
    """A phase may launch one kernel many times."""
    return resource_usage(cubin)


def compile_named(name: str, tiles: Tiles, architecture: int) -> Resources:
    """In a process of its own, to which a search cannot be sent."""
    from benchmarks.gpu.tuned_kernels import searches

    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a GPU: no context, no memory
    (search,) = (search for search in searches(tiny=False) if search.name == name)
    return compile_tiles(search, tiles, architecture)


class Compiler:
    """Candidates of several searches, compiled in the order in which they were given, until the process ends."""

    def __init__(self, architecture: int, processes: int | None = None) -> None:
        self.architecture = architecture
        wanted = processes or max(1, min(PROCESSES, (os.cpu_count() or 2) - 1))
        self._pool = multiprocessing.get_context("spawn").Pool(wanted)
        self._results: dict[str, list[AsyncResult[Resources]]] = {}

    def begin(self, search: Search, candidates: Sequence[Tiles]) -> None:
        self._results[search.name] = [
            self._pool.apply_async(compile_named, (search.name, tiles, self.architecture)) for tiles in candidates
        ]

    def resources(self, search: Search, seconds: float) -> list[Resources]:
        """Of every candidate of the search, in order; waits at most `seconds` for all."""
        found, deadline = [], time.monotonic() + seconds
        for result in self._results[search.name]:
            try:
                found.append(result.get(max(0.0, deadline - time.monotonic())))
            except multiprocessing.TimeoutError:
                found.append(Resources(error=f"not compiled in {seconds:.0f} s"))
        return found

    def stop(self) -> None:
        self._pool.terminate()
