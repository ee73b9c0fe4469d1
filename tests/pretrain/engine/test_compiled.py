"""Compiled blocks (train.compile) give the numbers of blocks that run operator by operator. The programs are
traced and differentiated as in a run, and computed by torch's operators (backend aot_eager): Inductor compiles C++ for
half a minute, so it runs in the slow tier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from common.errors import UserError
from model.kernels.choice import Backends
from model.language_model import LanguageModel, build_model, routing_statistics
from model.layers import Block
from model.memory import layer_memories
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine.compiled import _reason, compile_blocks
from tests.harness import run_ranks
from tests.marks import NO_SPACE
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import one_step, trainer_of

SEQUENCES = torch.arange(4)


class Passes(NamedTuple):
    """What two steps of two micro-steps, and a validation between them, gave."""

    losses: list[Tensor]
    gradients: dict[str, Tensor]
    counts: dict[str, Tensor]
    """Loads, and memory after the steps."""


def model_of(config: Config) -> LanguageModel:
    backends = Backends.choose("auto", config.model, device_type="cpu", dtype=torch.float32)
    return build_model(config.model, backends=backends, seed=3, recompute=config.train.recompute)


def passes(model: LanguageModel) -> Passes:
    losses, T = [], model.config.sequence_length
    for _, memory in layer_memories(model):
        memory.assign(SEQUENCES, len(SEQUENCES))
    for step in range(2):
        tokens = torch.randint(0, model.config.vocab_size, (4, T + 1), generator=torch.Generator().manual_seed(step))
        for rows in (slice(0, 2), slice(2, 4)):
            with set_checkpoint_early_stop(step == 0):  # a repetition that goes to its end must count nothing either
                objective, of_sequences, auxiliary = model(
                    tokens[rows, :-1], tokens[rows, 1:], SEQUENCES[rows] + 4 * step
                )
            objective.backward()
            losses += [objective.detach(), of_sequences, auxiliary]
        for _, memory in layer_memories(model):
            memory.advance()
        model.eval()
        with torch.no_grad():
            losses.append(model(tokens[:2, :-1], tokens[:2, 1:], SEQUENCES[:2])[0])
        model.train()
        for _, memory in layer_memories(model):
            memory._written = None
    counts = {f"load {name}": statistics.load.clone() for name, statistics in routing_statistics(model)}
    counts |= {f"memory {name}": memory.kept for name, memory in layer_memories(model) if memory.kept is not None}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Passes(losses, gradients, counts)


def check_passes(config: Config, backend: str) -> None:
    eager, compiled = model_of(config), model_of(config)
    compile_blocks(compiled, config.model, backend=backend)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    expected, found = passes(eager), passes(compiled)
    torch.testing.assert_close(found.losses, expected.losses, rtol=2e-6, atol=1e-7)
    assert found.gradients.keys() == expected.gradients.keys() == dict(eager.named_parameters()).keys()
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name] - gradient).norm() / gradient.norm()
        assert error < 5e-6, f"{name}: {error:.1e}"
    assert found.counts.keys() == expected.counts.keys()
    for name, count in expected.counts.items():
        torch.testing.assert_close(found.counts[name], count, rtol=2e-6, atol=1e-6, msg=name)


ONE_LAYER = "model.num_layers=1"
CASES: dict[str, tuple[str, Layout, tuple[str, ...], bool]] = {
    "every dropout, recomputed": (
        "switchall",
        Layout(recompute="full"),
        (ONE_LAYER, "model.attention.entropy_weight=0.05"),
        True,
    ),
    "memory that grows": ("switchall xl", Layout(), (ONE_LAYER,), False),
    "blocks that share a program": ("switchall", Layout(), ("model.num_layers=3",), False),
    "memory with RoPE": ("switchall rope with memory", Layout(recompute="full"), (), True),
    "documents": ("switchall", Layout(), ("data.document_mask=true",), False),
    "MoA": ("moa", Layout(), (), True),
    "dense": ("dense", Layout(), (), True),
}
QUICK = ("every dropout, recomputed",)


def config(prepared: Path, name: str) -> Config:
    model, layout, keys, with_dropouts = CASES[name]
    return config_of(prepared, model, layout, *keys, with_dropouts=with_dropouts)


@pytest.mark.parametrize("name", QUICK)
def test_compiled_blocks_compute_what_their_operators_do(prepared: Path, name: str) -> None:
    check_passes(config(prepared, name), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_in_every_kind_of_block(prepared: Path, name: str) -> None:
    """Its fast form: test_compiled_blocks_compute_what_their_operators_do."""
    check_passes(config(prepared, name), "aot_eager")


@NO_SPACE
@pytest.mark.slow
@pytest.mark.parametrize("name", ["every dropout, recomputed", "memory that grows"])
def test_inductor_computes_what_operators_do(prepared: Path, name: str) -> None:
    """Its fast form: test_compiled_blocks_compute_what_their_operators_do."""
    check_passes(config(prepared, name), "inductor")


@pytest.mark.parametrize(
    "name, keys, programs",
    [
        ("switchall", (), 1),
        pytest.param("switchall", ("data.document_mask=true",), 1, marks=pytest.mark.slow),
        ("switchall xl", (), 1),
        pytest.param("switchall", ("train.recompute=full",), 1, marks=pytest.mark.slow),
        ("switchall", ("model.dropout=0.1",), 3),
        pytest.param(
            "switchall", ("model.attention.expert_dropout=0.1", "train.recompute=full"), 3, marks=pytest.mark.slow
        ),
        pytest.param("switchall", ("model.feedforward.expert_dropout=0.1",), 3, marks=pytest.mark.slow),
    ],
)
def test_blocks_without_dropout_share_a_program(
    prepared: Path, name: str, keys: tuple[str, ...], programs: int
) -> None:
    """With dropout, of any kind, each has one of its own, and none has two: of one code torch keeps few."""
    given, compiled = config_of(prepared, name, Layout(), "model.num_layers=3", *keys), []
    model = model_of(given)
    for _, memory in layer_memories(model):
        memory.assign(torch.arange(1), 1)

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    compile_blocks(model, given.model, backend=backend)  # type: ignore[arg-type]
    tokens = torch.zeros(1, given.model.sequence_length, dtype=torch.int64)
    documents = torch.zeros_like(tokens) if given.data.document_mask else None
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            model(tokens, tokens, torch.arange(1), documents)[0].backward()
    assert len(compiled) == programs


def test_what_cannot_be_compiled_is_one_sentence(prepared: Path) -> None:
    given = config_of(prepared, "dense", Layout(), ONE_LAYER)
    model = build_model(given.model, seed=0)
    compile_blocks(model, given.model, backend="aot_eager")
    block = model.blocks[0]
    assert isinstance(block, Block)
    block.feedforward.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    words = r"^train\.compile: the blocks cannot be compiled \([^\n]+\); set it to off$"
    with pytest.raises(UserError, match=words):
        model(tokens, tokens, torch.arange(1))
    with torch.no_grad():
        model(tokens, tokens, torch.arange(1))


def test_what_a_backend_says_is_the_reason(prepared: Path) -> None:
    """What torch wraps it in begins with a line that names the backend and nothing else."""

    def broken(*_: Any) -> Any:
        raise OSError("no compiler\nand more")

    given = config_of(prepared, "dense", Layout(), ONE_LAYER)
    model = build_model(given.model, seed=0)
    compile_blocks(model, given.model, backend=broken)  # type: ignore[arg-type]
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"the blocks cannot be compiled \(OSError: no compiler\); set it to off$"):
        model(tokens, tokens, torch.arange(1))


# ---------------------------------------------------------------------------------------------------------- real runs


def trained(rank: int, configs: list[Config]) -> list[list[tuple[Any, ...]]]:
    """Loss, auxiliary loss and gradient norm of each of three steps."""
    found = []
    for each in configs:
        trainer, steps = trainer_of(each), []
        for step in range(3):
            sums = one_step(trainer, Progress(step, step * each.batch.global_sequences)).sums
            steps.append((sums.loss, sums.auxiliary_loss, sums.grad_norm))
        trainer.close()
        found.append(steps)
    return found


@NO_SPACE
@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(data=2, zero=2), Layout(pipeline=2, micro=4)], ids=str)
def test_runs_of_several_ranks_are_compiled(prepared: Path, layout: Layout) -> None:
    """With Inductor, as in any run. Its fast form: test_compiled_blocks_compute_what_their_operators_do."""
    keys = ("model.num_layers=2", "train.compile=")
    configs = [config_of(prepared, "switchall", layout, keys[0], keys[1] + on) for on in ("off", "on")]
    for eager, compiled in run_ranks(trained, layout.ranks, configs):
        for expected, found in zip(eager, compiled, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        assert len({loss for loss, *_ in eager}) == 3, "nothing was learnt"


def test_why_blocks_cannot_be_compiled_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first line; that of a backend's own error, which says more than the words around it."""
    around: Any = RuntimeError("backend='inductor' raised:")
    around.inner_exception = ValueError("C++ compile error\n\ncommand: g++")
    assert _reason(RuntimeError("\n  Unsupported: a loop.\nmore")) == "Unsupported: a loop"
    assert _reason(RuntimeError()) == "RuntimeError()"
    for place, hint in (("/opt/torch", ""), ("/my home/torch", ", /my home/torch, which may have no space")):
        monkeypatch.setattr(torch, "__path__", [place])
        assert _reason(around) == "ValueError: C++ compile error" + (
            hint and f": torch gives the compiler its own path{hint}"
        )
        assert "no space" not in _reason(RuntimeError("Unsupported"))
