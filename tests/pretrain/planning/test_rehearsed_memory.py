"""What a rehearsed step says of memory, beside what a CPU's allocator counts in a real run of the same layout."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.planning.rehearsal import rehearse
from tests.harness import run_ranks
from tests.pretrain.runs import one_step, small_config, trainer_of

SIZES = (
    "model.d_model=192",
    "model.num_layers=4",
    "model.sequence_length=64",
    "batch.micro_sequences=1",
    "model.attention.num_heads=4",
    "model.attention.head_dim=48",
    "model.feedforward.num_experts=8",
    "model.feedforward.expert_size=96",
    "deepspeed.zero_optimization.reduce_bucket_size=200000",
    "checkpoint.asynchronous=false",  # the copies of a checkpoint are in CPU memory, which is not estimated here
)
XL, BF16 = "model.position.type=xl", "train.precision=bf16"
TP2, SP, PP2, EP2 = "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.expert=2"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "one rank, XL, bf16": (1, (XL, BF16)),
    "ZeRO 1, recomputed": (2, ("train.recompute=full",)),
    "ZeRO 1 in bf16, selective": (2, (BF16, "train.recompute=selective")),
    "ZeRO 2, XL": (2, ("parallel.zero=2", XL)),
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "ZeRO 3 in bf16, XL, recomputed": (4, ("parallel.zero=3", BF16, XL, "train.recompute=full")),
    "TP2 SP": (2, (TP2, SP)),
    "TP2 XL": (2, (TP2, XL)),
    "PP2": (2, (PP2,)),
    "PP2 in bf16, recomputed": (2, (PP2, BF16, "train.recompute=full")),
    "EP2": (2, (EP2,)),
    "TP2 PP2": (4, (TP2, PP2)),
    "TP2 SP EP2 in bf16": (4, (TP2, SP, EP2, BF16)),
    "TP2 PP2 DP2 SP EP2": (8, (TP2, PP2, SP, EP2)),
}


class Memory(NamedTuple):
    resting: int
    """Bytes between steps."""
    peak: int
    """At the highest point of a step."""


def measured(rank: int, config: Config) -> Memory:
    """Of this rank. What the allocator counts before the trainer is built is no part."""
    progress = Progress(0, 0)
    with _counting() as built:
        trainer = trainer_of(config)
        for _ in range(2):
            one_step(trainer, progress)
            progress = progress.after_step(config.batch.global_sequences, updated=True)
        gc.collect()
    with _counting() as stepped:
        one_step(trainer, progress)
    trainer.close()
    resting = _course(built)[0]
    return Memory(resting, resting + _course(stepped)[1])


def _counting() -> profile:
    # gloo's threads release what the main one allocated.
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True, experimental_config=everywhere)


def _course(profiler: Any) -> tuple[int, int]:
    """Bytes above the beginning: at the end, and at the highest point."""
    events = profiler.profiler.kineto_results.events()
    now = highest = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        highest = max(highest, now)
    return now, highest


def rehearsed(rank: int, config: Config, num_ranks: int) -> list[Memory]:
    dist.destroy_process_group()  # of this process alone, which plays others
    found = []
    for each in range(num_ranks):
        told = rehearse(config, num_ranks, each, "cpu", most_micro_steps=99)
        found.append(Memory(sum(told.resting.values()), told.peak))
    return found


# That a rehearsal runs, and what its parts are, the fast tests of tests/pretrain/preflight hold.
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_allocator_counts(prepared: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What rests within 10%, the highest point within 20%, for every rank."""
    ranks, overrides = CASES[name]
    config = small_config(prepared, *SIZES, *overrides)
    real = run_ranks(measured, ranks, config)
    (told,) = run_ranks(rehearsed, 1, config, ranks)
    worst = max(range(ranks), key=lambda rank: abs(told[rank].peak / real[rank].peak - 1))
    with capsys.disabled():
        rests = [t.resting / r.resting for t, r in zip(told, real, strict=True)]
        peaks = [t.peak / r.peak for t, r in zip(told, real, strict=True)]
        print(
            f"\n| {name} | {ranks} | {real[worst].resting:,} | {min(rests):.3f} to {max(rests):.3f} "
            f"| {real[worst].peak:,} | {min(peaks):.3f} to {max(peaks):.3f} |"
        )
    for rank, (expected, found) in enumerate(zip(real, told, strict=True)):
        assert found.resting == pytest.approx(expected.resting, rel=0.1), f"rank {rank}"
        assert found.peak == pytest.approx(expected.peak, rel=0.2), f"rank {rank}"
