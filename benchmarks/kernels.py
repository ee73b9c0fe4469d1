"""Ops of model/kernels on CPU beside other implementations of the same work, and torch.mm as the limit.

    python -m benchmarks.kernels [--op NAME] [--quick] [--threads 2] [--rounds 15] [--json]

All implementations of one op and dtype run in turn, round after round, so that a slow phase of a shared machine hits
all of them alike; the table shows medians over rounds. Ratios to torch.mm, taken in the same rounds, are what counts.
A new op joins by an entry in SUITES.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron-core's router compiles a function that needs CUDA

import model.openmp  # noqa: F401  # as in training; before torch

# isort: split

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from model.kernels.backend import BACKENDS
from model.kernels.ops.expert_linear import expert_linear, expert_linear_sum
from model.kernels.ops.linear_cross_entropy import linear_cross_entropy
from model.kernels.ops.route import Choice, route
from model.kernels.ops.sigma_moe import HeldExperts, sigma_moe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ON_CPU = {op: [name for name in names if name not in ("triton", "cuda")] for op, names in BACKENDS.items()}


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
    backward: bool = True
    peak_memory: bool = False
    """Also measure the growth of the resident set, in one process per implementation."""


def sigma_moe_suite(dtype: torch.dtype, quick: bool) -> Suite:
    """A whole layer with its router: the flops counted are those of the experts alone."""
    N, d, E, k, G = (512, 128, 8, 2, 64) if quick else (4096, 512, 16, 4, 128)
    x, router = _normal(dtype, N, d), _normal(dtype, E, d)
    up, down = _normal(dtype, E, d, G), _normal(dtype, E, G, d)
    inputs = (x, router, up, down)

    def ours(backend: str) -> Callable[[], Tensor]:
        router_backend = backend if backend in ON_CPU["route"] else "cpu"

        def forward() -> Tensor:
            r = route(x, router[None], k, backend=router_backend)
            choice = Choice(r.scores[:, 0], r.index[:, 0], r.order[0], r.load[0])
            return sigma_moe(x, choice, HeldExperts(up, down), backend=backend)

        return forward

    cases = [Case(f"ours, {backend}", ours(backend), inputs) for backend in ("cpu", "grouped_mm", "reference")]
    plain = peers.grouped_mm(router, up, down, k)
    cases.append(Case("F.grouped_mm", lambda: plain(x), inputs))
    for name, build in (
        ("DeepSpeed MoE", peers.deepspeed_moe),
        ("megatron-core SequentialMLP", peers.megatron_sequential_mlp),
    ):
        layer, parameters = build(d, E, G, k, dtype)
        cases.append(Case(name, partial(layer, x), [x, *parameters]))
    return Suite(f"T={N} d={d} E={E} k={k} expert {G}", 2 * 2 * N * k * d * G, cases)


def route_suite(dtype: torch.dtype, quick: bool) -> Suite:
    N, d, R, E, k = (512, 128, 1, 8, 2) if quick else (4096, 512, 1, 16, 4)
    x, weight = _normal(dtype, N, d), _normal(dtype, R, E, d)

    def scores(backend: str) -> Tensor:
        return route(x, weight, k, backend=backend).scores

    cases = [Case(f"ours, {backend}", partial(scores, backend), (x, weight)) for backend in ON_CPU["route"]]
    return Suite(f"T={N} d={d} R={R} E={E} k={k}", 2 * N * R * E * d, cases)


def expert_linear_suite(dtype: torch.dtype, quick: bool) -> Suite:
    """MoA's query and output projections, one after the other; the choice is given. The loop is over experts."""
    N, d, h, E, k = (512, 128, 64, 8, 2) if quick else (2048, 416, 88, 10, 4)
    x, query, output, gates = (_normal(dtype, *size) for size in ((N, d), (E, d, h), (E, h, d), (N, k)))
    index = torch.rand(N, E).topk(k).indices
    load, order = index.flatten().bincount(minlength=E), index.flatten().sort(stable=True).indices
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(N * k))

    def ours(backend: str) -> Tensor:
        choice = Choice(gates, index, order, load)
        q = expert_linear(x, choice, query, backend=backend)
        return expert_linear_sum(q, choice, output, backend=backend)

    def grouped_mm() -> Tensor:
        offsets = load.cumsum(0).int()
        q = F.grouped_mm(x[order // k], query, offs=offsets)
        rows = F.grouped_mm(q * gates.flatten()[order, None], output, offs=offsets)
        return rows[slots].view(N, k, d).sum(1)

    def loop() -> Tensor:
        y = torch.zeros_like(x)
        for e in range(E):
            token, choice = (index == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, (x[token] @ query[e] * gates[token, choice, None]) @ output[e])
        return y

    inputs = (x, query, output, gates)
    cases = [Case(f"ours, {b}", partial(ours, b), inputs) for b in ON_CPU["expert_linear"]]
    cases += [Case("F.grouped_mm", grouped_mm, inputs), Case("loop over experts", loop, inputs)]
    return Suite(f"T={N} d={d} h={h} E={E} k={k}", 2 * 2 * N * k * d * h, cases)


def linear_cross_entropy_suite(dtype: torch.dtype, quick: bool) -> Suite:
    N, d, V = (1024, 128, 8000) if quick else (8192, 512, 32000)
    hidden, weight, bias = _normal(dtype, N, d), _normal(dtype, V, d), _normal(dtype, V)
    targets = torch.randint(0, V, (N,))
    inputs = (hidden, weight, bias)

    def losses(backend: str) -> Tensor:
        return linear_cross_entropy(hidden, weight, bias, targets, backend=backend)[0]

    cases = [
        Case(
            f"ours, {backend}",
            partial(losses, backend),
            inputs,
        )
        for backend in ON_CPU["linear_cross_entropy"]
    ]
    plain = Case("plain", lambda: F.cross_entropy(F.linear(hidden, weight, bias).float(), targets), inputs)
    return Suite(f"T={N} d={d} V={V}", 2 * N * d * V, [*cases, plain], peak_memory=True)


SUITES: dict[str, str] = {
    "sigma_moe": "benchmarks.kernels:sigma_moe_suite",
    "route": "benchmarks.kernels:route_suite",
    "expert_linear": "benchmarks.kernels:expert_linear_suite",
    "linear_cross_entropy": "benchmarks.kernels:linear_cross_entropy_suite",
}
"""op -> module:function, the function from (dtype, quick) to a Suite. Resolved when the op is asked for."""


def build_suite(op: str, dtype: torch.dtype, quick: bool) -> Suite:
    module, function = SUITES[op].split(":")
    torch.manual_seed(0)
    return getattr(importlib.import_module(module), function)(dtype, quick)


def measure(suite: Suite, dtype: torch.dtype, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of the table and torch.mm's rate in flop/s; the first round warms up and is not counted."""
    size = 2048
    a, out = torch.randn(size, size).to(dtype), torch.empty(size, size, dtype=dtype)
    mm_seconds: list[float] = []
    seconds: dict[str, list[tuple[float, float]]] = {case.name: [] for case in suite.cases}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        mm_seconds.append(time.perf_counter() - start)
        for case in suite.cases:
            start = time.perf_counter()
            y = case.forward()
            forward = time.perf_counter() - start
            torch.autograd.grad(y, case.inputs, torch.ones_like(y), allow_unused=True)
            seconds[case.name].append((forward, time.perf_counter() - start))
            del y
    mm_rate = 2 * size**3 / statistics.median(mm_seconds[1:])
    rows = []
    for name, pairs in seconds.items():
        forward, total = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        rows.append(
            {
                "implementation": name,
                "forward_ms": 1e3 * forward,
                "forward_backward_ms": 1e3 * total,
                "forward_share_of_mm": suite.forward_flops / forward / mm_rate,
                "forward_backward_share_of_mm": 3 * suite.forward_flops / total / mm_rate,
            }
        )
    return rows, mm_rate


def peak_memory_mb(op: str, dtype: str, name: str, options: argparse.Namespace) -> float:
    """Growth of the peak resident set over one forward + backward, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--op", op, "--dtype", dtype, "--peak-of", name]
    command += ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(options: argparse.Namespace) -> None:
    suite = build_suite(options.op, DTYPES[options.dtype], options.quick)
    (case,) = (case for case in suite.cases if case.name == options.peak_of)
    # Not getrusage: its maximum is inherited from the process that started this one.
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    before = _status_mb("VmRSS")
    torch.autograd.grad(case.forward(), case.inputs)
    print(_status_mb("VmHWM") - before)


def _status_mb(field: str) -> float:
    """A memory field of this process, Linux only."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One dict per op, dtype and implementation; prints the tables on the way unless --json."""
    results = []
    for op in [options.op] if options.op else SUITES:
        for dtype in [options.dtype] if options.dtype else DTYPES:
            suite = build_suite(op, DTYPES[dtype], options.quick)
            rows, mm_rate = measure(suite, DTYPES[dtype], options.rounds)
            for row in rows:
                row |= {"op": op, "dtype": dtype, "shape": suite.shape, "threads": options.threads}
                row["mm_gflops"] = mm_rate / 1e9
                if suite.peak_memory:
                    row["peak_memory_mb"] = peak_memory_mb(op, dtype, row["implementation"], options)
            if not options.json:
                print_table(op, dtype, suite, rows, mm_rate, options.threads)
            results += rows
    return results


def print_table(
    op: str, dtype: str, suite: Suite, rows: list[dict[str, Any]], mm_rate: float, num_threads: int
) -> None:
    print(f"\n{op} {dtype}, {suite.shape}, {num_threads} threads; torch.mm {mm_rate / 1e9:.0f} GF/s")
    print(
        f"{'implementation':30s} {'forward':>12s} {'of mm':>7s} {'fwd + bwd':>12s} {'of mm':>7s} {'peak memory':>12s}"
    )
    for row in rows:
        memory = f"{row['peak_memory_mb']:9.0f} MB" if "peak_memory_mb" in row else ""
        print(
            f"{row['implementation']:30s} {row['forward_ms']:9.1f} ms {row['forward_share_of_mm']:7.1%} "
            f"{row['forward_backward_ms']:9.1f} ms {row['forward_backward_share_of_mm']:7.1%} {memory:>12s}",
            flush=True,
        )


def _normal(dtype: torch.dtype, *shape: int) -> Tensor:
    """Gaussian with the variance of a layer that keeps it: 1 / sqrt of the last but one width for weights."""
    scale = shape[-2] ** -0.5 if len(shape) == 3 else (1.0 if len(shape) == 1 else shape[-1] ** -0.5)
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=SUITES, help="one op; default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="default: all")
    parser.add_argument("--quick", action="store_true", help="small shapes: checks that everything runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", metavar="NAME", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options)
        return
    results = run(options)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
