"""Kernels, bytes and waits of a micro-step and of an optimizer step, counted on fake CUDA tensors: no GPU, no timing.

    python -m benchmarks.launches [--config configs/switchall_1b.json ...] [--markdown] [--operators]

One process, bf16, the backends that `auto` takes on CUDA. One block is the difference between two layers and one; the
whole model follows, for its layers are alike. The optimizer step is what comes after the micro-steps without
DeepSpeed: gradient norm and AdamW over bf16 parameters as with ZeRO 0, and the sums of a step. DeepSpeed's own copies
and reductions are not in it. benchmarks/launch_counter.py says what a launch and a byte are.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import marked
from benchmarks.fake_cuda import backward, fake_cuda
from benchmarks.launch_counter import Counts, LaunchCounter, Tally
from benchmarks.marked import TIGHT, with_table
from benchmarks.places import OTHER, PLACES, PLACES_OF_STEP
from common.errors import UserError
from common.tables import text_table
from model.language_model import LanguageModel, routing_statistics
from model.layers import Block
from model.memory import layer_memories
from model.parallel.context import ParallelContext
from pretrain.config.loading import load_config
from pretrain.config.rules import choose_backends
from pretrain.config.schema import Config
from pretrain.data.windows import Batch
from pretrain.engine.gradient_norm import GradientNorm
from pretrain.engine.micro_steps import PlainExecutor
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.step_sums import StepReducer
from pretrain.phases import Phases

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DOCS = CONFIGS.parent / "docs" / "kernels.md"
DEFAULT = (CONFIGS / "switchall_1b.json", CONFIGS / "paper" / "c4_switchhead_262m.json")


@dataclass
class StepCounts:
    """Of one optimizer step with one micro-step."""

    forward: Counts = field(default_factory=Counts)
    backward: Counts = field(default_factory=Counts)
    step: Counts = field(default_factory=Counts)

    @property
    def parts(self) -> tuple[Counts, Counts, Counts]:
        return self.forward, self.backward, self.step

    @property
    def micro_step(self) -> Counts:
        return self.forward.plus(self.backward)


class CountedPhases(Phases):
    """Counts go to the part of the step whose phase was entered."""

    def __init__(self, counter: LaunchCounter, found: StepCounts) -> None:
        super().__init__()
        self._counter, self._found = counter, found

    def enter(self, name: str, *, patient: bool = False, quick: bool = False) -> None:
        self._counter.counts = {"forward": self._found.forward, "backward": self._found.backward}.get(
            name, self._found.step
        )


class CountedEngine:
    """What a DeepSpeedEngine is to the executor, with torch's own backward pass and optimizer."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, counter: LaunchCounter) -> None:
        self.module, self.optimizer, self._counter = module, optimizer, counter

    def __call__(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)

    def zero_optimization_stage(self) -> int:
        return 0

    def backward(self, loss: Tensor) -> None:
        backward(loss, self._counter.before_node)
        self._counter.after_backward()

    def step(self) -> None:
        self.optimizer.step()


def count_step(config: Config, *, with_documents: bool = False) -> StepCounts:
    """One micro-step and the optimizer step after it. In the steady state: Adam's moments and the tables of positions
    exist, a memory is full, and the batch is on the device."""
    found = StepCounts()
    with fake_cuda():
        model = _model(config)
        optimizer = build_optimizer(model, config)
        _give_moments(optimizer)
        counter = LaunchCounter()
        engine = CountedEngine(model, optimizer, counter)
        parallel = ParallelContext()
        executor = PlainExecutor(engine, GradientNorm(engine, config.optimizer.clip_norm, parallel))
        reduce = StepReducer(model, parallel, torch.device("cuda"))
        batch, phases = _batch(config, with_documents), CountedPhases(counter, found)
        with counter:
            output = executor.train([batch], phases)
            phases.enter("adding up over ranks")
            reduce(output, 1)
    return found


def _model(config: Config) -> LanguageModel:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = LanguageModel(
                config.model, backends=choose_backends(config, "cuda"), recompute=config.train.recompute
            )
    finally:
        torch.set_default_dtype(before)
    device = torch.device("cuda")
    for parameter in model.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]  # as the engine says it
    for _, statistics in routing_statistics(model):
        statistics.to(device)
    B, size = config.batch.micro_sequences, (config.model.memory_length, config.model.d_model)
    for _, memory in layer_memories(model):
        memory.assign(torch.arange(B, device=device), B)
        memory.kept = torch.empty(B, *size, dtype=dtype, device=device)
    context = torch.empty(1, size[0] + config.model.sequence_length, size[1], dtype=dtype, device=device)
    for layer in model.modules():
        if isinstance(layer, Block):
            layer.fill_tables(context)
    return model


def _give_moments(optimizer: torch.optim.Optimizer) -> None:
    """As after the first step, which allocates them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _batch(config: Config, with_documents: bool) -> Batch:
    size = config.batch.micro_sequences, config.model.sequence_length
    tokens, targets, documents = (torch.empty(size, dtype=torch.int64, device="cuda") for _ in range(3))
    index = torch.empty(size[0], dtype=torch.int64, device="cuda")
    return Batch(tokens, targets, index, documents if with_documents else None)


# --------------------------------------------------------------------------------------------------------------- table


@functools.cache
def count_model(path: Path) -> tuple[Config, StepCounts, StepCounts]:
    """The configuration, the counts of the model with one layer, and what each further layer adds."""
    config = load_config(path, [])
    one, two = (count_step(load_config(path, [f"model.num_layers={n}"])) for n in (1, 2))
    return config, one, StepCounts(*(b.plus(a, -1) for a, b in zip(one.parts, two.parts, strict=True)))


HEAD = ("place", "block, forward", "MB", "block, backward", "MB", "micro-step", "GB", "optimizer step", "MB")


def place_table(path: Path) -> list[tuple[str, ...]]:
    """Rows: launches and bytes of each place, elementwise operators, then all; the last counts copies and waits."""
    config, one, layer = count_model(path)
    further = config.model.num_layers - 1
    whole = one.micro_step.plus(layer.micro_step, further), one.step.plus(layer.step, further)
    parts = (layer.forward, layer.backward, *whole)
    scales = (1e6, 1e6, 1e9, 1e6)
    known = {place for part in parts for place in part.by_place}
    places = [p for p in (*PLACES, *PLACES_OF_STEP, OTHER) if p in known]

    def row(name: str, tallies: Sequence[Tally], *, elementwise: bool = False) -> tuple[str, ...]:
        cells: list[str] = []
        for tally, scale in zip(tallies, scales, strict=True):
            moved = tally.elementwise_bytes if elementwise else tally.bytes
            launches = "" if elementwise or not tally.kernels else f"{tally.kernels:,}"
            cells += [launches, f"{moved / scale:,.1f}" if moved else ""]
        return (name, *cells)

    rows = [row(place, [part.by_place.get(place, Tally()) for part in parts]) for place in places]
    rows.append(row("all", [part.total for part in parts]))
    rows.append(row("of it elementwise", [part.total for part in parts], elementwise=True))
    waits = [cell for part in parts for cell in (str(part.waits.total()), "")]
    copies = [cell for part in parts for cell in (str(part.to_host + part.to_device), "")]
    return [*rows, ("copies between host and GPU", *copies), ("waits of the host", *waits)]


def title_of(path: Path) -> str:
    config = load_config(path, [])
    B, T = config.batch.micro_sequences, config.model.sequence_length
    return f"{path.stem}, {B} x {T} tokens a micro-step, dropout {config.model.dropout:g}"


def markdown() -> str:
    """The tables of docs/kernels.md."""
    parts = (f"{title_of(path)}:\n\n{marked.markdown(HEAD, place_table(path), TIGHT)}" for path in DEFAULT)
    return "\n\n".join(parts) + "\n"


def update_docs() -> None:
    DOCS.write_text(with_table(DOCS.read_text(), "benchmarks.launches", markdown()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        dest="configs",
        type=Path,
        nargs="+",
        default=DEFAULT,
        help="of runs (default: those of docs/kernels.md)",
    )
    parser.add_argument("--markdown", action="store_true", help="writes the tables of docs/kernels.md")
    parser.add_argument("--operators", action="store_true", help="also which operator is launched how often")
    options = parser.parse_args(arguments)
    if options.markdown:
        update_docs()
        return 0
    try:
        for title, path in [(title_of(path), path) for path in options.configs]:
            print(f"{title}\n{text_table(HEAD, place_table(path))}\n")
            if options.operators:
                print_operators(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def print_operators(path: Path) -> None:
    _, one, layer = count_model(path)
    for name, counts in (("block, forward", layer.forward), ("block, backward", layer.backward), ("step", one.step)):
        for (place, operator), count in sorted(counts.by_operator.items()):
            print(f"{name:16}  {place:13}  {count:4}  {operator}")
        for wait, count in sorted(counts.waits.items()):
            print(f"{name:16}  waits          {count:4}  {wait}")


if __name__ == "__main__":
    sys.exit(main())
