"""SwitchHead kernels on CPU: the two expert projections per strategy, and the attention layer against the dense one.

    python -m benchmarks.kernels_switchhead [--threads 2] [--quick] [--json]
    python -m benchmarks.kernels_switchhead --only layer --keep    # the record switchhead-layers of docs/benchmarks.md

Every case of a dtype runs in turn, round after round, so that a slow phase of a shared machine hits all of them alike;
the medians and, above all, their ratios are what counts. torch.mm runs in the same rounds as the limit.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model.openmp  # noqa: F401  # as in training; before torch

# isort: split

import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.marked import markdown
from model.attention.dense import DenseAttention
from model.attention.switchhead import SwitchHeadAttention
from model.config import ModelConfig
from model.kernels.choice import Backends
from model.kernels.ops.route import Choice, group_choices
from model.kernels.ops.switchhead import switchhead_output, switchhead_value
from model.parallel.context import ParallelContext

WAYS = (("reference", None), ("cpu", "all"), ("cpu", "sets"), ("cpu", "experts"), ("cpu", None))
"""Backend and strategy; None: what the shape chooses."""
# N tokens, d, H, h, E, k: the published 262M model (the target shape), its two sparser relatives, a sparse one.
SHAPES = {
    "262M": (2048, 1024, 4, 112, 4, 2),
    "47M": (2048, 412, 2, 76, 5, 3),
    "262M-wt103": (2048, 1024, 2, 132, 8, 4),
    "sparse": (2048, 512, 2, 64, 32, 4),
}
PHASES = ("fwd", "fwd+bwd")
MASKED = "switchhead masked einsum"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Bench:
    """Times named callables round after round; a case may time several phases of one call."""

    def __init__(self) -> None:
        # One thread: its CPU time, blind to other processes (autograd runs in the calling thread). More: wall time.
        self.clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self.cases: list[Callable[[], dict[str, float]]] = []
        self.flops: dict[str, float] = {}

    def add(self, name: str, forward: Callable[[], Tensor], inputs: list[Tensor], flops: float) -> None:
        """`forward`, and forward + backward to `inputs` if there are any; `flops` of the forward pass."""
        phases = {f"{name} fwd": flops} | ({f"{name} fwd+bwd": 3 * flops} if inputs else {})
        self.flops |= phases
        gradient = torch.randn_like(forward().detach())

        def case() -> dict[str, float]:
            start = self.clock()
            y = forward()
            middle = self.clock()
            if inputs:
                torch.autograd.grad(y, inputs, gradient)
            return dict(zip(phases, (middle - start, self.clock() - start), strict=False))

        self.cases.append(case)

    def run(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of every phase, by round; one round to warm up."""
        seconds: dict[str, list[float]] = {}
        for i in range(rounds + 1):
            for case in self.cases:
                for name, value in case().items():
                    seconds.setdefault(name, []).append(value)
            if i == 0:
                seconds.clear()
        return seconds


def add_mm(bench: Bench, dtype: torch.dtype, N: int, d: int, width: int) -> None:
    a, b = torch.randn(N, d).to(dtype), torch.randn(d, width).to(dtype)
    bench.add("torch.mm", lambda: a @ b, [], 2.0 * N * d * width)


def bench_ops(
    dtype: torch.dtype, shape: tuple[int, ...], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    N, d, H, h, E, k = shape
    bench = Bench()
    add_mm(bench, dtype, N, d, H * h * k)
    scores, index = torch.rand(N, H, E).topk(k, -1)
    scores.requires_grad_()
    choice = Choice(scores, index, *group_choices(index, E, backend="cpu"))
    wide, narrow = torch.randn(N, d).to(dtype).requires_grad_(), torch.randn(N, H, h).to(dtype).requires_grad_()
    for op, rows, size in ((switchhead_value, wide, (d, h)), (switchhead_output, narrow, (h, d))):
        experts = torch.randn(H, E, *size).to(dtype).requires_grad_()
        for backend, strategy in WAYS:
            forward = functools.partial(op, rows, choice, experts, backend=backend, strategy=strategy)
            name = f"{op.__name__} {backend}" + (f" {strategy}" if strategy else "")
            bench.add(name, forward, [rows, scores, experts], 2.0 * N * H * k * d * h)
    return bench.run(rounds), bench.flops


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Those of the 262M model: d = 1024, RoPE; SwitchHead H=4 h=112 E=4 k=2, dense H=16 h=64."""
    base = {"d_model": 1024, "num_layers": 1, "vocab_size": 4, "sequence_length": 1024}
    switch = ModelConfig.model_validate(
        base
        | {"attention": {"type": "switchhead", "num_heads": 4, "head_dim": 112, "num_experts": 4, "active_experts": 2}}
    )
    dense = ModelConfig.model_validate(base | {"attention": {"type": "dense", "num_heads": 16, "head_dim": 64}})
    fast = Backends(route="cpu", switchhead_value="cpu", switchhead_output="cpu")
    place: dict[str, Any] = {"parallel": ParallelContext(), "name": "attention", "seed": 0}
    found: dict[str, nn.Module] = {
        "dense": DenseAttention(dense, **place, backends=fast),
        "switchhead": SwitchHeadAttention(switch, **place, backends=fast),
        MASKED: SwitchHeadAttention(switch, **place, backends=Backends()),
    }
    for layer in found.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=1024**-0.5)
        layer.to(dtype)
    return found


def layer_macs(T: int) -> dict[str, float]:
    """Multiply-adds per token of one layer as computed, attention counted in full (the paper's convention)."""
    return {"dense": 4 * 1024 * 1024 + 2 * 1024 * T, "switchhead": (2 + 2 * 2) * 1024 * 448 + 2 * 448 * T}


def useful_macs(T: int) -> dict[str, float]:
    """By layer: the masked einsum computes every expert for every token, and needs no more than ours."""
    macs = layer_macs(T)
    return macs | {MASKED: macs["switchhead"]}


def bench_layers(dtype: torch.dtype, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    bench, (B, T) = Bench(), (2, 1024)
    add_mm(bench, dtype, B * T, 1024, 1024)
    x, sequence_index = torch.randn(B, T, 1024).to(dtype).requires_grad_(), torch.arange(B)
    macs = useful_macs(T)
    for name, layer in layers(dtype).items():
        flops = 2 * B * T * macs[name]
        bench.add(name, lambda layer=layer: layer(x, T, sequence_index)[0], [x, *layer.parameters()], flops)  # type: ignore[misc]
    return bench.run(rounds), bench.flops


def table(title: str, seconds: dict[str, list[float]], flops: dict[str, float]) -> list[dict[str, Any]]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    limit = flops["torch.mm fwd"] / medians["torch.mm fwd"]
    rows = [
        {"case": name, "ms": 1e3 * s, "gflops": flops[name] / s / 1e9, "of_mm": flops[name] / s / limit}
        for name, s in medians.items()
    ]
    print(f"\n{title}\n{'case':44s} {'ms':>8s} {'GFLOP/s':>8s} {'of mm':>6s}")
    for row in rows:
        print(f"{row['case']:44s} {row['ms']:8.1f} {row['gflops']:8.1f} {row['of_mm']:6.0%}")
    return rows


def to_dense(seconds: dict[str, list[float]], name: str, phase: str) -> float:
    """Time of a layer over the dense one's of the same round, the median."""
    pairs = zip(seconds[f"{name} {phase}"], seconds[f"dense {phase}"], strict=True)
    return statistics.median(one / dense for one, dense in pairs)


def page(found: Any) -> str:
    """The table of docs/benchmarks.md: medians."""
    lines = []
    for dtype, seconds in found["layers"].items():
        for name in found["macs"]:
            line = [dtype, name]
            for phase in PHASES:
                line.append(f"{1e3 * statistics.median(seconds[f'{name} {phase}']):.1f}")
                line.append(f"{to_dense(seconds, name, phase):.2f}")
            lines.append([*line, f"{found['macs'][name] / found['macs']['dense']:.2f}"])
    header = ["dtype", "layer", "forward ms", "to dense", "forward + backward ms", "to dense", "useful MACs to dense"]
    return f"{markdown(header, lines)}\n\nThreads: {found['threads']}; medians of {found['rounds']} rounds"


def draw(found: Any, path: Path) -> None:
    """PNG: for each dtype the layers' times, forward and backward, to the dense layer's, beside their useful MACs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(found["layers"]), figsize=(8, 2.6), sharey=True, squeeze=False, layout="constrained"
    )
    names, macs = list(found["macs"]), found["macs"]
    for axis, (dtype, seconds) in zip(axes[0], found["layers"].items(), strict=True):
        times = [to_dense(seconds, name, PHASES[1]) for name in names]
        work = [macs[name] / macs["dense"] for name in names]
        for shift, label, values in ((-0.2, "time, forward and backward", times), (0.2, "useful MACs", work)):
            bars = axis.barh([place + shift for place in range(len(names))], values, 0.4, label=label)
            axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(dtype, fontsize=10)
        axis.margins(x=0.15)
    axes[0][0].invert_yaxis()
    figure.supxlabel("to dense attention", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: 1 with --keep, else 2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 rounds, target shape only")
    parser.add_argument("--json", action="store_true", help="print one JSON object after the tables")
    parser.add_argument("--only", choices=("ops", "layer"), help="one half of the benchmark")
    records.add_option(parser)
    options = parser.parse_args()
    if options.keep is not None and options.only != "layer":
        parser.error("--keep keeps the layers; add --only layer")
    if options.threads is None:
        options.threads = 2 if options.keep is None else 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about, kept = records.machine(), dict[str, dict[str, list[float]]]()
    rounds = 3 if options.quick else options.rounds
    macs = layer_macs(1024)
    report: dict[str, Any] = {"threads": options.threads, "mac_ratio": macs["switchhead"] / macs["dense"]}
    for name, dtype in DTYPES.items():
        if options.only != "ops":
            seconds, flops = bench_layers(dtype, rounds)
            kept[name] = seconds
            report[f"layer {name}"] = table(f"Attention layer, {name}", seconds, flops)
            for phase in PHASES:
                ratio = report[f"ratio {name} {phase}"] = to_dense(seconds, "switchhead", phase)
                print(f"SwitchHead / dense, {phase}: {ratio:.3f} (MAC ratio {report['mac_ratio']:.3f})")
        shapes = itertools.islice(SHAPES.items(), 1 if options.quick else None)
        for label, shape in shapes if options.only != "layer" else ():
            title = f"Projections {label}, {name}: N, d, H, h, E, k = {shape}"
            report[f"{label} {name}"] = table(title, *bench_ops(dtype, shape, rounds))
    if options.json:
        print(json.dumps(report))
    if options.keep is not None:
        settings = {"threads": options.threads, "rounds": rounds, "macs": useful_macs(1024)}
        records.keep(options.keep, "switchhead-layers", about, {"layers": kept, **settings})


if __name__ == "__main__":
    main()
