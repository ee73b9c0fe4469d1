"""Implementations of one op, timed in turns: what benchmarks.kernels, kernels_switchhead and moe_layers share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.rounds import seconds
from common.tables import text_table

MM_SIZE = 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """One implementation: `forward` gives what is differentiated, `inputs` what for. Gradients of ones."""

    name: str
    forward: Callable[[], Tensor]
    inputs: Sequence[Tensor]


class Suite(NamedTuple):
    """Implementations of one op at one shape and dtype."""

    shape: str
    forward_flops: int
    """Useful multiply-adds of the forward pass, times two; the backward pass has twice as many."""
    cases: list[Case]
    peak_memory: bool = False
    """Also measure the growth of the resident set, in one process per implementation."""
    before_round: Callable[[], object] = lambda: None
    """Draws inputs anew, where time depends on them: oneDNN builds a program for every number of rows that is new, and
    in training an expert gets another number in every step."""


class Timed(NamedTuple):
    """Seconds of one suite, by round."""

    mm: list[float]
    """Of torch.mm of two square matrices of MM_SIZE."""
    forward: dict[str, list[float]]
    both: dict[str, list[float]]
    """Forward and backward."""

    @property
    def mm_rate(self) -> float:
        """Flop/s, of the median round."""
        return mm_flops() / statistics.median(self.mm)


def mm_flops() -> int:
    return 2 * MM_SIZE**3


def measure(suite: Suite, dtype: torch.dtype, rounds: int) -> Timed:
    """All cases in turn, round after round; the first round warms up and is not counted."""
    a, out = torch.randn(MM_SIZE, MM_SIZE).to(dtype), torch.empty(MM_SIZE, MM_SIZE, dtype=dtype)
    timed = Timed([], {case.name: [] for case in suite.cases}, {case.name: [] for case in suite.cases})
    for number in range(rounds + 1):
        suite.before_round()
        start = seconds()
        torch.mm(a, a, out=out)
        product = seconds() - start
        found = [time_case(case) for case in suite.cases]
        if number:
            timed.mm.append(product)
            for case, (forward, both) in zip(suite.cases, found, strict=True):
                timed.forward[case.name].append(forward)
                timed.both[case.name].append(both)
    return timed


def time_case(case: Case) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes. The gradient from above is made between them."""
    start = seconds()
    y = case.forward()
    forward = seconds() - start
    gradient = torch.ones_like(y)
    start = seconds()
    torch.autograd.grad(y, case.inputs, gradient, allow_unused=True)
    return forward, forward + seconds() - start


def rows(suite: Suite, timed: Timed) -> list[dict[str, Any]]:
    """For each implementation medians over rounds, and their shares of torch.mm's rate."""
    lines = []
    for name in timed.both:
        forward, both = statistics.median(timed.forward[name]), statistics.median(timed.both[name])
        lines.append(
            {
                "implementation": name,
                "forward_ms": 1e3 * forward,
                "forward_backward_ms": 1e3 * both,
                "forward_share_of_mm": suite.forward_flops / forward / timed.mm_rate,
                "forward_backward_share_of_mm": 3 * suite.forward_flops / both / timed.mm_rate,
            }
        )
    return lines


def print_table(title: str, suite: Suite, found: list[dict[str, Any]], mm_rate: float) -> None:
    """`found`: of `rows`, with `peak_memory_mb` where it was measured."""
    print(f"\n{title}, {suite.shape}, {torch.get_num_threads()} threads; torch.mm {mm_rate / 1e9:.0f} GF/s")
    lines = []
    for row in found:
        line = [row["implementation"]]
        for phase in ("forward", "forward_backward"):
            line += [f"{row[f'{phase}_ms']:.1f} ms", f"{row[f'{phase}_share_of_mm']:.1%}"]
        lines.append([*line, f"{row['peak_memory_mb']:.0f} MB" if "peak_memory_mb" in row else ""])
    header = ["implementation", "forward", "of mm", "fwd + bwd", "of mm", "peak memory"]
    print(text_table(header, lines), flush=True)


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    """Gaussian with the variance of a layer that keeps it: 1 / sqrt of the last but one width for weights."""
    scale = shape[-2] ** -0.5 if len(shape) == 3 else (1.0 if len(shape) == 1 else shape[-1] ** -0.5)
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()
