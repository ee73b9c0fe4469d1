"""SwitchHead kernels on CPU: the two expert projections per strategy, and the attention layer against the dense one.

    python -m benchmarks.kernels_switchhead [--threads 2] [--quick]
    python -m benchmarks.kernels_switchhead --only layer --keep    # the record switchhead-layers of docs/benchmarks.md

Every case of a dtype runs in turn, round after round, so that a slow phase of a shared machine hits all of them alike;
the medians and, above all, their ratios are what counts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model.openmp  # noqa: F401  # as in training; before torch

# isort: split

import torch
from torch import nn

from benchmarks import records
from benchmarks.marked import markdown
from benchmarks.pictures import picture
from benchmarks.rounds import ratio
from benchmarks.timed_cases import DTYPES, Case, Suite, Timed, measure, print_table, rows
from common.arguments import at_least
from common.tables import text_table
from model.attention.dense import DenseAttention
from model.attention.switchhead import SwitchHeadAttention
from model.config import ModelConfig
from model.costs import attention_macs
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
BASE = {"d_model": 1024, "num_layers": 1, "vocab_size": 4, "sequence_length": 1024}
DENSE = ModelConfig.model_validate(BASE | {"attention": {"type": "dense", "num_heads": 16, "head_dim": 64}})
SWITCHHEAD = ModelConfig.model_validate(
    BASE | {"attention": {"type": "switchhead", "num_heads": 4, "head_dim": 112, "num_experts": 4, "active_experts": 2}}
)
"""As the 262M model with RoPE."""
SEQUENCES = 2
PHASES = ("fwd", "fwd+bwd")
MASKED = "switchhead masked einsum"
HEADER = ["dtype", "layer", "forward ms", "to dense", "forward + backward ms", "to dense", "useful MACs to dense"]


def op_suites(dtype: torch.dtype, quick: bool) -> Iterator[Suite]:
    """Both projections at each shape; `quick`: at the first."""
    for label, shape in itertools.islice(SHAPES.items(), 1 if quick else None):
        N, d, H, h, E, k = shape
        scores, index = torch.rand(N, H, E).topk(k, -1)
        choice = Choice(scores.requires_grad_(), index, *group_choices(index, E, backend="cpu"))
        cases = []
        for op, width, size in ((switchhead_value, (d,), (d, h)), (switchhead_output, (H, h), (h, d))):
            rows, experts = (torch.randn(*size).to(dtype).requires_grad_() for size in ((N, *width), (H, E, *size)))
            for backend, strategy in WAYS:
                forward = functools.partial(op, rows, choice, experts, backend=backend, strategy=strategy)
                name = f"{op.__name__} {backend}" + (f" {strategy}" if strategy else "")
                cases.append(Case(name, forward, [rows, scores, experts]))
        yield Suite(f"{label}: N, d, H, h, E, k = {shape}", 2 * N * H * k * d * h, cases)


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Dense attention, SwitchHead, and SwitchHead by plain operators over all experts."""
    fast = Backends(route="cpu", switchhead_value="cpu", switchhead_output="cpu")
    place: dict[str, Any] = {"parallel": ParallelContext(), "name": "attention", "seed": 0}
    found: dict[str, nn.Module] = {
        "dense": DenseAttention(DENSE, **place, backends=fast),
        "switchhead": SwitchHeadAttention(SWITCHHEAD, **place, backends=fast),
        MASKED: SwitchHeadAttention(SWITCHHEAD, **place, backends=Backends()),
    }
    for layer in found.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=BASE["d_model"] ** -0.5)
        layer.to(dtype)
    return found


def useful_macs() -> dict[str, int]:
    """By layer, of a sequence: the masked einsum computes every expert for every token, and needs no more than ours."""
    ours = attention_macs(SWITCHHEAD)
    return {"dense": attention_macs(DENSE), "switchhead": ours, MASKED: ours}


def layer_suite(dtype: torch.dtype) -> Suite:
    """Its FLOPs are the dense layer's."""
    T, index = BASE["sequence_length"], torch.arange(SEQUENCES)
    x = torch.randn(SEQUENCES, T, BASE["d_model"]).to(dtype).requires_grad_()
    cases = [
        Case(name, lambda layer=layer: layer(x, T, index)[0], [x, *layer.parameters()])  # type: ignore[misc]
        for name, layer in layers(dtype).items()
    ]
    return Suite("attention layer", 2 * SEQUENCES * attention_macs(DENSE), cases)


def to_json(timed: Timed) -> dict[str, list[float]]:
    """Seconds of each layer and phase, by round."""
    return {
        f"{name} {phase}": seconds
        for phase, found in zip(PHASES, (timed.forward, timed.both), strict=True)
        for name, seconds in found.items()
    }


def to_dense(seconds: dict[str, list[float]], name: str, phase: str) -> float:
    """Time of a layer over the dense one's of the same round, the median."""
    return ratio(seconds[f"{name} {phase}"], seconds[f"dense {phase}"])


def layer_rows(found: Any) -> list[list[str]]:
    """A line for each dtype and layer: medians."""
    lines = []
    for dtype, seconds in found["layers"].items():
        for name in found["macs"]:
            line = [dtype, name]
            for phase in PHASES:
                line.append(f"{1e3 * statistics.median(seconds[f'{name} {phase}']):.1f}")
                line.append(f"{to_dense(seconds, name, phase):.2f}")
            lines.append([*line, f"{found['macs'][name] / found['macs']['dense']:.2f}"])
    return lines


def page(found: Any) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(HEADER, layer_rows(found))}\n\nThreads: {found['threads']}; medians of {found['rounds']} rounds"


def draw(found: Any, path: Path) -> None:
    """PNG: for each dtype the layers' times, forward and backward, to the dense layer's, beside their useful MACs."""
    names, macs = list(found["macs"]), found["macs"]
    with picture(path, len(found["layers"]), (8, 2.6), sharey=True) as (figure, axes):
        for axis, (dtype, seconds) in zip(axes, found["layers"].items(), strict=True):
            times = [to_dense(seconds, name, PHASES[1]) for name in names]
            work = [macs[name] / macs["dense"] for name in names]
            for shift, label, values in ((-0.2, "time, forward and backward", times), (0.2, "useful MACs", work)):
                bars = axis.barh([place + shift for place in range(len(names))], values, 0.4, label=label)
                axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
            axis.set_yticks(range(len(names)), names)
            axis.set_title(dtype, fontsize=10)
            axis.margins(x=0.15)
        axes[0].invert_yaxis()
        figure.supxlabel("to dense attention", fontsize=9)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_switchhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=at_least(1), help="default: 1 with --keep, else 2")
    parser.add_argument("--rounds", type=at_least(1), default=15, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="3 rounds, target shape only")
    parser.add_argument("--only", choices=("ops", "layer"), help="one half of the benchmark")
    records.add_option(parser)
    options = parser.parse_args()
    if options.keep is not None and options.only != "layer":
        parser.error("--keep keeps the layers; add --only layer")
    threads = options.threads or (2 if options.keep is None else 1)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    about = records.machine()
    rounds = 3 if options.quick else options.rounds
    found: dict[str, Any] = {"layers": {}, "threads": threads, "rounds": rounds, "macs": useful_macs()}
    for name, dtype in DTYPES.items():
        if options.only != "ops":
            found["layers"][name] = to_json(measure(layer_suite(dtype), dtype, rounds))
        for suite in op_suites(dtype, options.quick) if options.only != "layer" else ():
            timed = measure(suite, dtype, rounds)
            print_table(f"projections {name}", suite, rows(suite, timed), timed.mm_rate)
    if options.only != "ops":
        print(f"\n{text_table(HEADER, layer_rows(found), left={0, 1})}")
    if options.keep is not None:
        records.keep(options.keep, "switchhead-layers", about, found)


if __name__ == "__main__":
    main()
