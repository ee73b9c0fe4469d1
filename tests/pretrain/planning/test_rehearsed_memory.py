"""What a rehearsed step says of memory, beside what a CPU's allocator counts in a real run of the same layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.planning.layout_plan import decisive_stages
from pretrain.planning.rehearsal import rehearse
from tests.harness import run_ranks
from tests.pretrain.planning.counted_memory import build, counted
from tests.pretrain.runs import small_config

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
    "ZeRO 2, offloaded": (2, ("parallel.zero=2", "parallel.offload_optimizer=true")),
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


def rehearsed(rank: int, config: Config, num_ranks: int) -> list[tuple[int, int]]:
    """Bytes between steps and at the highest point of one, of every rank."""
    dist.destroy_process_group()  # of this process alone, which plays others
    played = [rehearse(config, num_ranks, each, "cpu", most_micro_steps=99) for each in range(num_ranks)]
    return [(sum(each.resting.values()), each.peak) for each in played]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("NOT TESTED: there is no C compiler to build the counter of allocations")
    return build(tmp_path_factory.mktemp("allocations"), compiler)


# That a rehearsal runs, and what its parts are, the fast tests of tests/pretrain/preflight hold.
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_allocator_counts(
    prepared: Path, library: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What rests within 5%, the highest point within 10%, for every rank."""
    ranks, overrides = CASES[name]
    config = small_config(prepared, *SIZES, *overrides)
    real = counted(config, ranks, library)
    (told,) = run_ranks(rehearsed, 1, config, ranks)
    rests = [resting / found.resting for (resting, _), found in zip(told, real, strict=True)]
    peaks = [peak / found.peak for (_, peak), found in zip(told, real, strict=True)]
    worst = max(range(ranks), key=lambda rank: abs(peaks[rank] - 1))
    with capsys.disabled():  # the rows of a table of docs/planning.md
        found = real[worst]
        print(
            f"\n| {name} | {ranks} | {found.resting / 1e6:.2f} | {min(rests):.3f} to {max(rests):.3f} "
            f"| {found.peak / 1e6:.2f} | {min(peaks):.3f} to {max(peaks):.3f} | {found.resident / 1e6:.0f} |"
        )
    assert rests == pytest.approx([1.0] * ranks, rel=0.05)
    assert peaks == pytest.approx([1.0] * ranks, rel=0.1)


def peaks_of_stages(rank: int, config: Config, num_ranks: int) -> list[int]:
    dist.destroy_process_group()  # of this process alone, which plays others
    stages = config.parallel.pipeline
    return [rehearse(config, num_ranks, stage * num_ranks // stages, "cuda").peak for stage in range(stages)]


# Which stages these are, test_search.py holds.
@pytest.mark.slow
@pytest.mark.parametrize(
    "layers, stages, keys",
    [(10, 6, ()), (6, 4, (BF16, "train.recompute=full")), (6, 4, (TP2, SP)), (13, 8, (BF16, "train.recompute=full"))],
)
def test_a_decisive_stage_needs_most(prepared: Path, layers: int, stages: int, keys: tuple[str, ...]) -> None:
    keys = (*SIZES, *keys, f"model.num_layers={layers}", f"parallel.pipeline={stages}", "batch.global_sequences=32")
    config = small_config(prepared, *keys)
    (peaks,) = run_ranks(peaks_of_stages, 1, config, stages * config.parallel.tensor)
    decisive = decisive_stages(config)
    assert max(peaks) == max(peaks[stage] for stage in decisive) and len(decisive) < stages
