"""A micro-step with the tiles that `tune` found the fastest on this card, beside the same one with today's.

Two models of the same numbers stand in one process, each recorded as CUDA graphs, one while the winners are in the
table of measured tiles. Rounds of both alternate, so that the ratio is not one of two moments of the card.

Before they are timed, loss and gradients of the first micro-step are compared. A tile changes roundings, and roundings
decide near ties of the routers: where they may, gradients of a deep model have nothing in common. So all routers choose
what they chose with today's tiles. Then a gradient may be off by the tolerance of an op, or by twice what flipping the
last bit of every number of the embedding does to it, if that is more (eight layers: 0.1 of it).
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import models, winners
from benchmarks.gpu.command import Context, Failed, Part
from benchmarks.gpu.equality import TOLERANCE, errors, furthest
from benchmarks.gpu.micro_step import Step, free_memory, name_of, profiled, timeline, utilisation
from model.kernels.ops import route
from model.kernels.triton.tiles import Entry, placed

if TYPE_CHECKING:
    from model.config import ModelConfig

ROUNDS = 7
ALL = [("tuned", 8), ("tuned", 16), ("tuned", 32), ("tuned sets", 8)]
TINY = [("tuned", 1)]


def parts(*, tiny: bool) -> Iterator[Part]:
    for name in ("tiny",) if tiny else ("1b", "262m"):
        for kind, sequences in TINY if tiny else ALL:
            one = functools.partial(compute, name=name, sequences=sequences, kind=kind)
            yield Part(name_of(name, sequences, kind=kind), one, 30.0)


def compute(context: Context, *, name: str, sequences: int, kind: str) -> dict[str, Any]:
    """As a micro-step, of the tuned one; `today`: the same of the other; `ratio`: of their times. `errors`: how far
    loss and gradients are from today's. Unavailable where tune has found nothing faster, or nothing at all."""
    entries = winners.of_here(context)
    with models.as_in_training(context.device):
        return _measured(context, name, sequences, kind, entries)


def _measured(context: Context, name: str, sequences: int, kind: str, entries: list[Entry]) -> dict[str, Any]:
    config = models.load(name, **({"num_layers": 1} | models.SHORT if context.tiny else {}))
    on_gpu = context.device.type == "cuda"
    backend = "sets" if "sets" in kind else "triton" if context.tiny else "auto"
    if on_gpu:
        free_memory()

    def new() -> Step:
        return Step(config, context.device, sequences, backend)

    today, tuned, choices = new(), new(), list[Tensor]()
    if on_gpu:
        for step in (today, tuned):
            step.record()
    with choosing(choices):
        wanted = outcome(today)
    with choosing(choices, again=True):
        noise = outcome(nudged(new()))
    with placed(entries) as table, choosing(choices, again=True):
        found = outcome(tuned)
    result: dict[str, Any] = {
        "tokens": sequences * config.sequence_length,
        "parameters": sum(p.numel() for p in tuned.model.parameters()),
        "tiles": winners.launched(entries, table),
        "not_launched": sorted({entry.kernel for entry in entries if entry.key not in table.used}),
    }
    result["errors"], wrong = compared(found, wanted, noise)
    del found, wanted, noise, choices
    if on_gpu:
        free_memory()  # what was launched one by one leaves its memory to the graphs

    def timed(step: Step) -> tuple[float, float]:
        with placed(entries if step is tuned else ()):
            return step.timed()

    for step in (today, tuned):  # with graphs the first was launched, the second is recorded
        timed(step)
        timed(step)
    both = [(timed(today), timed(tuned)) for _ in range(2 if context.tiny else ROUNDS)]
    before, after = (statistics.median(walls) for walls in zip(*((t[0], u[0]) for t, u in both), strict=True))
    with placed(entries):
        activities = profiled(tuned)
    result |= _speed(context, config, result["tokens"], after) | timeline(activities)
    result["host_ms"] = round(1e3 * statistics.median(u[1] for _, u in both), 3)
    result["today"] = _speed(context, config, result["tokens"], before)
    result["ratio"] = round(after / before, 4)
    if wrong:  # with its times: a card that is lent for minutes is not there to measure again
        raise Failed("; ".join(wrong), result)
    if not result["tiles"] and not context.tiny:
        raise Failed("the micro-step launches none of the kernels for which tune has found other tiles", result)
    return result


def _speed(context: Context, config: ModelConfig, tokens: int, seconds: float) -> dict[str, float]:
    found = {"wall_ms": round(1e3 * seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}
    return found | utilisation(config, tokens / seconds, context)


@contextlib.contextmanager
def choosing(choices: list[Tensor], *, again: bool = False) -> Iterator[None]:
    """Notes in `choices` which experts the routers choose; or they choose those `again`, whatever their scores, which
    they still compute."""
    implementation, left = route.implementation, iter(list(choices))

    def of(op: str, backend: str) -> Any:
        module = implementation(op, backend)
        if op != "route":
            return module

        def forward(x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool) -> tuple[Tensor, ...]:
            own = route.Routing(*module.forward(x, weight, keep, k, drop_scores))
            if not again:
                choices.append(own.index.clone())
                return tuple(own)
            return tuple(route.with_choice(own, next(left).clone(), keep=keep, drop_scores=drop_scores))

        return types.SimpleNamespace(**vars(module) | {"forward": forward})

    with mock.patch.object(route, "implementation", of):
        yield


def nudged(step: Step) -> Step:
    """With the last bit of every number of the embedding the other one."""
    with torch.no_grad():
        for parameter in step.model.embedding.parameters():
            parameter.view(torch.int16).bitwise_xor_(1)
    return step


def outcome(step: Step) -> dict[str, Tensor]:
    """Loss and gradients of one micro-step."""
    step()
    gradients = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
    return {"loss": step.loss.clone()} | gradients


def compared(
    found: dict[str, Tensor], wanted: dict[str, Tensor], noise: dict[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """How far the loss and the worst gradient are off, beside what they may be; and in words what is too far."""
    tolerance = TOLERANCE[torch.bfloat16]
    off, of_noise = errors(found, wanted), errors(noise, wanted)
    limits = {name: max(tolerance, 0.0 if name == "loss" else 2 * of_noise[name]) for name in off}
    worst = furthest(off, limits)
    wrong = [f"{n} is off by {off[n]:.1e}, more than {limits[n]:.1e}" for n in off if not off[n] <= limits[n]]
    return {"loss": off["loss"], "worst": worst, "error": off[worst], "limit": limits[worst]}, wrong[:5]
