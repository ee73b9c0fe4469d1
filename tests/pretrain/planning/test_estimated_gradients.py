"""The estimate of memory beside a rehearsed step, which runs DeepSpeed's own code: gradients of every ZeRO stage and
precision, with one micro-step and with several, on few and on many ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.parallel.layout import mesh
from pretrain.planning.gradients import fullest_rank
from pretrain.planning.memory import estimate
from pretrain.planning.rehearsal import rehearse
from tests.harness import run_ranks
from tests.pretrain.runs import small_config

SIZES = (
    "model.d_model=96",
    "model.num_layers=3",
    "model.sequence_length=64",
    "model.attention.num_heads=4",
    "model.attention.head_dim=24",
    "model.feedforward.num_experts=8",
    "model.feedforward.expert_size=48",
    "batch.micro_sequences=1",
    "train.cuda_graph=off",  # a rehearsal records none
)
BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=50000"
"""Elements: a tenth of the model. Without it all gradients are one bucket, as of a small model in practice."""
SMALL = "deepspeed.zero_optimization.reduce_bucket_size=37500"
"""Elements: fewer than the embedding has, more than any matrix of a block, as of a large vocabulary in practice."""
LARGE = "deepspeed.zero_optimization.reduce_bucket_size=600000"
"""More than the model has."""
BF16, FULL = "train.precision=bf16", "train.recompute=full"


def at_zero(stage: int, *keys: str) -> tuple[str, ...]:
    return (f"parallel.zero={stage}", *([BUCKET] if stage else []), *keys)


FAST: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "ZeRO 0: buckets are copied after the backward pass": (2, 2, at_zero(0)),
    "ZeRO 1 in bf16: the share lies beside the sums": (2, 2, at_zero(1, BF16, FULL)),
    "ZeRO 2 in bf16: no bucket holds the largest parameter": (
        2,
        1,
        ("parallel.zero=2", "model.num_layers=1", SMALL, BF16, FULL),
    ),
}
"""Number of ranks, micro-steps, settings."""
TABLE = {
    f"{ranks} ranks, ZeRO {stage}, {precision}, {micro_steps} micro-steps, {recompute}": (
        ranks, micro_steps, at_zero(stage, f"train.precision={precision}", f"train.recompute={recompute}"),
    )
    for ranks, stage, precision, micro_steps, recompute in itertools.product(
        (1, 2, 8), (0, 1, 2), ("fp32", "bf16"), (1, 4), ("none", "full")
    )
    if not (stage == 0 and precision == "bf16")
}  # fmt: skip
OTHERS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "ZeRO 2: each micro-step has a share beside the sum": (2, 2, at_zero(2)),
    "ZeRO 1 in bf16: gradients go as buckets are reduced": (8, 1, at_zero(1, BF16)),
    "ZeRO 2 in fp16: one bucket, which is sent in fp32": (8, 2, ("parallel.zero=2", LARGE, "train.precision=fp16")),
    "ZeRO 1 alone: the share is as large as the sums": (1, 1, at_zero(1, BF16)),
    "ZeRO 2 in bf16: the sum is what is updated": (4, 1, at_zero(2, BF16)),
    "one bucket": (2, 2, ("parallel.zero=1", BF16)),
    "XL memory": (2, 4, at_zero(1, BF16, "model.position.type=xl")),
    "tied": (2, 1, at_zero(2, BF16, "model.tied_embedding=true")),
    "one optimizer group": (2, 4, at_zero(1, "optimizer.weight_decay=0.0")),
    "moving average": (2, 1, at_zero(1, BF16, "train.ema_decay=0.99")),
    "sent in fp32": (2, 4, at_zero(2, BF16, "parallel.reduce_dtype=fp32")),
    "two buckets": (2, 4, at_zero(2, "deepspeed.zero_optimization.overlap_comm=true")),
    "selective": (2, 1, at_zero(1, BF16, "train.recompute=selective")),
    "fp16": (2, 4, at_zero(1, "train.precision=fp16")),
    "fp16, ZeRO 2": (2, 1, at_zero(2, "train.precision=fp16")),
    "one bucket, ZeRO 2": (2, 1, ("parallel.zero=2",)),
}


def highest(rank: int, cases: list[tuple[Config, int, str]]) -> list[int]:
    """Of each case the bytes of the rank that holds most."""
    dist.destroy_process_group()  # of this process alone, which plays others
    return [rehearse(config, ranks, fullest_rank(config, ranks, 0), device).peak for config, ranks, device in cases]


def check(prepared: Path, table: dict[str, tuple[int, int, tuple[str, ...]]], device: str) -> None:
    """An estimate may be a little above: of the ranks it takes the one with most, at each point of a step."""
    configs = [
        small_config(prepared, *SIZES, *keys, f"batch.global_sequences={ranks * micro_steps}")
        for ranks, micro_steps, keys in table.values()
    ]
    cases = [(config, ranks, device) for config, (ranks, _, _) in zip(configs, table.values(), strict=True)]
    (found,) = run_ranks(highest, 1, cases)
    ratios = {
        name: round(estimate(config, ranks, device).total / peak, 3)
        for name, (config, ranks, _), peak in zip(table, cases, found, strict=True)
    }
    print(f"lowest {min(ratios.values())}, highest {max(ratios.values())}")
    assert not {name: ratio for name, ratio in ratios.items() if not 0.98 < ratio < 1.1}, ratios


def test_an_estimate_is_what_a_rehearsed_step_holds(prepared: Path) -> None:
    check(prepared, FAST, "cuda")


def of_gloo(rank: int, config: Config) -> list[tuple[int, int]]:
    """What gloo has at the highest point of a step of 2 ranks, on CPUs and on GPUs, and the weights."""
    dist.destroy_process_group()
    steps = [rehearse(config, 2, 1, device) for device in ("cpu", "cuda")]
    return [(step.at_peak.get("gloo", 0), step.resting["weights"]) for step in steps]


@pytest.mark.slow  # the fast one: test_an_estimate_is_what_a_rehearsed_step_holds
def test_on_cpus_gloo_copies_the_weights_that_ranks_gather(prepared: Path) -> None:
    """More than the rest of the update where a rank's share is small; with an offloaded optimizer the highest point."""
    keys = (*SIZES, BUCKET, "parallel.zero=2", "parallel.offload_optimizer=true", "optimizer.weight_decay=0.0")
    config = small_config(prepared, *keys, "batch.global_sequences=2", "model.sequence_length=16")
    (((copied, weights), (none, _)),) = run_ranks(of_gloo, 1, config)
    assert copied == weights > 0 == none
    check(prepared, {"ZeRO 2": (8, 1, at_zero(2, BF16, "model.sequence_length=16"))}, "cpu")


# FAST has most of these rows' reasons.
@pytest.mark.slow
@pytest.mark.parametrize("table", [TABLE, OTHERS], ids=["all stages", "others"])
def test_every_estimate(prepared: Path, table: dict[str, tuple[int, int, tuple[str, ...]]]) -> None:
    check(prepared, table, "cuda")


DIVIDED: dict[str, tuple[str, ...]] = {
    "TP2 in bf16": ("parallel.tensor=2", BF16),
    "ZeRO 1": ("parallel.tensor=2",),
    "ZeRO 2, offloaded": ("parallel.zero=2", "parallel.offload_optimizer=true", BF16),
    "EP2 in bf16": ("parallel.expert=2", BF16),
    "EP2": ("parallel.expert=2",),
    "PP2": ("parallel.pipeline=2",),
}


def peaks_of_the_first_stage(rank: int, config: Config) -> dict[int, int]:
    """Of 4 ranks: those with the first part of each layer."""
    dist.destroy_process_group()
    ranks = mesh(config, config.data_size(4))[0, :, 0].tolist()
    return {each: rehearse(config, 4, each, "cuda", most_micro_steps=99).peak for each in ranks}


@pytest.mark.slow  # the fast one: test_an_estimate_is_what_a_rehearsed_step_holds
@pytest.mark.parametrize("name", DIVIDED)
def test_no_rank_holds_more_than_the_one_that_is_rehearsed(prepared: Path, name: str) -> None:
    config = small_config(prepared, *SIZES, BUCKET, *DIVIDED[name])
    data_size = config.data_size(4)
    config = config.replaced("batch", global_sequences=data_size)  # of more micro-steps, other points are the highest
    (peaks,) = run_ranks(peaks_of_the_first_stage, 1, config)
    assert peaks[fullest_rank(config, data_size, 0)] == max(peaks.values()) > 1.01 * min(peaks.values()), peaks
