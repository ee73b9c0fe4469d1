"""Ops of model/kernels on CPU beside other implementations of the same work, and torch.mm as the limit.

    python -m benchmarks.kernels [--op NAME] [--quick] [--threads 2] [--rounds 15]
    python -m benchmarks.kernels --op sigma_moe --keep      # the record moe-layers of docs/benchmarks.md

All implementations of one op and dtype run in turn, round after round, so that a slow phase of a shared machine hits
all of them alike; the table shows medians over rounds. Ratios to torch.mm, taken in the same rounds, are what counts.
A new op joins by an entry in SUITES.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import model.openmp  # noqa: F401  # as in training; before torch

# isort: split

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import moe_layers, records
from benchmarks.timed_cases import DTYPES, Case, Suite, measure, normal, print_table, rows
from common.arguments import at_least
from common.resident import forget_peak, resident_bytes
from model.kernels.backend import BACKENDS
from model.kernels.ops.expert_linear import expert_linear, expert_linear_sum
from model.kernels.ops.linear_cross_entropy import linear_cross_entropy
from model.kernels.ops.route import Choice, route

ON_CPU = {op: [name for name in names if name not in ("triton", "cuda")] for op, names in BACKENDS.items()}


def route_suites(dtype: torch.dtype, quick: bool) -> list[Suite]:
    N, d, R, E, k = (512, 128, 1, 8, 2) if quick else (4096, 512, 1, 16, 4)
    x, weight = normal(dtype, N, d), normal(dtype, R, E, d)

    def scores(backend: str) -> Tensor:
        return route(x, weight, k, backend=backend).scores

    cases = [Case(f"ours, {backend}", partial(scores, backend), (x, weight)) for backend in ON_CPU["route"]]
    return [Suite(f"T={N} d={d} R={R} E={E} k={k}", 2 * N * R * E * d, cases)]


def expert_linear_suites(dtype: torch.dtype, quick: bool) -> list[Suite]:
    """MoA's query and output projections, one after the other; the choice is given. The loop is over experts."""
    N, d, h, E, k = (512, 128, 64, 8, 2) if quick else (2048, 416, 88, 10, 4)
    x, query, output, gates = (normal(dtype, *size) for size in ((N, d), (E, d, h), (E, h, d), (N, k)))
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
    return [Suite(f"T={N} d={d} h={h} E={E} k={k}", 2 * 2 * N * k * d * h, cases)]


def linear_cross_entropy_suites(dtype: torch.dtype, quick: bool) -> list[Suite]:
    N, d, V = (1024, 128, 8000) if quick else (8192, 512, 32000)
    hidden, weight, bias = normal(dtype, N, d), normal(dtype, V, d), normal(dtype, V)
    targets = torch.randint(0, V, (N,))
    inputs = (hidden, weight, bias)

    def losses(backend: str) -> Tensor:
        return linear_cross_entropy(hidden, weight, bias, targets, backend=backend)[0]

    cases = [Case(f"ours, {backend}", partial(losses, backend), inputs) for backend in ON_CPU["linear_cross_entropy"]]
    plain = Case("plain", lambda: F.cross_entropy(F.linear(hidden, weight, bias).float(), targets), inputs)
    return [Suite(f"T={N} d={d} V={V}", 2 * N * d * V, [*cases, plain], peak_memory=True)]


SUITES: dict[str, Callable[[torch.dtype, bool], Iterable[Suite]]] = {
    "sigma_moe": moe_layers.sigma_moe_suites,
    "route": route_suites,
    "expert_linear": expert_linear_suites,
    "linear_cross_entropy": linear_cross_entropy_suites,
}
"""Op -> from a dtype, and whether small shapes will do, to suites."""


def build_suites(op: str, dtype: torch.dtype, quick: bool) -> Iterable[Suite]:
    torch.manual_seed(0)
    return SUITES[op](dtype, quick)


def peak_memory_mb(op: str, dtype: str, name: str, options: argparse.Namespace) -> float:
    """Growth of the peak resident set over one forward + backward, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--op", op, "--dtype", dtype, "--peak-of", name]
    command += ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(options: argparse.Namespace) -> None:
    suites = build_suites(options.op, DTYPES[options.dtype], options.quick)
    (case,) = (case for suite in suites for case in suite.cases if case.name == options.peak_of)
    if not forget_peak():
        print(math.nan)  # this system, or the sandbox, does not tell it
        return
    before, _ = resident_bytes()
    torch.autograd.grad(case.forward(), case.inputs)
    print((resident_bytes()[1] - before) / 2**20)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints a table for each op, dtype and shape. Returns what is kept of each suite of sigma_moe."""
    kept = []
    for op in [options.op] if options.op else SUITES:
        for dtype in [options.dtype] if options.dtype else DTYPES:
            for suite in build_suites(op, DTYPES[dtype], options.quick):
                work = moe_layers.checked_work(suite, DTYPES[dtype]) if op == "sigma_moe" else None
                timed = measure(suite, DTYPES[dtype], options.rounds)
                found = rows(suite, timed)
                for row in found if suite.peak_memory else ():
                    row["peak_memory_mb"] = peak_memory_mb(op, dtype, row["implementation"], options)
                print_table(f"{op} {dtype}", suite, found, timed.mm_rate)
                if work is not None:
                    kept.append(moe_layers.to_json(suite, dtype, work, timed))
    return kept


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=SUITES, help="one op; default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="default: all")
    parser.add_argument("--quick", action="store_true", help="small shapes: checks that everything runs")
    parser.add_argument("--threads", type=at_least(1), help="default: 1 with --keep, else 2")
    parser.add_argument("--rounds", type=at_least(1), default=15, help="default: %(default)s")
    parser.add_argument("--peak-of", metavar="NAME", help=argparse.SUPPRESS)
    records.add_option(parser)
    options = parser.parse_args(arguments)
    if options.keep is not None and options.op != "sigma_moe":
        parser.error("--keep keeps the layers of sigma-MoE; add --op sigma_moe")
    if options.threads is None:
        options.threads = 2 if options.keep is None else 1
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options)
        return
    about = records.machine()
    kept = run(options)
    if options.keep is not None:
        settings = {"threads": options.threads, "rounds": options.rounds}
        records.keep(options.keep, "moe-layers", about, {"suites": kept, **settings})


if __name__ == "__main__":
    main()
