"""A loss or gradient that is not finite on one rank: no rank updates, nothing changes, training goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.language_model import routing_statistics
from model.memory import layer_memories
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine.zero_state import optimizer_steps, pieces
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import outcome, spoil_gradient, spoil_loss, spoil_losses_of_steps, train_with
from tests.pretrain.runs import events, light_config, metrics, one_step, small_config, trainer_of

QUICK = [
    ("train.precision=fp32", "parallel.zero=0", "model.position.type=xl"),
    ("train.precision=fp32", "parallel.zero=1"),
    ("train.precision=bf16", "parallel.zero=2"),
    ("train.precision=fp32", "parallel.zero=3"),
    ("train.precision=fp32", "parallel.pipeline=2"),
    ("train.precision=bf16", "parallel.offload_optimizer=true", "parallel.zero=2"),
    ("train.precision=fp32", "parallel.tensor=2", "parallel.zero=1", "model.feedforward.num_experts=6"),
    ("train.precision=fp32", "parallel.tensor=2", "parallel.zero=0", "model.feedforward.num_experts=6"),
    ("train.precision=bf16", "parallel.tensor=2", "parallel.zero=3", "model.feedforward.num_experts=6"),
]
THOROUGH = [
    ("train.precision=bf16", "parallel.zero=1"),
    ("train.precision=fp32", "parallel.zero=2"),
    ("train.precision=bf16", "parallel.zero=3"),
    ("train.precision=bf16", "parallel.pipeline=2"),
    ("train.precision=fp32", "parallel.tensor=2", "parallel.zero=3", "model.feedforward.num_experts=6"),
    ("train.precision=fp32", "parallel.expert=2", "parallel.zero=1", "model.feedforward.num_experts=6"),
    ("train.precision=bf16", "parallel.expert=2", "parallel.zero=2", "model.feedforward.num_experts=6"),
    ("train.precision=fp32", "parallel.offload_optimizer=true", "parallel.zero=2"),
    ("train.precision=bf16", "parallel.offload_optimizer=true", "parallel.zero=1"),
    ("train.precision=bf16", "parallel.offload_optimizer=true", "parallel.zero=3"),
]


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.slow)], ids=["quick", "thorough"])
def test_nothing_changes_in_a_skipped_step(prepared: Path, layouts: list[tuple[str, ...]]) -> None:
    # A pipeline has a layer on each stage.
    configs = [
        small_config(prepared, *layout) if "parallel.pipeline=2" in layout else light_config(prepared, *layout, ranks=2)
        for layout in layouts
    ]
    for results in run_ranks(_skip_and_go_on, 2, configs):
        for layout, (norms, losses, changed, moved, remembered) in zip(layouts, results, strict=True):
            assert [norm is None for norm in norms] == [False, True, True, False], layout
            assert math.isfinite(losses[1]) and not math.isfinite(losses[2]), layout
            assert math.isfinite(losses[3]), layout
            assert not changed, f"{layout}: {changed}"
            assert moved, f"{layout}: the last step did not update"
            # Hidden states that gave no finite loss are forgotten, or they would spoil every step to come.
            assert remembered == ([16, 16, 0, 16] if "model.position.type=xl" in layout else []), layout


def _skip_and_go_on(rank: int, configs: list[Config]) -> list[tuple[list, list, list[str], bool, list[int]]]:
    """A good step, one with a wrong gradient and one with a wrong loss on the last rank, a good one. The last is how
    many tokens the memory has after each."""
    results = []
    for config in configs:
        trainer = trainer_of(config)
        now = [0]
        if rank == 1:
            spoil_gradient(trainer, lambda: now[0] == 1)  # noqa: B023
            spoil_loss(trainer, lambda: now[0] == 2)  # noqa: B023
        norms, losses, changed, remembered, progress = [], [], [], list[int](), Progress(0, 0)
        for now[0] in range(4):
            before = _state(trainer)
            result = one_step(trainer, progress)
            progress = progress.after_step(8)
            after = _state(trainer)
            norms.append(result.sums.grad_norm)
            losses.append(result.sums.loss)
            remembered += [memory.length for _, memory in layer_memories(trainer.engine.module)]
            different = [key for key in before if not torch.equal(before[key], after[key])]
            if now[0] in (1, 2):
                changed += different
        results.append((norms, losses, changed, len(different) > 0, remembered))
        trainer.engine.destroy()
    return results


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all that a skipped step must leave alone."""
    engine, parallel = trainer.engine, trainer.setup.parallel
    state = {"optimizer steps": torch.tensor(optimizer_steps(engine))}
    for piece in pieces(engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=False):
        for kind, value in {"master": piece.master, **piece.moments}.items():
            state[f"{kind} {piece.name} {piece.start}"] = value.clone()
    if engine.zero_optimization_stage() < 3:
        state |= {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for name, statistics in routing_statistics(engine.module):
        state |= {f"{name} {kind}": value.clone() for kind, value in statistics.state().items()}
    return state


def test_skips_are_logged_and_end_the_run_only_in_a_row(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=9", "evaluate.sequences=0", "checkpoint.every_steps=3", "resilience.max_skipped_updates=2")
    config = light_config(prepared, *keys, ranks=2)
    assert run_ranks(train_with, 2, config, tmp_path / "fine", spoil_losses_of_steps, (3, 5), 1) == ["FINISHED"] * 2
    rows = metrics(tmp_path / "fine")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 5]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [3, 5]
    assert [(e["step"], e["in_a_row"]) for e in events(tmp_path / "fine", "skipped_update")] == [(3, 1), (5, 1)]

    endings = run_ranks(train_with, 2, config, tmp_path / "diverged", spoil_losses_of_steps, (4, 5), 0)
    assert all(ending.startswith("DIVERGED: step 5: loss nan: the updates of 2 steps") for ending in endings)
    assert [row["step"] for row in metrics(tmp_path / "diverged")] == [1, 2, 3, 4, 5]
    assert outcome(tmp_path / "diverged")["exit_code"] == 3
    reason = outcome(tmp_path / "diverged")["reason"]
    assert "The last whole checkpoint is that of step 3: resume from it with a lower" in reason
    assert [p.name for p in (tmp_path / "diverged" / "checkpoints").iterdir()] == ["step-00000003"]


def test_the_count_of_skips_is_resumed(prepared: Path, tmp_path: Path) -> None:
    """Two in a row, one on each side of a stop, are two in a row."""
    keys = ("train.steps=9", "evaluate.sequences=0", "resilience.max_skipped_updates=2")
    first = light_config(prepared, *keys, "train.stop_after_steps=4")
    assert run_ranks(train_with, 1, first, tmp_path, spoil_losses_of_steps, (4,), 0) == ["FINISHED"]
    (ending,) = run_ranks(train_with, 1, light_config(prepared, *keys), tmp_path, spoil_losses_of_steps, (5,), 0)
    assert ending.startswith("DIVERGED: step 5")


def overflow_at_a_low_scale(trainer: Trainer) -> None:
    from deepspeed.accelerator import get_accelerator

    assert get_accelerator().is_fp16_supported()
    trainer.engine.optimizer.loss_scaler.cur_scale = 4.0
    spoil_gradient(trainer, lambda: True)


def train_in_fp16(rank: int, config: Config, run_dir: Path) -> str:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # as in test_checkpoint.py
    return train_with(rank, config, run_dir, overflow_at_a_low_scale)


@pytest.mark.parametrize("zero", [1, 3])
def test_overflows_at_the_smallest_loss_scale_are_skips(prepared: Path, tmp_path: Path, zero: int) -> None:
    """The search for a scale has nowhere to go: gradients that are never finite end the run as any others do."""
    keys = ("train.steps=20", "evaluate.sequences=0", "resilience.max_skipped_updates=3", f"parallel.zero={zero}")
    config = light_config(prepared, *keys, "train.precision=fp16")
    (ending,) = run_ranks(train_in_fp16, 1, config, tmp_path)
    # From 4 the scale falls to 2 and 1, after an overflow that DeepSpeed forgives: steps 4 to 6 are those at 1.
    assert ending.startswith("DIVERGED: step 6: loss 5.") or ending.startswith("DIVERGED: step 6: loss 6."), ending
    assert "the updates of 3 steps in a row were skipped" in ending
    assert [row["loss_scale"] for row in metrics(tmp_path)] == [4.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    skips = [(event["step"], event["in_a_row"]) for event in events(tmp_path, "skipped_update")]
    assert skips == [(4, 1), (5, 2), (6, 3)]
