"""A micro-step (forward and backward of the whole model in bf16) at several micro-batches: what the GPU does, what the
host needs to launch it, and what lies idle between.

    python -m benchmarks.gpu.micro_step MODEL SEQUENCES DEVICE [LAYERS]

runs one, for benchmarks/gpu/counters.py.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.command import Context, Failed, Part

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.language_model import LanguageModel

COSTLIEST = 30
TINY = [("", 1), ("compiled", 1), ("", 2), ("dense", 2), ("documents", 2)]
ALL = [
    *[("", 8), ("graphs", 8), ("graphs", 16), ("graphs", 32), ("compiled", 8), ("", 4), ("graphs", 4)],
    *[("", 2), ("graphs", 2), ("", 1), ("graphs", 1), ("compiled", 1)],
    *[("sets", 8), ("dense", 8), ("dense graphs", 8), ("dense graphs", 16)],
    *[("documents", 8), ("documents graphs", 8)],
]
"""Kinds and sequences, in order. On an H200 the 1B model took 8.6 ms and 14.5 ms more for each sequence, so micro-steps
above the configuration's 8 share what a micro-step costs whatever its tokens (4 and 8 as graphs, 2026-11-27)."""
STEPS = 5


class Activity(NamedTuple):
    """One kernel or copy on the device, microseconds."""

    name: str
    start: float
    end: float


def parts(*, tiny: bool) -> Iterator[Part]:
    for name in ("tiny",) if tiny else ("1b", "262m"):
        for kind, sequences in TINY if tiny else ALL:
            if "documents" in kind and name == "262m":  # Transformer-XL, whose memory reaches across documents
                continue
            one = functools.partial(compute, name=name, sequences=sequences, kind=kind)
            yield Part(name_of(name, sequences, kind=kind), one, 60.0 if kind == "compiled" else 15.0)


def name_of(name: str, sequences: int, *, kind: str = "") -> str:
    return " ".join(filter(None, ("micro-step", name, kind, str(sequences))))


def compute(context: Context, *, name: str, sequences: int, kind: str = "") -> dict[str, Any]:
    """Medians over steps of wall and host time; device time, launches and gaps of one step under the profiler. `kind`:
    `dense`, the dense counterpart; `graphs`, recorded as CUDA graphs; `sets`, the same with kernels.backend=sets;
    `compiled`, blocks by torch.compile; `documents`, with data.document_mask."""
    with models.as_in_training(context.device):
        return _measured(context, name, sequences, kind)


def _measured(context: Context, name: str, sequences: int, kind: str) -> dict[str, Any]:
    config = models.load(name)
    if "dense" in kind:
        config = models.dense_counterpart(config)
    on_gpu = context.device.type == "cuda"
    if on_gpu:
        free_memory()
        torch.cuda.reset_peak_memory_stats()
    backend = "sets" if kind == "sets" else "auto"
    step = Step(config, context.device, sequences, backend, has_documents="documents" in kind)
    if kind == "sets" or "graphs" in kind:
        step.record()
    if kind == "compiled":
        step.compile()
    for _ in range(3):  # with graphs the first is launched, the second recorded
        step()
    wall, host = zip(*(step.timed() for _ in range(2 if context.tiny else STEPS)), strict=True)
    activities = profiled(step)
    tokens = sequences * config.sequence_length
    seconds = statistics.median(wall)
    result: dict[str, Any] = {
        "tokens": tokens,
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "wall_ms": round(1e3 * seconds, 3),
        "host_ms": round(1e3 * statistics.median(host), 3),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "tokens_per_second": round(tokens / seconds, 1),
    }
    if not torch.isfinite(step.loss):
        raise Failed("the loss is not finite", result)
    counted = config.model_copy(update={"sequence_length": step.document_length})  # no token sees more of the others
    return result | timeline(activities) | utilisation(counted, tokens / seconds, context)


def free_memory() -> None:
    """Frees what parts before this one held: a model whose micro-step is recorded is in a cycle with its graphs, and
    with 32 sequences two of them need twice 40 GiB."""
    gc.collect()
    torch.cuda.empty_cache()


def utilisation(config: ModelConfig, tokens_per_second: float, context: Context) -> dict[str, float]:
    """Model FLOPs a second over the measured ceiling, and over the data sheet's where the card is known."""
    from model.costs import training_flops_per_token
    from pretrain.planning.devices import device_of_card

    rate = tokens_per_second * training_flops_per_token(config)
    found = {"flops_of_ceiling": round(rate / ceilings(context)[1], 4)}
    if context.device.type == "cuda":
        known = device_of_card(torch.cuda.get_device_name(context.device))
        peak = known.flops["bf16"] if known is not None else None
        if peak is not None:
            found["mfu"] = round(rate / peak.value, 4)
    return found


class Step:
    """The model, a batch on the device, and one micro-step of it; gradients are dropped before each."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        sequences: int,
        backend: str = "auto",
        *,
        has_documents: bool = False,
    ) -> None:
        """`has_documents`: three of about equal length in a sequence, with other borders in each."""
        self.device = device
        self.model: LanguageModel = models.build(config, device, torch.bfloat16, backend).train()
        shape = (sequences, config.sequence_length)
        self.tokens, self.targets = (torch.randint(0, config.vocab_size, shape, device=device) for _ in range(2))
        self.index = torch.arange(sequences, device=device)
        self.document_length = -(-config.sequence_length // 3) if has_documents else config.sequence_length
        places = torch.arange(config.sequence_length, device=device) + 37 * self.index[:, None]
        self.documents: tuple[Tensor, ...] = (places // self.document_length,) if has_documents else ()
        self.loss: Tensor = torch.zeros((), device=device)
        chunks = config.memory_length // config.sequence_length
        forward = functools.partial(self.model, self.tokens, self.targets, self.index)
        models.fill_memory(self.model, self.index, chunks, forward)

    def record(self) -> None:
        """From now on micro-steps are CUDA graphs. Gradients are dropped before the next one writes them."""
        from pretrain.device import graph_maker
        from pretrain.engine.graphed import GraphedForward

        self.model.forward = GraphedForward(  # type: ignore[method-assign, assignment]
            self.model, graph_maker(self.device), taken_at_once=True
        )

    def compile(self) -> None:
        """From now on torch.compile computes the blocks; the next call compiles them."""
        from pretrain.engine.compiled import compile_blocks

        compile_blocks(self.model, self.model.config)

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        objective, _, _ = self.model(self.tokens, self.targets, self.index, *self.documents)
        objective.backward()
        self.loss = objective.detach()

    def timed(self) -> tuple[float, float]:
        """Seconds until the device is done, and until the host has launched everything."""
        self._wait()
        begin = time.perf_counter()
        self()
        launched = time.perf_counter()
        self._wait()
        return time.perf_counter() - begin, launched - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def profiled(step: Step) -> list[Activity]:
    """What one step did on the device, by torch's profiler; on a CPU its operators, to test this."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        step.timed()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return [
        Activity(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == wanted and (on_gpu or event.cpu_parent is None)
    ]


def timeline(activities: Sequence[Activity]) -> dict[str, Any]:
    """Milliseconds in which the device was busy, idle between its first and its last activity, and by kernel."""
    if not activities:
        return {"launches": 0, "busy_ms": 0.0, "idle_ms": 0.0, "gaps": 0, "kernels": []}
    pieces = list(union((a.start, a.end) for a in activities))
    span = pieces[-1][1] - pieces[0][0]
    busy = sum(end - start for start, end in pieces)
    by_name: dict[str, list[float]] = {}
    for activity in activities:
        by_name.setdefault(activity.name, []).append(activity.end - activity.start)
    costliest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:COSTLIEST]
    return {
        "launches": len(activities),
        "busy_ms": round(busy / 1e3, 3),
        "idle_ms": round((span - busy) / 1e3, 3),
        "gaps": len(pieces) - 1,
        "kernels": [{"name": n[:120], "calls": len(us), "ms": round(sum(us) / 1e3, 3)} for n, us in costliest],
    }


def union(intervals: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Disjoint intervals in order that cover the same; those that touch are one."""
    current: tuple[float, float] | None = None
    for start, end in sorted(intervals):
        if current is None:
            current = start, end
        elif start <= current[1]:
            current = current[0], max(current[1], end)
        else:
            yield current
            current = start, end
    if current is not None:
        yield current


def main(arguments: Sequence[str]) -> int:
    name, sequences, device, *layers = arguments
    config = models.load(name, **({"num_layers": int(layers[0])} if layers else {}))
    with models.as_in_training(torch.device(device)):
        Step(config, torch.device(device), int(sequences)).timed()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
