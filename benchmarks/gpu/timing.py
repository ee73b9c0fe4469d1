"""Times on a GPU: between events around the replay of a CUDA graph, so that neither Python nor a launch is timed.

`measure` fixes the order. What is timed is made beforehand, on the device, inputs and upstream gradients included. Then
each piece of work is run to warm it up and captured. Then the device is held until the host has asked for all rounds.
Round after round the L2 cache is overwritten, a start event is recorded, one graph is replayed, an end event is
recorded. Rounds rotate through several sets of inputs. Nothing is read or checked before the last round is over.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.op_cases import Build, Case

Work = Callable[[], Any]
LOSS_SCALE = 65536.0
"""Of losses in fp16, as in training: a mean's gradients are too small for fp16 without."""
WARM_UP = 3
"""Calls before a capture: compilation, handles, allocator."""
HOLD_CYCLES = 40_000_000
"""Of the device, 20 ms, before the first round. A host that asks for a graph after the start event has passed would be
in the time: overwriting an H200's cache takes 30 us, a slow host may need longer for events and graph. Once, not in
every round: a card that rests between products multiplies faster than in a step."""


class Clock(Protocol):
    """A device on which work is timed; tests have one that records the order of these calls."""

    l2_bytes: int

    def capture(self, work: Work) -> Work:
        """Warms `work` up and returns what repeats it without the host."""

    def hold(self) -> None:
        """Keeps the device busy while the host asks for what follows."""

    def flush(self) -> None:
        """Overwrites the L2 cache."""

    def timed(self, replay: Work) -> Callable[[], float]:
        """Start event, `replay`, end event -> what gives the milliseconds between them, after `wait`."""

    def wait(self) -> None:
        """Until the device has done everything."""

    def draw_on(self) -> Any:
        """Context in which work that will be captured draws its tensors and runs its forward pass."""


class CudaClock:
    """Graphs and events of the current GPU."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes = properties.L2_cache_size
        self._stream = torch.cuda.Stream()
        self._flushed = torch.empty(2 * self.l2_bytes, dtype=torch.int8, device="cuda")

    @contextlib.contextmanager
    def draw_on(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())  # on which the inputs were drawn
        with torch.cuda.stream(self._stream):
            yield

    def capture(self, work: Work) -> Work:
        with self.draw_on():
            for _ in range(WARM_UP):
                work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()
        return graph.replay

    def hold(self) -> None:
        torch.cuda._sleep(HOLD_CYCLES)

    def flush(self) -> None:
        self._flushed.zero_()

    def timed(self, replay: Work) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        return lambda: start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()


class HostClock:
    """A CPU, on which the commands are tested: no graphs, the host's clock."""

    l2_bytes = 1

    def draw_on(self) -> Any:
        return torch.enable_grad()

    def capture(self, work: Work) -> Work:
        work()
        return work

    def hold(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def timed(self, replay: Work) -> Callable[[], float]:
        begin = time.perf_counter()
        replay()
        milliseconds = 1e3 * (time.perf_counter() - begin)
        return lambda: milliseconds

    def wait(self) -> None:
        pass


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of one call, over rounds."""

    median: float
    low: float
    """A tenth of the rounds are below."""
    high: float
    """A tenth are above."""
    rounds: int

    def as_result(self) -> dict[str, float]:
        return {"ms": round(self.median, 5), "low": round(self.low, 5), "high": round(self.high, 5)}


def measure(clock: Clock, works: Sequence[Work], rounds: int) -> Times:
    """`works` do the same on different inputs."""
    replays = [clock.capture(work) for work in works]
    for replay in replays:
        replay()
    clock.flush()  # its first call loads its kernel, for which CUDA may wait until the device is idle: the hold is over
    clock.wait()
    clock.hold()
    readings = []
    for number in range(rounds):
        clock.flush()
        readings.append(clock.timed(replays[number % len(replays)]))
    clock.wait()
    return times(reading() for reading in readings)


def times(milliseconds: Iterable[float]) -> Times:
    ordered = sorted(milliseconds)
    tenth = len(ordered) // 10
    return Times(median=statistics.median(ordered), low=ordered[tenth], high=ordered[-1 - tenth], rounds=len(ordered))


# ------------------------------------------------------------------------------------------------------- ops as work


@dataclass(frozen=True)
class Inputs:
    """One set of a case's tensors on the device, with upstream gradients of its outputs."""

    case: Case
    tensors: dict[str, Tensor]
    upstream: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.tensors[name] for name in self.case.leaves]


WIDE = ("logits", "scores")
"""Leaves that are fp32 whatever the storage dtype, as routers give them."""


def tensors_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The case's leaves rounded to `dtype` (`WIDE` ones to fp32 at least) and its constants, where they were drawn."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {n: t.to(wide if n in WIDE else dtype).requires_grad_() for n, t in case.leaves.items()}
    return leaves | case.constants


def draw(build: Build, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Draws inputs and upstream gradients on the device; the shapes of outputs come from one call of the reference's
    smallest relative: the case on the meta device."""
    torch.manual_seed(seed)
    with torch.device(device):
        case = build()
        tensors = tensors_of(case, dtype)
    with torch.device("meta"):
        outline = build()
    shapes = outline.compute(tensors_of(outline, dtype), "reference")
    upstream = [torch.randn(y.shape, dtype=y.dtype, device=device) for y in shapes]
    if dtype == torch.float16:
        upstream = [u if u.dim() else LOSS_SCALE * u for u in upstream]
    return Inputs(case, tensors, upstream)


def number_of_sets(inputs: Inputs, l2_bytes: int) -> int:
    """So many that one round's inputs have left the cache when they come again: 2 to 8."""
    held = sum(t.numel() * t.element_size() for t in inputs.tensors.values())
    return min(8, max(2, -(-4 * l2_bytes // max(held, 1))))


def draw_sets(build: Build, device: torch.device, dtype: torch.dtype, l2_bytes: int, *, tiny: bool) -> list[Inputs]:
    """As many as rounds rotate through; `tiny`: two."""
    first = draw(build, device, dtype, 0)
    count = 2 if tiny else number_of_sets(first, l2_bytes)
    return [first, *(draw(build, device, dtype, seed) for seed in range(1, count))]


def forward_of(inputs: Inputs, backend: str) -> Work:
    tensors = dict(inputs.tensors)
    return lambda: inputs.case.compute(tensors, backend)


def backward_of(inputs: Inputs, backend: str, clock: Clock) -> Work:
    """The forward pass is done here, and kept; the work is the backward pass alone."""
    with clock.draw_on():
        outputs = inputs.case.compute(dict(inputs.tensors), backend)
    leaves = inputs.leaves
    return lambda: torch.autograd.grad(outputs, leaves, inputs.upstream, retain_graph=True)
