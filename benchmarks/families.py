r"""Step time, kept activations and multiply-accumulates of SwitchAll, SwitchHead, MoA and dense at matched parameters.

    python -m benchmarks.families                       # 47m, 262m and 244m-rope, 4 layers, on the CPU
    python -m benchmarks.families --shape 244m-rope --rounds 9 --keep

A step is forward and backward of a model of --layers blocks with its embedding and output layer, without an optimizer.
The families of a shape run in turn, round after round, each round in another order, so that a slow phase of a shared
machine hits all alike; what counts is the median over rounds of the ratio to the dense model of the same round. Beside
it stand the ratios of multiply-accumulates (of a block by the paper's formulas, and of the step with its output layer)
and of the bytes which autograd keeps for the backward pass. After the rounds torch's profiler says where a step goes.
Transformer-XL memory is full, and nothing is dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import records
from benchmarks.gpu.models import fill_memory
from benchmarks.marked import markdown
from benchmarks.pictures import picture
from benchmarks.rounds import orders, quartiles, ratio, ratios, seconds
from common.paths import REPOSITORY
from common.tables import text_table
from model.config import ModelConfig
from model.costs import attention_macs, feedforward_macs, formula_parameters
from model.kernels.choice import Backends
from model.language_model import LanguageModel

PAPER = REPOSITORY / "configs" / "paper"
SHAPES: dict[str, dict[str, tuple[str, str | None]]] = {
    "47m": {
        "dense": ("c4_dense_47m", None),
        "MoA": ("wt103_moa_8heads_47m", None),
        "SwitchHead": ("c4_switchhead_47m", None),
        "SwitchAll": ("c4_switchall_47m", None),
    },
    "262m": {
        "dense": ("c4_dense_262m", None),
        "MoA": ("wt103_moa_8heads_262m", None),
        "SwitchHead": ("c4_switchhead_262m", None),
        "SwitchAll": ("c4_switchall_259m", None),
    },
    "244m-rope": {
        "dense": ("c4_dense_rope_244m", None),
        "SwitchHead": ("c4_switchhead_rope_244m", None),
        "SwitchAll": ("c4_switchhead_rope_244m", "c4_switchall_259m"),
    },
}
"""Shape -> family -> configuration of the paper, and one whose feed-forward layer it takes instead of its own."""
DENSE = "dense"
PROFILED_ROUNDS = 3
PARTS = {
    "output layer": r"linear_cross_entropy",
    "routers": r"switchall.*route|group_choices|RouterInput",
    "experts of attention": r"switchhead_(value|output)|expert_linear",
    "experts of feed-forward": r"switchall.*sigma_moe",
    "attention itself": r"scaled_dot_product|ScaledDotProduct|(relative|causal)_attention|[sS]oftmax|[bB]mm|matmul",
    "dense products": r"aten::linear|aten::mm|aten::addmm|\bMmBackward|AddmmBackward|_Linear",
}
"""Part of a step -> what its operators and nodes of the graph are called. The first that fits counts."""
REST = "the rest"
ALL_PARTS = (*PARTS, REST)


class Measured(NamedTuple):
    """One family."""

    parameters: int
    """Of the whole model, all its layers."""
    macs: int
    """Of attention and feed-forward of a block, forward, by the paper's formulas."""
    step_macs: int
    """Of the measured layers and the output layer, forward."""
    kept: int
    """Bytes."""
    seconds: list[float]
    """Of a step, by round."""
    parts: dict[str, float]
    """Part of a step -> seconds, by torch's profiler; medians of PROFILED_ROUNDS."""


def model_of(shape: str, family: str) -> ModelConfig:
    """The whole model, without dropout: masks cost every family the same."""
    name, feedforward = SHAPES[shape][family]
    tree: dict[str, Any] = _model_section(name)
    if feedforward is not None:
        tree["feedforward"] = _model_section(feedforward)["feedforward"]
    tree["dropout"] = 0.0
    for part in ("attention", "feedforward"):
        tree[part].pop("expert_dropout", None)
    return ModelConfig.model_validate(tree)


def _model_section(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((PAPER / f"{name}.json").read_text(encoding="utf-8"))["model"]
    return tree


class Step:
    """A model of some layers and one batch."""

    def __init__(self, config: ModelConfig, sequences: int) -> None:
        torch.manual_seed(0)
        backends = Backends.choose("auto", config, device_type="cpu", dtype=torch.float32)
        self.model = LanguageModel(config, backends=backends, seed=0).train()
        size = sequences, config.sequence_length
        self.tokens, self.targets = (torch.randint(0, config.vocab_size, size) for _ in range(2))
        self.index = torch.arange(sequences)
        chunks = config.memory_length // config.sequence_length
        fill_memory(self.model, self.index, chunks, lambda: self.model(self.tokens, self.targets, self.index))

    def __call__(self) -> float:
        """Seconds."""
        self.model.zero_grad(set_to_none=True)
        begin = seconds()
        self.model(self.tokens, self.targets, self.index)[0].backward()
        return seconds() - begin

    def kept_bytes(self) -> int:
        """What autograd keeps of a forward pass besides the parameters, each storage once."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            objective = self.model(self.tokens, self.targets, self.index)[0]
        total = sum(kept.values())
        objective.backward()
        return total


def forward_macs(config: ModelConfig) -> int:
    """Of all layers, by the paper's formulas, and of the output layer, on one sequence."""
    layers = config.num_layers * (attention_macs(config) + feedforward_macs(config))
    return layers + config.vocab_size * config.d_model * config.sequence_length


def measured(shape: str, layers: int, sequences: int, rounds: int) -> dict[str, Measured]:
    """Family -> what was measured."""
    whole = {family: model_of(shape, family) for family in SHAPES[shape]}
    short = {family: config.model_copy(update={"num_layers": layers}) for family, config in whole.items()}
    steps = {family: Step(config, sequences) for family, config in short.items()}
    found = {
        family: Measured(
            formula_parameters(config).total,
            attention_macs(config) + feedforward_macs(config),
            forward_macs(short[family]),
            steps[family].kept_bytes(),
            [],
            {},
        )
        for family, config in whole.items()
    }
    for family in orders(list(steps), rounds):
        found[family].seconds.append(steps[family]())
    profiles: dict[str, list[dict[str, float]]] = {family: [] for family in steps}
    for family in orders(list(steps), PROFILED_ROUNDS):
        profiles[family].append(profiled(steps[family]))
    for family, one in found.items():
        one.parts.update(median_parts(profiles[family]))
    return found


def part_of(name: str) -> str:
    """The part that an operator, or a node of the backward pass, belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), REST)


def profiled(step: Callable[[], Any]) -> dict[str, float]:
    """Part -> seconds of one step, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seconds: Counter[str] = Counter(dict.fromkeys(ALL_PARTS, 0.0))
    for event in found.events():
        if event.cpu_parent is None:
            seconds[part_of(event.name)] += event.cpu_time_total / 1e6
    return dict(seconds)


def median_parts(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Part -> the median of its seconds."""
    return {part: statistics.median(one[part] for one in rounds) for part in ALL_PARTS}


def rows(shape: str, found: dict[str, Measured]) -> list[list[str]]:
    """A line for each family: ratios to the dense model, medians over rounds."""
    dense = found[DENSE]
    lines = []
    for family, one in found.items():
        memory = [f"{one.kept / 1e6:.0f}", f"{one.kept / dense.kept:.2f}"]
        times = [f"{statistics.median(one.seconds):.2f}", *quartiles(ratios(one.seconds, dense.seconds))]
        macs = [f"{one.macs / dense.macs:.2f}", f"{one.step_macs / dense.step_macs:.2f}"]
        lines.append([shape, family, f"{one.parameters:,}", *times, *macs, *memory])
    return lines


def part_rows(shape: str, found: dict[str, Measured]) -> list[list[str]]:
    """A line for each family: seconds of each part of a step."""
    return [[shape, family, *(f"{one.parts[part]:.3f}" for part in ALL_PARTS)] for family, one in found.items()]


HEADER = ["shape", "family", "parameters", "step s", "to dense", "quartiles", "block's MACs to dense", "step's"]
HEADER += ["kept MB", "to dense"]
PART_HEADER = ["shape", "family", *ALL_PARTS]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeatable (default: all)")
    parser.add_argument(
        "--layers", type=int, default=4, metavar="N", help="blocks of each model (default: %(default)s)"
    )
    parser.add_argument("--sequences", type=int, default=1, metavar="N", help="of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: %(default)s")
    records.add_option(parser)
    args = parser.parse_args(arguments)
    if min(args.layers, args.sequences, args.rounds) < 1:
        parser.error("--layers, --sequences and --rounds must be at least 1")
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    about, found = records.machine(), dict[str, dict[str, Measured]]()
    for shape in args.shape or SHAPES:
        print(f"{shape}: {args.layers} layers, {args.rounds} rounds", file=sys.stderr, flush=True)
        found[shape] = measured(shape, args.layers, args.sequences, args.rounds)
    settings = {"threads": threads, "layers": args.layers, "sequences": args.sequences, "rounds": args.rounds}
    tables = (text_table(header, lines, left={0, 1}) for header, lines in tables_of(found))
    text = f"fp32, {', '.join(f'{value} {name}' for name, value in settings.items())}\n\n" + "\n\n".join(tables)
    as_json = {s: {family: one._asdict() for family, one in families.items()} for s, families in found.items()}
    records.show(args.keep, "families", about, {"shapes": as_json, **settings}, text)
    return 0


def tables_of(found: dict[str, dict[str, Measured]]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of times, and of the parts of a step."""
    return [
        (header, [line for shape, one in found.items() for line in lines(shape, one)])
        for header, lines in ((HEADER, rows), (PART_HEADER, part_rows))
    ]


def page(found: Any) -> str:
    """The tables of docs/benchmarks.md."""
    shapes = {s: {name: Measured(**one) for name, one in families.items()} for s, families in found["shapes"].items()}
    tables = [markdown(header, lines) for header, lines in tables_of(shapes)]
    return "\n\nSeconds of the parts of a step, by torch's profiler, medians of three more rounds:\n\n".join(tables)


def draw(found: Any, path: Path) -> None:
    """PNG: for each shape and family, step time, multiply-accumulates and kept bytes, each to the dense model's."""
    shapes = found["shapes"]
    with picture(path, len(shapes), (4.5 * len(shapes), 3.6), sharey=True) as (figure, axes):
        for axis, (shape, families) in zip(axes, shapes.items(), strict=True):
            dense = families[DENSE]
            bars = {
                "step time": [ratio(one["seconds"], dense["seconds"]) for one in families.values()],
                "multiply-accumulates": [one["step_macs"] / dense["step_macs"] for one in families.values()],
                "kept activations": [one["kept"] / dense["kept"] for one in families.values()],
            }
            for number, (label, heights) in enumerate(bars.items()):
                places = [place + (number - 1) * 0.27 for place in range(len(families))]
                axis.bar_label(axis.bar(places, heights, 0.27, label=label), fmt="%.2f", fontsize=7)
            axis.set_xticks(range(len(families)), list(families))
            axis.set_title(shape)
        axes[0].set_ylabel("to the dense model")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(bars), fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
