"""The sigma-MoE layer with its router beside other projects' layers: what `benchmarks.kernels --op sigma_moe` times.

Before the layers of one shape are timed, `checked_work` makes sure that they do the same work: as many parameters, at
least the useful multiply-accumulates, and the same numbers where the mathematics is the same (ours and F.grouped_mm).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers
from benchmarks.marked import markdown
from benchmarks.pictures import picture
from benchmarks.rounds import ratio
from benchmarks.timed_cases import Case, Suite, Timed, mm_flops, normal
from model.kernels.ops.route import Choice, route
from model.kernels.ops.sigma_moe import HeldExperts, sigma_moe


class Shape(NamedTuple):
    """Of one layer."""

    tokens: int
    d_model: int
    num_experts: int
    active_experts: int
    expert_size: int

    @property
    def macs(self) -> int:
        """Useful ones, forward: two products per token and chosen expert. Routers come on top."""
        return 2 * self.tokens * self.active_experts * self.d_model * self.expert_size


SHAPES = {"47M": Shape(2048, 416, 16, 4, 128), "259M": Shape(2048, 1024, 32, 4, 128)}
"""The feed-forward layers of configs/paper/c4_switchall_47m.json and c4_switchall_259m.json. 416 is 412 there:
F.grouped_mm refuses bf16 rows that do not begin at multiples of 16 bytes."""
QUICK = {"quick": Shape(512, 128, 8, 2, 64)}
OURS = "ours, cpu"
PLAIN = "F.grouped_mm"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative, in the Frobenius norm."""


def sigma_moe_suites(dtype: torch.dtype, quick: bool) -> Iterator[Suite]:
    """One after the other, so that only one of them needs memory."""
    for name, shape in (QUICK if quick else SHAPES).items():
        yield suite_of(name, shape, dtype)


def suite_of(name: str, shape: Shape, dtype: torch.dtype) -> Suite:
    """Whole layers with their routers: the flops counted are those of the experts alone."""
    N, d, E, k, G = shape
    x, router = normal(dtype, N, d), normal(dtype, E, d)
    up, down = normal(dtype, E, d, G), normal(dtype, E, G, d)
    inputs = (x, router, up, down)
    cases = [
        Case(f"ours, {backend}", partial(our_layer, *inputs, k, backend), inputs)
        for backend in ("cpu", "grouped_mm", "reference")
    ]
    plain = peers.grouped_mm(router, up, down, k)
    cases.append(Case(PLAIN, partial(plain, x), inputs))
    for peer, build in (
        ("DeepSpeed MoE", peers.deepspeed_moe),
        ("megatron-core SequentialMLP", peers.megatron_sequential_mlp),
    ):
        layer, parameters = build(d, E, G, k, dtype)
        cases.append(Case(peer, partial(layer, x), [x, *parameters]))

    def new_tokens() -> None:
        with torch.no_grad():
            x.copy_(normal(dtype, N, d))

    return Suite(f"{name}: T={N} d={d} E={E} k={k} expert {G}", 2 * shape.macs, cases, before_round=new_tokens)


def our_layer(x: Tensor, router: Tensor, up: Tensor, down: Tensor, k: int, backend: str) -> Tensor:
    """`x` [N, d], `router` [E, d], `up` [E, d, G], `down` [E, G, d] -> [N, d]."""
    r = route(x, router[None], k, backend="reference" if backend == "reference" else "cpu")
    choice = Choice(r.scores[:, 0], r.index[:, 0], r.order[0], r.load[0])
    return sigma_moe(x, choice, HeldExperts(up, down), backend=backend)


class Work(NamedTuple):
    """What the layers of one suite do, by their names."""

    parameters: dict[str, int]
    macs: dict[str, int]
    """Multiply-accumulates of matrix products, forward: as torch counts what it runs, and for ours by the formula that
    the op gives torch."""
    difference: float
    """Between our backends and F.grouped_mm: the largest of the output and of every gradient, relative."""


def checked_work(suite: Suite, dtype: torch.dtype) -> Work:
    """Raises ValueError if the layers of the suite do not do the same work."""
    cases = {case.name: case for case in suite.cases}
    parameters = {name: sum(p.numel() for p in case.inputs[1:]) for name, case in cases.items()}
    work = Work(parameters, {name: counted_macs(case) for name, case in cases.items()}, 0.0)
    if len(set(parameters.values())) != 1:
        raise ValueError(f"{suite.shape}: the layers have different numbers of parameters: {parameters}")
    if min(work.macs.values()) < suite.forward_flops // 2:
        raise ValueError(f"{suite.shape}: a layer computes less than {suite.forward_flops // 2} MACs: {work.macs}")
    for name in filter(lambda name: name.startswith("ours"), cases):
        found = difference(cases[name], cases[PLAIN])
        if not found <= TOLERANCE[dtype]:
            raise ValueError(f"{suite.shape}: {name} and {PLAIN} differ by {found:.1e}")
        work = work._replace(difference=max(work.difference, found))
    return work


def counted_macs(case: Case) -> int:
    def grouped(a: torch.Size, b: torch.Size, *args: object, **kwargs: object) -> int:
        """Every row of `a` [n, d] meets one of the matrices `b` [E, d, w]."""
        return 2 * a[0] * b[1] * b[2]

    formulas = {torch.ops.aten._grouped_mm: grouped}  # torch has none
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        case.forward()
    return int(counter.get_total_flops()) // 2


def difference(one: Case, other: Case) -> float:
    """The largest relative difference, in the Frobenius norm, between outputs and between gradients."""
    found = []
    for case in (one, other):
        y = case.forward()
        weight = torch.linspace(-1.0, 1.0, y.numel()).view_as(y).to(y.dtype)
        found.append([y.detach(), *torch.autograd.grad(y, case.inputs, weight)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*([t.double() for t in f] for f in found), strict=True))


def to_json(suite: Suite, dtype: str, work: Work, timed: Timed) -> dict[str, Any]:
    """What is kept of a suite. Seconds by round."""
    cases = {
        name: {
            "forward_seconds": timed.forward[name],
            "seconds": timed.both[name],
            "macs": work.macs[name],
            "parameters": work.parameters[name],
        }
        for name in timed.both
    }
    return {
        "shape": suite.shape,
        "dtype": dtype,
        "useful_macs": suite.forward_flops // 2,
        "mm_seconds": timed.mm,
        "mm_flops": mm_flops(),
        "difference": work.difference,
        "cases": cases,
    }


def share_of_mm(suite: Any, name: str) -> float:
    """Of a kept suite: time that torch.mm would take for the useful work, forward and backward, over the layer's; the
    median over rounds."""
    flops = 6 * suite["useful_macs"]
    ideal = [flops / suite["mm_flops"] * seconds for seconds in suite["mm_seconds"]]
    return ratio(ideal, suite["cases"][name]["seconds"])


def page(found: Any) -> str:
    """The table of docs/benchmarks.md: medians, ratios in time to ours of the same round."""
    lines = []
    for suite in found["suites"]:
        own = suite["cases"][OURS]
        for name, case in suite["cases"].items():
            times = [f"{1e3 * statistics.median(case[key]):.1f}" for key in ("forward_seconds", "seconds")]
            to_ours = ratio(case["seconds"], own["seconds"])
            macs = case["macs"] / suite["useful_macs"]
            line = [suite["shape"], suite["dtype"], name, *times, f"{to_ours:.2f}"]
            lines.append([*line, f"{share_of_mm(suite, name):.0%}", f"{macs:.2f}"])
    header = ["shape", "dtype", "layer", "forward ms", "forward + backward ms", "time to ours", "of torch.mm"]
    table = markdown([*header, "MACs to useful"], lines)
    differences = [f"{suite['dtype']} {suite['difference']:.0e}" for suite in found["suites"]]
    return (
        f"{table}\n\nThreads: {found['threads']}; medians of {found['rounds']} rounds. Output and gradients of "
        f"ours and of {PLAIN} differ by at most these shares: {', '.join(differences)}."
    )


def draw(found: Any, path: Path) -> None:
    """PNG: for each shape and dtype the layers' shares of torch.mm's rate, forward and backward."""
    suites = found["suites"]
    with picture(path, len(suites), (3.2 * len(suites) + 1.2, 2.9), sharey=True) as (figure, axes):
        for axis, suite in zip(axes, suites, strict=True):
            names = list(suite["cases"])
            shares = [100 * share_of_mm(suite, name) for name in names]
            colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
            axis.bar_label(axis.barh(names, shares, color=colours), fmt="%.0f", fontsize=8, padding=2)
            axis.set_title(f"{suite['shape'].partition(':')[0]}, {suite['dtype']}", fontsize=10)
            axis.margins(x=0.15)
        axes[0].invert_yaxis()
        figure.supxlabel("% of torch.mm's rate, forward and backward, useful work alone", fontsize=9)
