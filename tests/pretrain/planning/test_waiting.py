"""Ranks that wait in every call for those who must come to it, as on GPUs: nobody waits for ever. Between CPUs a
message is sent into a buffer, and its sender goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.planning.record import Call
from tests.harness import run_ranks
from tests.pretrain.planning.played import played_calls
from tests.pretrain.planning.test_stand_in_gpu import EP, PP, SIZES, TP
from tests.pretrain.runs import small_config

FOUR = ("parallel.pipeline=4", "model.num_layers=4")


def waiting(calls: list[list[Call]]) -> list[str]:
    """What each rank waits for in the end, if all wait in each call for all ranks of it; empty if none waits."""
    at = [0] * len(calls)

    def next_call(rank: int) -> Call | None:
        return calls[rank][at[rank]] if at[rank] < len(calls[rank]) else None

    def goes_on(rank: int) -> bool:
        call = next_call(rank)
        if call is None:
            return False
        others = [next_call(other) for other in call.ranks]
        if not all(other is not None and other.ranks == call.ranks for other in others):
            return False
        for other in call.ranks:
            at[other] += 1
        return True

    while any(goes_on(rank) for rank in range(len(calls))):
        pass
    left = [(rank, next_call(rank)) for rank in range(len(calls))]
    return [f"rank {rank}: {call.kind} of {call.ranks}" for rank, call in left if call is not None]


def all_calls(rank: int, config: Config, num_ranks: int) -> list[list[Call]]:
    dist.destroy_process_group()  # of this process alone, which plays others
    return [played_calls(config, num_ranks, each) for each in range(num_ranks)]


def test_who_waits_for_ever() -> None:
    def call(kind: str, *ranks: int) -> Call:
        return Call(kind, ranks, "float32", 8, 32, "update")

    there, back, of_all = call("send", 0, 1), call("send", 1, 0), call("barrier", 0, 1, 2)
    assert waiting([[there, back, of_all], [there, back, of_all], [of_all]]) == []
    assert waiting([[there, back], [back, there]]) == ["rank 0: send of (0, 1)", "rank 1: send of (1, 0)"]
    ring = [call("send", 0, 1), call("send", 1, 2), call("send", 2, 0)]
    assert waiting([[ring[0], ring[2]], [ring[1], ring[0]], [ring[2], ring[1]]]) != []
    assert waiting([[ring[0], ring[2]], [ring[0], ring[1]], [ring[1], ring[2]]]) == []
    assert waiting([[of_all], [of_all], []]) == ["rank 0: barrier of (0, 1, 2)", "rank 1: barrier of (0, 1, 2)"]


@pytest.mark.parametrize(
    "ranks, overrides",
    [
        (4, (*FOUR, "batch.global_sequences=5")),
        pytest.param(8, (*FOUR, "model.tied_embedding=true"), marks=pytest.mark.slow),
        pytest.param(8, (*TP, *PP), marks=pytest.mark.slow),
        pytest.param(8, (*PP, *EP), marks=pytest.mark.slow),
        pytest.param(8, (*TP, *EP), marks=pytest.mark.slow),
        pytest.param(4, (*TP, "parallel.zero=3"), marks=pytest.mark.slow),
    ],
)
def test_nobody_does(prepared: Path, ranks: int, overrides: tuple[str, ...]) -> None:
    """Whatever a rank calls is in one queue here, where NCCL has some: stricter than it is, but for the first call of
    a group, which keeps the host too."""
    config = small_config(prepared, *SIZES, *overrides)
    ((calls),) = run_ranks(all_calls, 1, config, ranks, timeout_seconds=600.0)
    assert min(map(len, calls)) > 10
    assert waiting(calls) == []
