"""The bytes that a ring sends, counted by running one, and the link that a group crosses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.config.loading import load_config
from pretrain.planning.links import BETWEEN, INSIDE, Collective, Rates, Spread, seconds, sent_bytes, spreads

ONE_BILLION = Path(__file__).resolve().parents[3] / "configs" / "switchall_1b.json"


class Ring:
    """Ranks that each pass one chunk to the next at a time; `sent` counts bytes of rank 0."""

    def __init__(self, inputs: np.ndarray) -> None:
        """inputs: [ranks, ranks x chunk]"""
        self.ranks = len(inputs)
        self.held = inputs.reshape(self.ranks, self.ranks, -1).copy()
        self.sent = 0

    def turn(self, offset: int, *, add: bool) -> None:
        """Every rank r sends its chunk (r + offset) to rank r + 1, which adds it to its own or keeps it."""
        passed = [self.held[rank, (rank + offset) % self.ranks].copy() for rank in range(self.ranks)]
        self.sent += passed[0].nbytes
        for rank, chunk in enumerate(passed):
            at = (rank + 1) % self.ranks, (rank + offset) % self.ranks
            self.held[at] = self.held[at] + chunk if add else chunk

    def reduce_scatter(self) -> None:
        for step in range(self.ranks - 1):
            self.turn(-step, add=True)

    def all_gather(self, offset: int) -> None:
        for step in range(self.ranks - 1):
            self.turn(offset - step, add=False)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_sends_what_the_formulas_say(ranks: int) -> None:
    inputs = np.random.default_rng(0).integers(0, 9, (ranks, 5 * ranks)).astype(np.float64)
    size = inputs[0].nbytes
    ring = Ring(inputs)
    ring.reduce_scatter()
    for rank in range(ranks):  # rank r now holds the sum of chunk r + 1
        expected = inputs.sum(axis=0).reshape(ranks, -1)[(rank + 1) % ranks]
        np.testing.assert_array_equal(ring.held[rank, (rank + 1) % ranks], expected)
    assert ring.sent == sent_bytes("reduce_scatter", ranks, size)
    ring.all_gather(1)
    np.testing.assert_array_equal(ring.held.reshape(ranks, -1), np.tile(inputs.sum(axis=0), (ranks, 1)))
    assert ring.sent == sent_bytes("all_reduce", ranks, size)
    assert ring.sent - sent_bytes("reduce_scatter", ranks, size) == sent_bytes("all_gather", ranks, size)


def test_the_other_kinds() -> None:
    assert sent_bytes("all_to_all", 4, 100) == 75  # a quarter stays
    assert sent_bytes("broadcast", 4, 100) == 100 and sent_bytes("broadcast", 1, 100) == 0
    assert sent_bytes("reduce", 4, 100) == 100  # a chain of sums
    assert sent_bytes("send", 2, 100) == 100 and sent_bytes("receive", 2, 100) == 0
    assert sent_bytes("barrier", 4, 0) == 0
    with pytest.raises(KeyError):
        sent_bytes("gossip", 4, 1)


@pytest.mark.parametrize(
    "overrides, data_size, expected",
    [
        ((), 64, {"data": Spread(64, 8), "world": Spread(64, 8)}),
        (("parallel.tensor=8",), 8, {"tensor": Spread(8, 8), "data": Spread(8, 1)}),
        (("parallel.tensor=2", "parallel.pipeline=2"), 16, {"pipeline": Spread(2, 1), "data": Spread(16, 4)}),
        (("parallel.expert=8",), 64, {"expert": Spread(8, 8), "expert data": Spread(8, 1)}),
        (("parallel.expert=16",), 64, {"expert": Spread(16, 8), "expert data": Spread(4, 1)}),
        (
            ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=4"),
            32,
            {"expert": Spread(4, 4), "expert data": Spread(16, 2)},
        ),
    ],
)
def test_how_groups_lie_over_nodes_of_eight(
    overrides: tuple[str, ...], data_size: int, expected: dict[str, Spread]
) -> None:
    found = spreads(load_config(ONE_BILLION, overrides), data_size, 8)
    assert {name: found[name] for name in expected} == expected


def test_the_node_with_fewest_ranks_of_a_group_counts() -> None:
    found = spreads(load_config(ONE_BILLION, ["batch.global_sequences=48"]), 6, 4)
    assert found["data"] == Spread(6, 2)  # four on the first node, two on the second
    worst = spreads(load_config(ONE_BILLION, ["parallel.tensor=4", "batch.global_sequences=48"]), 3, 6)
    assert worst["tensor"] == Spread(4, 2)  # the first group is on one node, the second on two


RATES = Rates(inside=10.0, between=1.0, start_inside=0.25, start_between=0.5)


@pytest.mark.parametrize(
    "kind, spread, expected",
    [
        ("all_reduce", Spread(8, 8), 0.25 + 2 * 7 / 8 * 80 / 10),
        ("all_reduce", Spread(16, 8), 0.5 + 2 * 15 / 16 * 80 / 8),  # eight GPUs of a node share its ports
        ("all_reduce", Spread(32, 16), 0.5 + 2 * 31 / 32 * 80 / 10),  # the link inside is slower than 16 ports
        ("all_gather", Spread(8, 1), 0.5 + 7 / 8 * 80 / 1),
        ("reduce_scatter", Spread(4, 4), 0.25 + 3 / 4 * 80 / 10),
        ("all_to_all", Spread(8, 8), 0.25 + 7 / 8 * 80 / 10),
        ("all_to_all", Spread(16, 8), 0.5 + 8 / 16 * 80 / 1),  # half of it leaves the node
        ("all_to_all", Spread(40, 38), 0.5 + 37 / 40 * 80 / 10),  # and here so little that what stays takes longer
        ("send", Spread(2, 1), 0.5 + 80 / 1),
        ("receive", Spread(2, 1), 0.0),
        ("all_reduce", Spread(1, 1), 0.0),
    ],
)
def test_the_time_of_one_call(kind: str, spread: Spread, expected: float) -> None:
    one = Collective(kind, "data", spread.ranks, 80, "update")
    assert seconds(one, spread, RATES) == pytest.approx(expected)
    assert spread.link == (INSIDE if spread.ranks == spread.on_a_node else BETWEEN)
