"""What torch's flight recorder has of each rank, and the sentences that follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.resilience.collectives import NEWEST, TOLD, Call, Group, _call, explain, read, record, recorded, write
from tests.harness import run_ranks


def group(*calls: Call, name: str = "0", about: str = "", ranks: tuple[int, ...] = (0, 1, 2)) -> Group:
    return Group(name, about, list(ranks), list(calls))


def call(number: int, what: str = "all_reduce of float [3]", *, ended: bool = True, time: float = 0.0) -> Call:
    return Call(number, what, ended, time or float(number))


WAITS, BEFORE = call(8, ended=False), call(7)
BROADCAST = call(8, "broadcast of float [3]", ended=False)
OF = "the group of ranks 0-2"


@pytest.mark.parametrize(
    "ranks, sentences",
    [
        ({}, []),
        ({0: [group(BEFORE)], 1: [group(BEFORE)], 2: [group(BEFORE)]}, []),
        (
            {0: [group(BEFORE, WAITS)], 1: [group(BEFORE)], 2: [group(BEFORE, WAITS)]},
            [f"all_reduce of float [3], call 8 of {OF}: rank 1 did not call it, ranks 0, 2 did"],
        ),
        (  # no collective of that group at all
            {0: [group(BEFORE, WAITS)], 1: [], 2: []},
            [f"all_reduce of float [3], call 8 of {OF}: ranks 1-2 did not call it, rank 0 did"],
        ),
        (  # rank 2 is stopped, and has no record
            {0: [group(BEFORE, WAITS)], 1: [group(BEFORE, WAITS)]},
            [f"all_reduce of float [3], call 8 of {OF}: ranks 0-1 called it, of rank 2 there is no record"],
        ),
        (
            {rank: [group(WAITS)] for rank in range(3)},
            [f"all_reduce of float [3], call 8 of {OF}: all its ranks called it, and it does not end"],
        ),
        (
            {0: [group(WAITS)], 1: [group(BROADCAST)], 2: [group(WAITS)]},
            [
                f"call 8 of {OF} is not the same everywhere: all_reduce of float [3] on ranks 0, 2; broadcast of float "
                "[3] on rank 1"
            ],
        ),
        (
            {0: [group(WAITS)], 1: [group(call(8, "all_reduce of float [4]", ended=False))], 2: [group(WAITS)]},
            [
                f"call 8 of {OF} is not the same everywhere: all_reduce of float [3] on ranks 0, 2; all_reduce of "
                "float [4] on rank 1"
            ],
        ),
        (  # what each rank brings to a gather may differ
            {rank: [group(call(8, f"all_gather of float [{rank}]", ended=False))] for rank in range(3)},
            [f"all_gather of float [0], call 8 of {OF}: all its ranks called it, and it does not end"],
        ),
        (  # rank 1 launched much more since, as a GPU's host does
            {0: [group(BEFORE, WAITS)], 1: [group(call(100, ended=False))], 2: [group(BEFORE)]},
            [f"all_reduce of float [3], call 8 of {OF}: rank 2 did not call it, rank 0 did"],
        ),
    ],
)
def test_sentences(ranks: dict[int, list[Group]], sentences: list[str]) -> None:
    assert explain(ranks) == sentences


def test_what_a_rank_misses_comes_before_what_only_waits_and_the_first_before_later_ones() -> None:
    waits = {name: call(5, ended=False, time=time) for name, time in (("a", 9.0), ("b", 4.0), ("c", 3.0), ("d", 8.0))}
    ranks = {
        0: [group(waits[name], name=name, about=f"group {name}", ranks=(0, 1)) for name in waits],
        1: [group(waits[name], name=name, about=f"group {name}", ranks=(0, 1)) for name in ("b", "c")],
    }
    told = explain(ranks)
    assert len(told) == TOLD
    assert [sentence.partition("(")[2][:7] for sentence in told] == ["group d", "group a", "group c"]


def test_many_ranks_are_one_short_sentence() -> None:
    """Of a group whose first two ranks wrote nothing, its members are those that did."""
    members = tuple(range(0, 8000, 8))
    ranks = {rank: [group(*([BEFORE] if rank % 16 else [BEFORE, WAITS]), ranks=())] for rank in members[2:]}
    [sentence] = explain(ranks)
    assert sentence == (
        "all_reduce of float [3], call 8 of the group of 998 ranks 16, 24, 32, 40, 48, 56, ..., 7992: 499 ranks 24, "
        "40, 56, 72, 88, 104, ..., 7992 did not call it, 499 ranks 16, 32, 48, 64, 80, 96, ..., 7984 did"
    )


def test_the_first_two_ranks_of_a_group_write_which_ranks_it_has(tmp_path: Path) -> None:
    """So that one of them may be the one without a record; whoever is read first."""
    for rank in (2, 1):
        write(tmp_path, rank, [group(BEFORE, WAITS)])
    found = read(tmp_path)
    assert [found[rank][0].ranks for rank in (1, 2)] == [[0, 1, 2], []]
    sentence = f"all_reduce of float [3], call 8 of {OF}: ranks 1-2 called it, of rank 0 there is no record"
    assert explain(found) == explain(dict(reversed(found.items()))) == [sentence]


def test_what_a_recorder_calls_completed_has_ended() -> None:
    """NCCL's, before it has retired a call."""
    entry = {
        "input_dtypes": ["Float", "Float"], "input_sizes": [[3], [4]], "profiling_name": "nccl:_all_gather_base",
        "retired": False, "state": "completed", "collective_seq_id": 5, "time_created_ns": 2_500_000_000,
    }  # fmt: skip
    assert _call(entry) == Call(5, "_all_gather_base of float [3] and 1 more", True, 2.5)
    assert not _call({**entry, "state": "started"}).ended and _call({**entry, "retired": True}).ended


def test_a_record_that_is_damaged_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.collectives").write_text('[{"name": "0", "about"')
    (tmp_path / "rank-00001.collectives").write_text("[]")
    assert read(tmp_path) == {1: []}


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def call_one_less(rank: int, folder: Path) -> list[str]:
    """Rank 1 has not yet called the third all_reduce of the second group when all write their records."""
    some = dist.new_group([0, 1], group_desc="TENSOR_MODEL_PARALLEL_GROUP")
    dist.all_reduce(torch.ones(2, 5))
    for _ in range(2 + NEWEST):
        dist.all_reduce(torch.ones(3), group=some)
    work = dist.all_reduce(torch.ones(7, dtype=torch.float64), group=some, async_op=True) if rank == 0 else None
    # gloo notes the end of a call from another thread, a moment after its caller goes on.
    wait_until(lambda: sum(not call.ended for group in recorded() for call in group.calls) == (rank == 0))
    record(folder, rank)
    for other in range(2):
        wait_until((folder / f"rank-{other:05d}.collectives").exists)
    told = explain(read(folder))
    if rank == 1:
        dist.all_reduce(torch.ones(7, dtype=torch.float64), group=some)
    if work is not None:
        work.wait()
    dist.barrier()
    assert max(len(group.calls) for group in recorded()) == NEWEST
    return told


def calls_beside_an_unused_recorder(rank: int) -> list[str]:
    """What is recorded where NCCL's recorder exists but has no calls, as torch with CUDA has it in a run on CPUs."""
    library: Any = torch._C._distributed_c10d
    unused = library._dump_fr_trace_json(includeCollectives=False)  # as torch writes a recorder without calls
    library._dump_nccl_trace_json = lambda: unused
    dist.all_reduce(torch.ones(3))
    return [call.what.replace("all_reduce", "allreduce") for group in recorded() for call in group.calls]


def test_a_recorder_without_calls_does_not_hide_those_of_another() -> None:
    for calls in run_ranks(calls_beside_an_unused_recorder, 2, timeout_seconds=120):
        assert "allreduce of float [3]" in calls


def test_torch_records_collectives_and_the_rank_that_did_not_call_one_is_named(tmp_path: Path) -> None:
    """If this fails with a new torch, its recorder has another format."""
    expected = (
        f"allreduce of double [7], call {3 + NEWEST} of the group of ranks 0-1 (tensor model parallel): rank 1 did not "
        "call it, rank 0 did"
    )
    for told in run_ranks(call_one_less, 2, tmp_path, timeout_seconds=120):
        assert [sentence.replace("all_reduce", "allreduce") for sentence in told] == [expected]
