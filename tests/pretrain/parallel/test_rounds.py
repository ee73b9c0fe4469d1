"""The largest of every rank's numbers reaches every rank in as many rounds as the number of ranks has binary digits."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from benchmarks.scale.control import play
from pretrain.parallel import rounds
from pretrain.parallel.rounds import maximum
from tests.harness import run_ranks


def test_every_rank_has_the_maximum_whatever_their_number() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in range(1, 70):
        values = [torch.randint(-(2**62), 2**62, (3,), generator=generator) for _ in range(size)]
        values[size // 2][0] = torch.iinfo(torch.int64).min
        expected, played = torch.stack(values).amax(0), play(values)
        assert all(torch.equal(result, expected) for result in played.results), size
        assert played.rounds == (size - 1).bit_length() and len(played.results) == size
        assert played.bytes_sent == played.rounds * 24


def _both(rank: int) -> tuple[list[int], list[int]]:
    values = torch.tensor([rank, -rank, 7, (rank * 5) % 3])
    reduced = values.clone()
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    ring = maximum(values, dist.group.WORLD)
    assert torch.equal(ring, reduced) and values.tolist()[0] == rank
    rounds.AROUND_THE_RING = 1
    assert torch.equal(maximum(values, dist.group.WORLD), reduced)
    part = dist.new_group([1, 3, 4])  # whose own numbers are others
    if rank in (1, 3, 4):
        assert torch.equal(maximum(values, part), torch.tensor([4, -1, 7, 2]))
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as device.py sets it for many ranks
    group = dist.new_group(backend="gloo")
    everybody: list[int] | None = [-1] * 5 if rank == 0 else None
    found = [maximum(values, group) for _ in range(3)][-1]
    dist.gather_object(rank, everybody, group=group)
    assert everybody in (None, [0, 1, 2, 3, 4])
    return found.tolist(), reduced.tolist()


def test_over_gloo_it_is_the_reduction_of_all_ranks() -> None:
    """Up to 16 ranks gloo's own; in rounds; and in rounds of ranks that connect when they first speak."""
    for found, reduced in run_ranks(_both, 5):
        assert found == reduced == [4, 0, 7, 2]


def test_its_messages_are_taken_for_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the same two ranks a pipeline may have sent what is not taken yet, with torch's tag 0. Its ranks are
    those of the group, whatever their numbers among all."""
    seen: list[tuple[str, int, int, str]] = []

    def isend(values: torch.Tensor, *, group: str, group_dst: int, tag: int = 0) -> None:
        seen.append((group, group_dst, tag, "sent"))

    def recv(values: torch.Tensor, *, group: str, group_src: int, tag: int = 0) -> None:
        seen.append((group, group_src, tag, "taken"))
        values.fill_(len(seen))

    monkeypatch.setattr(dist, "get_world_size", lambda group: 20)
    monkeypatch.setattr(dist, "get_rank", lambda group: 3)
    monkeypatch.setattr(dist, "isend", isend)
    monkeypatch.setattr(dist, "recv", recv)
    assert maximum(torch.tensor([7, 70]), "control").tolist() == [10, 70]
    assert [(way, rank) for _, rank, _, way in seen] == [
        pair for d in (1, 2, 4, 8, 16) for pair in (("sent", (3 + d) % 20), ("taken", (3 - d) % 20))
    ]
    assert {(group, tag) for group, _, tag, _ in seen} == {("control", 1)}
