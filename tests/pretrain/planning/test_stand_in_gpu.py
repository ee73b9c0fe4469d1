"""Steps of every kind of layout on a stand-in of a GPU: no operator joins the GPU and the CPU, and no tensor of the CPU
goes to NCCL, in training, in its details and in evaluation. On CPUs neither would show."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.engine.step_sums import StepReducer
from tests.harness import run_ranks
from tests.pretrain.planning.played import played_calls
from tests.pretrain.planning.stand_in_gpu import stand_in_gpu
from tests.pretrain.runs import small_config

SIZES = (
    *("model.num_layers=2", "model.attention.num_heads=4", "model.feedforward.num_experts=8"),
    *("model.sequence_length=8", "batch.global_sequences=8", "batch.micro_sequences=1", "train.precision=bf16"),
)
TP, PP, EP = ("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2",), ("parallel.expert=2",)
FEW: dict[str, tuple[int, tuple[str, ...]]] = {"TP2 SP": (4, TP), "PP2 EP2": (8, (*PP, *EP))}
MANY = {
    "ZeRO 0": (4, ("parallel.zero=0", "train.precision=fp32")),
    "ZeRO 1": (4, ()),
    "ZeRO 1, fp32": (4, ("train.precision=fp32",)),
    "ZeRO 1, sums in bf16": (4, ("parallel.reduce_dtype=bf16",)),
    "ZeRO 2": (4, ("parallel.zero=2",)),
    "ZeRO 3": (4, ("parallel.zero=3",)),
    "TP2": (4, ("parallel.tensor=2",)),
    "TP2 SP ZeRO 3": (4, (*TP, "parallel.zero=3")),
    "TP2 SP, entropy of a micro-step": (4, (*TP, "model.feedforward.entropy_scope=micro_batch")),
    "TP2 SP, recomputed": (4, (*TP, "train.recompute=full")),
    "TP2 SP EP2 ZeRO 2": (8, (*TP, *EP, "parallel.zero=2")),
    "TP2 SP PP2, Transformer-XL": (8, (*TP, *PP, "model.position.type=xl")),
    "PP4 tied": (8, ("parallel.pipeline=4", "model.num_layers=4", "model.tied_embedding=true")),
    "PP2, fp16": (4, (*PP, "train.precision=fp16")),
    "TP2 SP PP2 EP2": (8, (*TP, *PP, *EP)),
    "offloaded": (4, ("parallel.offload_optimizer=true",)),
    "offloaded, ZeRO 2": (4, ("parallel.offload_optimizer=true", "parallel.zero=2")),
    "offloaded, ZeRO 3": (4, ("parallel.offload_optimizer=true", "parallel.zero=3")),
    "averaged": (4, ("train.ema_decay=0.9",)),
}


def refused_calls(rank: int, runs: list[tuple[Config, int]]) -> list[list[str]]:
    """Of each run, what NCCL would refuse of what the last rank calls."""
    dist.destroy_process_group()  # of this process alone, which plays others
    with stand_in_gpu() as device:
        calls = [played_calls(config, ranks, ranks - 1, device) for config, ranks in runs]
    return [[f"{call.kind}: {call.refused}" for call in of_run if call.refused] for of_run in calls]


def refused_elsewhere(rank: int, runs: list[tuple[Config, int]]) -> list[list[str]]:
    """The same with a mistake."""
    with mock.patch.object(StepReducer, "__call__", _on_the_cpu(StepReducer.__call__)):
        return refused_calls(rank, runs)


def _on_the_cpu(reduce: Any) -> Any:
    def planted(reducer: StepReducer, *given: Any) -> Any:
        dist.all_reduce(torch.ones(3), group=reducer._parallel.data_group)
        return reduce(reducer, *given)

    return planted


def runs_of(prepared: Path, layouts: dict[str, tuple[int, tuple[str, ...]]]) -> list[tuple[Config, int]]:
    return [(small_config(prepared, *SIZES, *overrides), ranks) for ranks, overrides in layouts.values()]


def test_no_tensor_of_the_cpu_goes_to_nccl(prepared: Path) -> None:
    assert run_ranks(refused_calls, 1, runs_of(prepared, FEW)) == [[[]] * len(FEW)]


def test_one_that_does_is_found(prepared: Path) -> None:
    (found,) = run_ranks(refused_elsewhere, 1, runs_of(prepared, {"ZeRO 1": MANY["ZeRO 1"]}))
    assert found == [["all_reduce: a tensor is on cpu"]]


@pytest.mark.slow  # the fast one: test_no_tensor_of_the_cpu_goes_to_nccl
def test_nor_in_other_layouts(prepared: Path) -> None:
    assert run_ranks(refused_calls, 1, runs_of(prepared, MANY), timeout_seconds=600.0) == [[[]] * len(MANY)]
