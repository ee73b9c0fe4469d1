"""Micro-steps that are replayed from a recording are those that are launched one by one, to the last bit: losses,
gradient norms, weights, memory and what routers counted. The recording is a CPU's stand-in (recorded.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from model.language_model import build_model
from model.memory import layer_memories
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine import zero_1
from pretrain.engine.graphed import GraphedForward
from pretrain.evaluate import evaluate
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.engine.recorded import Pool, RecordedGraph
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import one_step, trainer_of

STEPS = 4


class Ran(NamedTuple):
    scalars: list[tuple[Any, ...]]
    """Of each step: loss, auxiliary loss, gradient norm, negative entropy."""
    validation: list[float]
    tensors: dict[str, Tensor]
    """Loads of the last step, weights and memory after it."""
    replays: int


def ran(config: Config, *, graphed: bool) -> Ran:
    trainer, pool = trainer_of(config), Pool()
    module = trainer.engine.module
    if graphed:
        module.forward = GraphedForward(module, pool.make_graph, taken_at_once=zero_1.is_used(config))
    scalars, validation, tensors = [], [], {}
    for step in range(STEPS):
        sums = one_step(trainer, Progress(step, step * config.batch.global_sequences)).sums
        scalars.append((sums.loss, sums.auxiliary_loss, sums.grad_norm, sums.negative_entropy))
        tensors |= {f"load {name}": load for name, load in sums.load.items()}
        validation.append(validated(trainer))
    tensors |= {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for name, memory in layer_memories(module):
        assert memory.kept is not None
        tensors[f"memory {name}"] = memory.kept.clone()
    trainer.close()
    return Ran(scalars, validation, tensors, pool.replays)


def validated(trainer: Trainer) -> float:
    """Reads other streams, whose first chunks have no memory, in evaluation."""
    setup = trainer.setup
    assert trainer.data.validation is not None
    found = evaluate(trainer.executor, trainer.data.validation, setup.config, setup.parallel, setup.device)
    assert found is not None
    return found["loss"]


def both(rank: int, configs: list[Config]) -> list[tuple[Ran, Ran]]:
    return [(ran(config, graphed=False), ran(config, graphed=True)) for config in configs]


def check(ranks: int, configs: list[Config]) -> None:
    for of_rank in run_ranks(both, ranks, configs):
        for config, (eager, graphed) in zip(configs, of_rank, strict=True):
            micro_steps = config.batch.global_sequences // config.batch.micro_sequences // ranks
            kinds = 1 + config.model.memory_length // config.model.sequence_length
            pieces = config.model.num_layers + 3  # forward; embedding, blocks and end backward
            assert graphed.replays == (micro_steps * STEPS - kinds) * pieces
            assert graphed.scalars == eager.scalars and graphed.validation == eager.validation
            assert len({loss for loss, *_ in eager.scalars}) == STEPS, "nothing was learnt"
            assert graphed.tensors.keys() == eager.tensors.keys()
            for name, tensor in eager.tensors.items():
                assert torch.equal(graphed.tensors[name], tensor), name


def test_the_stand_in_is_as_strict_as_a_gpu() -> None:
    """What a recording wrote is undone, a replay reads what is there then, and memory that was freed is an error."""
    pool = Pool()
    x, total = torch.ones(3), torch.zeros(3)
    graph = pool.make_graph()
    with graph.recording():
        doubled = 2 * x
        total += doubled
    assert total.tolist() == [0, 0, 0]
    x.fill_(5)
    graph.replay()
    graph.replay()
    assert doubled.tolist() == [10, 10, 10] and total.tolist() == [20, 20, 20]
    waits: list[tuple[Callable[[Tensor], Any], str]] = [
        (lambda t: float(t.sum()), "waits for the device"),
        (torch.nonzero, "waits for the device"),
        (lambda t: t[t > 1], "the shape depends on the data"),
    ]
    for waiting, words in waits:
        with pytest.raises((RuntimeError, AssertionError), match=words), pool.make_graph().recording():
            waiting(x)
    del x
    with pytest.raises(AssertionError, match="was freed"):
        graph.replay()


class Refusing(RecordedGraph):
    """As CUDA: the end of a recording that went wrong fails as well, with less to say."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__(Pool())
        self._error = error

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        try:
            raise self._error
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


NOT_PERMITTED = RuntimeError("CUDA error: operation not permitted when stream is capturing.\nand more")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("error", [NOT_PERMITTED, FULL])
def test_what_cannot_be_recorded_is_one_sentence(prepared: Path, error: RuntimeError) -> None:
    """The first micro-step, and all in evaluation, need no recording. Memory that is full is an error as elsewhere, of
    which the run writes down what holds it."""
    config = config_of(prepared, "dense", Layout(), "model.num_layers=1")
    model = build_model(config.model, seed=0)
    forward = GraphedForward(model, lambda: Refusing(error), taken_at_once=False)
    tokens = torch.zeros(2, config.model.sequence_length, dtype=torch.int64)
    inputs = tokens, tokens, torch.arange(2)
    loss, _, _ = forward(*inputs)
    loss.backward()
    with torch.no_grad():
        assert forward(*inputs)[0].item() == loss.item()
    model.eval()
    assert forward(*inputs)[0].item() == loss.item()
    model.train()
    words = (
        r"^train\.cuda_graph: the micro-step cannot be recorded as CUDA graphs \(CUDA .* capturing\); set it to off$"
    )
    full = pytest.raises(torch.OutOfMemoryError, match="Tried to allocate")
    with full if error is FULL else pytest.raises(UserError, match=words):
        forward(*inputs)


def test_a_parameter_that_was_moved_is_not_replayed(prepared: Path) -> None:
    config = config_of(prepared, "dense", Layout(), "model.num_layers=1")
    model = build_model(config.model, seed=0)
    forward = GraphedForward(model, Pool().make_graph, taken_at_once=False)
    tokens = torch.zeros(2, config.model.sequence_length, dtype=torch.int64)
    for _ in range(3):
        forward(tokens, tokens, torch.arange(2))
    weight = model.get_parameter("head.weight")
    weight.data = weight.data.clone()
    with pytest.raises(AssertionError, match="a parameter was moved"):
        forward(tokens, tokens, torch.arange(2))


def test_a_recording_touches_no_parameter_of_autograd(prepared: Path) -> None:
    """Whoever holds on to a parameter's node in autograd's graph, as DeepSpeed's hooks do, binds it to the stream on
    which it was made: a recording that came by it would be refused by CUDA. So it has leaves of its own."""
    config = config_of(prepared, "switchall", Layout(tied=True), "model.num_layers=1")
    model, pool = build_model(config.model, seed=0), Pool()
    forward = GraphedForward(model, pool.make_graph, taken_at_once=False)
    parameters, seen = list(model.parameters()), []
    for parameter in parameters:
        parameter.register_hook(lambda grad: seen.append(pool.replays))
    tokens = torch.zeros(2, config.model.sequence_length, dtype=torch.int64)
    for call in range(3):
        seen.clear()
        objective, _, _ = forward(tokens, tokens, torch.arange(2))
        assert not seen, "while it was recorded"
        objective.backward()
        assert len(seen) == len(parameters) and (call == 0 or min(seen) > 0)
        assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))


SMALL = ("model.num_layers=2", "evaluate.sequences=4", "evaluate.streams=2")
CASES: dict[str, tuple[str, Layout, tuple[str, ...]]] = {
    "every dropout and regulariser": (
        "switchall",
        Layout(zero=0, micro=4),
        ("model.attention.entropy_weight=0.05",),
    ),
    "memory that grows": (
        "switchall xl",
        Layout(micro=4, zero=2, recompute="full"),
        ('model.position={"type": "xl", "memory_chunks": 2}',),
    ),
    "memory with RoPE": (
        "switchall rope with memory",
        Layout(micro=4, recompute="selective"),
        ("train.precision=bf16",),
    ),
    "documents": ("switchall", Layout(micro=4, tied=True), ("train.precision=bf16", "data.document_mask=true")),
    "documents by Triton's kernels": (
        "switchall",
        Layout(micro=4),
        ("data.document_mask=true", "kernels.backend=triton"),
    ),
    "MoA": ("moa", Layout(micro=4), ()),
    "offloaded": ("dense", Layout(micro=4, tied=True), ("parallel.offload_optimizer=true",)),
}
QUICK = ("every dropout and regulariser", "memory that grows")


def configs(prepared: Path, *names: str) -> list[Config]:
    cases = [CASES[name] for name in names]
    return [config_of(prepared, m, layout, *SMALL, *keys, with_dropouts=True) for m, layout, keys in cases]


def test_replayed_steps_are_launched_ones(prepared: Path) -> None:
    check(1, configs(prepared, *QUICK))


@pytest.mark.slow
def test_in_every_other_kind_of_run(prepared: Path) -> None:
    check(1, configs(prepared, *(name for name in CASES if name not in QUICK)))


@pytest.mark.slow
def test_on_two_ranks(prepared: Path) -> None:
    layouts = [Layout(micro=2), Layout(micro=2, tied=True), Layout(micro=2, zero=2)]
    precisions = ["bf16", "bf16", "fp32"]
    check(
        2,
        [
            config_of(prepared, "switchall", layout, *SMALL, f"train.precision={p}", with_dropouts=True)
            for layout, p in zip(layouts, precisions, strict=True)
        ],
    )
