"""Calls of the ranks of a group are compared as those ranks would meet; and the ranks that stand for all have each kind
of group among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.config.rules import check_ranks
from pretrain.parallel.layout import group_ranks
from pretrain.planning.record import Call
from pretrain.planning.same_calls import first_difference, representatives
from tests.pretrain.runs import small_config


def call(kind: str, *ranks: int, elements: int = 8, dtype: str = "float32") -> Call:
    return Call(kind, ranks, dtype, elements, 4 * elements, "micro-step")


BOTH, ALL = (0, 1), (0, 1, 2)


def test_ranks_that_do_the_same_differ_nowhere() -> None:
    own = [call("all_reduce", *BOTH), call("all_gather", *ALL), call("barrier", *ALL)]
    third = [call("all_gather", *ALL), call("barrier", *ALL)]
    alone = [call("all_reduce", 5, 6)]  # a group of none of the others
    assert first_difference({0: own, 1: own, 2: third, 5: alone}) is None
    # Calls of groups that two ranks do not share have no order among each other.
    other = call("all_reduce", 1, 4)
    assert first_difference({0: own, 1: [other, *own], 2: third}) is None
    assert first_difference({0: own, 1: [own[0], other, *own[1:]], 2: third}) is None


def test_two_groups_that_two_ranks_call_in_another_order() -> None:
    """Each would wait in its first call for the other, which waits in its own."""
    own = [call("barrier", *ALL), call("all_reduce", *BOTH), call("all_gather", *ALL), call("barrier", *ALL)]
    found = first_difference({0: own, 1: [own[0], own[2], own[1], own[3]]})
    assert str(found) == (
        "after 1 equal calls of both, rank 0 calls all_reduce of 8 float32 in its group of 2 ranks and rank 1 calls "
        "all_gather of 8 float32 in its group of 3 ranks: in another order"
    )


@pytest.mark.parametrize(
    "other, said",
    [
        ([], "at their first call in their group of 2 ranks, rank 0 calls all_reduce of 8 float32 and rank 1 calls"),
        ([call("all_reduce", *BOTH)], "after 1 equal calls in their group of 2 ranks, rank 0 calls all_gather of 16"),
        ([call("all_gather", *BOTH, elements=16), call("all_reduce", *BOTH)], "at their first call"),
        ([call("all_reduce", *BOTH, elements=9)], "rank 1 calls all_reduce of 9 float32"),
        ([call("all_reduce", *BOTH, dtype="bfloat16")], "rank 1 calls all_reduce of 8 bfloat16"),
        ([call("all_reduce", *BOTH), call("all_gather", *BOTH, elements=16), call("barrier", *BOTH)],
         "after 2 equal calls in their group of 2 ranks, rank 0 calls nothing more and rank 1 calls barrier"),
    ],
)  # fmt: skip
def test_a_call_that_the_other_does_not_make(other: list[Call], said: str) -> None:
    own = [call("all_reduce", *BOTH), call("all_gather", *BOTH, elements=16)]
    found = first_difference({0: own, 1: other})
    assert found is not None and said in str(found), found
    assert first_difference({0: own, 1: own, 2: [call("barrier", *BOTH)]}) is None, "rank 2 is not of that group"


def test_tokens_may_be_split_unevenly_over_experts() -> None:
    calls = {0: [call("all_to_all", *BOTH, elements=30)], 1: [call("all_to_all", *BOTH, elements=2)]}
    assert first_difference(calls) is not None
    assert first_difference(calls, is_even=False) is None
    calls = {0: [call("all_reduce", *BOTH, elements=30)], 1: [call("all_reduce", *BOTH, elements=2)]}
    assert first_difference(calls, is_even=False) is not None


def test_a_message_meets_who_receives_it() -> None:
    sends = [call("send", 0, 1), call("receive", 1, 0)]
    assert first_difference({0: sends, 1: [call("receive", 0, 1), call("send", 1, 0)]}) is None
    for wrong in (
        [call("send", 1, 0), call("receive", 0, 1)],  # both send first, and wait
        [call("receive", 0, 1)],
        [call("receive", 0, 1, elements=9), call("send", 1, 0)],
    ):
        assert first_difference({0: sends, 1: wrong}) is not None


@pytest.mark.parametrize(
    "overrides, ranks, expected",
    [
        ((), 1, {0}),
        ((), 1024, {0, 1023}),
        (("parallel.tensor=2",), 8, {0, 1, 6}),
        (("parallel.expert=5", "parallel.zero=2"), 10, {0, 1, 9}),
        (("parallel.pipeline=2",), 4, {0, 1, 2, 3}),
        (("model.num_layers=9", "parallel.pipeline=8"), 16, None),
        (("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.expert=5"), 40, None),
    ],
)
def test_each_kind_of_group_is_among_those_that_stand_for_all(
    prepared: Path, overrides: tuple[str, ...], ranks: int, expected: set[int] | None
) -> None:
    batch = ("batch.micro_sequences=1", "batch.global_sequences=5120", "model.feedforward.num_experts=10")
    config = small_config(prepared, *batch, *overrides)
    data_size = check_ranks(config, ranks)
    found = set(representatives(config, data_size))
    assert expected is None or found == expected
    assert len(found) <= 4 * config.parallel.pipeline
    for name, groups in group_ranks(config, data_size).items():
        met = [len(found & set(row)) for row in np.asarray(groups).tolist()]
        assert max(met) >= 2, f"no two ranks of a {name} group"
