"""The memory of a CPU that a checkpoint on its way is said to take, beside what it takes in real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.units import GIB
from pretrain.checkpoint.saver import _layout_in_buffer
from pretrain.checkpoint.state import owned_state
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.planning.fit import fit
from pretrain.planning.layout_plan import staging_bytes
from pretrain.planning.machine import MachineOptions, machine
from pretrain.planning.memory import USABLE, estimate
from pretrain.planning.step_time import held_by_stages
from pretrain.report.memory_text import memory_rows
from tests.harness import run_ranks
from tests.pretrain.runs import one_step, small_config, trainer_of

XL, EXPERTS = "model.position.type=xl", ("parallel.expert=2", "model.feedforward.num_experts=4")
SAVED: list[tuple[str, ...]] = [
    (XL, *EXPERTS),
    ("parallel.zero=0", "train.ema_decay=0.9"),
    ("parallel.tensor=2", "parallel.sequence=true", *EXPERTS[1:], XL),
    ("parallel.pipeline=2", XL),
]
"""Settings of two ranks: what is divided over fewer of them than data-parallel ones, what all hold, memory."""
RANDOM_STATE, OF_A_TENSOR = 5056, 128
"""Bytes that a checkpoint has besides: torch's random numbers, and what fills a tensor up."""


def buffers(rank: int, configs: list[Config]) -> list[tuple[int, int]]:
    """Bytes of this rank's buffer for a checkpoint, and how many tensors are in it."""
    found = []
    for config in configs:
        trainer, progress = trainer_of(config), Progress(0, 0)
        for _ in range(2):  # then there is memory
            one_step(trainer, progress)
            progress = progress.after_step(config.batch.global_sequences, updated=True)
        state = owned_state(trainer.engine, trainer.setup.parallel)
        found.append((_layout_in_buffer(state)[1], sum(len(fragments.chunks) for fragments in state.values())))
        trainer.close()
    return found


def test_the_buffer_of_a_checkpoint_holds_a_ranks_share_of_the_state(prepared: Path) -> None:
    configs = [small_config(prepared, "model.feedforward.expert_size=60", *keys) for keys in SAVED]
    for config, *of_ranks in zip(configs, *run_ranks(buffers, 2, configs), strict=True):
        stages, data_size = held_by_stages(config, config.data_size(2)), config.data_size(2)
        told = [staging_bytes(config, held, 2 // len(stages), data_size) for held in stages]
        for rank, (size, tensors) in enumerate(of_ranks):
            expected = told[rank * len(stages) // 2]
            # Of what all tensor-parallel ranks share the second one saves nothing.
            least = 0.9 if config.parallel.tensor > 1 else 1.0
            assert least * expected <= size <= expected + RANDOM_STATE + OF_A_TENSOR * tensors, (config, rank)
        waiting = config.replaced("checkpoint", asynchronous=False)
        assert staging_bytes(waiting, stages[0], 2, data_size) == 0


@pytest.mark.parametrize("keys", [(), pytest.param(("parallel.pipeline=2",), marks=pytest.mark.slow)])
def test_a_run_that_fits_a_cpu_without_the_copy_alone_does_not_fit(
    prepared: Path, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole model, which is traced, and of stages, which are rehearsed."""
    monkeypatch.setattr("pretrain.planning.fit.cheapest_change", lambda *_: (None, 0))  # what is advised takes longest
    config = small_config(prepared, *keys)
    waiting = config.replaced("checkpoint", asynchronous=False)

    def report(config: Config, size: float) -> tuple[bool | None, int]:
        found = fit(config, machine(MachineOptions(gpu="cpu", gpus=2, memory_gib=size / GIB)))
        return found.fits, found.needed

    alone, (_, with_copy) = report(waiting, GIB)[1], report(config, GIB)
    data_size, stages = config.data_size(2), config.parallel.pipeline
    copies = [staging_bytes(config, held, 2 // stages, data_size) for held in held_by_stages(config, data_size)]
    assert 0 < min(copies) <= with_copy - alone <= max(copies)
    between = (alone + with_copy) / 2 / USABLE
    assert report(waiting, between)[0] is True
    assert report(config, between)[0] is False


def test_the_largest_micro_batch_leaves_room_for_the_copy(prepared: Path) -> None:
    """Of two ranks with a sequence each. Beside a GPU the copy takes none of it."""
    config = small_config(prepared, "batch.global_sequences=2", "batch.micro_sequences=1")
    waiting = config.replaced("checkpoint", asynchronous=False)
    copy = staging_bytes(config, held_by_stages(config, 2)[0], 2, 2)
    capacity = int((estimate(config, 2, "cpu").total + copy / 2) / USABLE)
    with_copy, without = memory_rows(config, 2, "cpu", capacity), memory_rows(waiting, 2, "cpu", capacity)
    assert [rows[1].value for rows in (with_copy, without)] == ["none", "1"]
    assert "more for the copy that a checkpoint is written from" in with_copy[0].formula
    assert "GiB with that copy" in with_copy[1].formula and "copy" not in without[0].formula + without[1].formula
    assert memory_rows(config, 2, "cuda", capacity) == memory_rows(waiting, 2, "cuda", capacity)
