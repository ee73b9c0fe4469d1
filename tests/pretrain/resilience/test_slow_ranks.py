"""Which ranks the others wait for: by given numbers, and in runs whose clock is a counter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pretrain.late_reading
from model.parallel.context import ParallelContext
from pretrain.config.schema import Config
from pretrain.phases import Phases
from pretrain.report.event_text import event_text
from pretrain.resilience.slow_ranks import (
    AFTER,
    FEWEST_STEPS,
    LISTED,
    MOST_STEPS,
    OwnWork,
    RankComparison,
    SlowRank,
    SlowRankWatch,
    ranks_together,
)
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import train_with
from tests.pretrain.runs import events, light_config, metrics

MODEL = {"d_model": 8, "num_layers": 1, "vocab_size": 16, "sequence_length": 4}
HOSTS = [f"node{rank // 2}" for rank in range(8)]


def table(reading: list[int], forward: list[int], reporting: list[int], step: int) -> torch.Tensor:
    return torch.tensor([reading, forward, reporting, [step] * len(reading)]).T


def reported(watch: SlowRankWatch, numbers: torch.Tensor) -> list[list[int]]:
    """The ranks that are reported in twelve comparisons with the same numbers."""
    return [[slow.rank for slow in watch.see(numbers)[1]] for _ in range(12)]


def test_own_work_is_the_median_of_each_phase_over_the_steps_since_the_last_comparison() -> None:
    noise = np.random.default_rng(3)
    rows = noise.uniform(0.1, 0.2, size=(21, 5))
    rows[7] *= 1000.0  # one step in which a disk hangs
    own, due = OwnWork(every=7), []
    for step, (reading, forward, reporting, backward, update) in enumerate(rows, 1):
        own.add({
            "forward": forward, "backward": backward, "reading batches": reading, "update": update,
            "reading the step's sums": reporting,
        })  # fmt: skip
        due += [step] if own.is_due(step) else []
    assert due == [14, 21]  # after 7 there were too few
    expected = np.median(np.column_stack([rows[:, 0], rows[:, 1], rows[:, 2], rows.sum(1)]), axis=0)
    np.testing.assert_allclose(own.take().numpy(), expected * 1e6, atol=1.0)
    own.add({"forward": 1.0})
    assert not own.is_due(28)  # of one step
    for _ in range(FEWEST_STEPS - 1):
        own.add({})
    assert own.is_due(28) and not own.is_due(29)


def test_of_many_steps_the_newest_are_compared() -> None:
    own = OwnWork(every=9)
    for step in range(2 * MOST_STEPS):
        own.add({"forward": float(step >= MOST_STEPS)})
    assert own.take().tolist() == [0, 1_000_000, 0, 1_000_000]


@pytest.mark.parametrize("count, more", [(1, ""), (3, ""), (4, " and 1 more"), (20, " and 17 more")])
def test_an_event_names_three_ranks_and_how_many_more(count: int, more: str) -> None:
    ranks = [{"rank": rank, "host": "node0", "phase": "forward"} for rank in range(min(count, LISTED))]
    named = ", ".join(f"rank {rank} on node0 (forward)" for rank in range(min(count, 3)))
    event = {"event": "slow_ranks", "time": 0.0, "step": 7, "count": count, "ranks": ranks}
    assert event_text(event, 0.0).partition("  ")[2] == f"step 7: slow: {named}{more}"


def test_without_details_nothing_is_compared() -> None:
    own = OwnWork(every=0)
    for step in range(1, 300):
        own.add({"forward": 1.0})
        assert not own.is_due(step)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_slowest_rank_and_its_distance_from_the_median_are_those_of_numpy(size: int) -> None:
    noise = np.random.default_rng(size)
    for _ in range(50):
        work = noise.integers(0, 1000, size=(size, 3))
        reading, forward, reporting = work.T.tolist()
        values, _ = SlowRankWatch(HOSTS[:size], 1).see(table(reading, forward, reporting, step=4000))
        own = work.sum(1)
        median = np.quantile(own, 0.5, method="lower")
        assert values["slowest_rank_behind_seconds"] == pytest.approx((own.max() - median) / 1e6)
        assert own[int(values["slowest_rank"])] == own.max()


def test_a_rank_is_reported_after_three_comparisons_in_a_row_then_after_twice_as_many() -> None:
    slow = table([10, 10, 10, 10], [100, 100, 140, 100], [1, 1, 1, 1], step=600)  # 40 of 600 are 7%
    watch = SlowRankWatch(HOSTS[:4], 1)
    found = [watch.see(slow)[1] for _ in range(12)]
    assert [number for number, told in enumerate(found, 1) if told] == [AFTER, 2 * AFTER, 4 * AFTER]
    assert found[2] == [
        SlowRank(2, "node1", "forward", own_seconds=151e-6, median_seconds=111e-6, step_seconds=600e-6, comparisons=3)
    ]
    assert str(found[2][0]) == (
        "rank 2 on node1 (0.000151 s a step, median 0.000111 s, 7% of a step more, most of it where it computes its "
        "forward passes; 3 comparisons in a row)"
    )
    even = table([10] * 4, [100] * 4, [1] * 4, step=600)
    assert [bool(watch.see(numbers)[1]) for numbers in (even, slow, slow, even, slow, slow, slow)] == [False] * 6 + [
        True
    ]


def test_nobody_is_reported_for_less_than_a_twentieth_of_a_step_or_if_most_are_as_slow() -> None:
    close = table([10] * 4, [100, 100, 130, 100], [1] * 4, step=600)  # exactly a twentieth
    assert not any(reported(SlowRankWatch(HOSTS[:4], 1), close))
    most = table([10] * 4, [100, 200, 200, 200], [1] * 4, step=600)
    assert not any(reported(SlowRankWatch(HOSTS[:4], 1), most))


def test_a_slow_node_is_reported_rank_by_rank_also_if_it_is_half_of_the_ranks() -> None:
    half = table([10, 10, 90, 80], [100] * 4, [1] * 4, step=600)
    watch = SlowRankWatch(HOSTS[:4], 1)
    told = [watch.see(half)[1] for _ in range(3)][-1]
    assert [(one.rank, one.host, one.phase) for one in told] == [
        (2, "node1", "reading batches"),
        (3, "node1", "reading batches"),
    ]


def test_a_rank_that_waits_inside_its_forward_pass_is_not_the_slow_one() -> None:
    """Ranks 0 and 1 form a group. In the pass rank 0 waits for rank 1, whose host was late: 1 arrives last and waits
    least, so the group's time is its. Where all wait for all (ZeRO 3), forward passes tell nothing."""
    waits = table([10] * 4, [180, 100, 100, 100], [1] * 4, step=600)
    assert any(reported(SlowRankWatch(HOSTS[:4], 1), waits))
    assert not any(reported(SlowRankWatch(HOSTS[:4], 2), waits))
    both = table([10] * 8, [100, 100, 180, 190, 100, 100, 100, 100], [1] * 8, step=600)
    assert reported(SlowRankWatch(HOSTS, 2), both)[2] == [2, 3]
    assert not any(reported(SlowRankWatch(HOSTS, 8), both))
    read = table([10, 10, 10, 90], [180, 100, 100, 100], [1] * 4, step=600)
    assert reported(SlowRankWatch(HOSTS[:4], 4), read)[2] == [3]


def test_together_are_the_ranks_that_exchange_in_a_forward_pass() -> None:
    group: Any = object()
    divided = ParallelContext(
        data_size=4, data_group=group, tensor_size=2, tensor_group=group, expert_size=2, expert_group=group
    )
    assert ranks_together(ParallelContext(data_size=8, data_group=group), 1, 8) == 1
    assert ranks_together(divided, 1, 8) == 4
    assert ranks_together(ParallelContext(data_size=8, data_group=group), 3, 8) == 8


def compared(ranks: int, slow: list[int], *, rank: int = 0) -> tuple[list[dict[str, float]], list[str], list[Any]]:
    """Three comparisons of a RankComparison on `rank`, after every ten steps, whose `slow` ranks read twice as long:
    the values of each step, the phases entered, and the events."""
    told: list[Any] = []
    numbers = table([2000 if r in slow else 1000 for r in range(ranks)], [0] * ranks, [0] * ranks, step=4000)
    control: Any = SimpleNamespace(hosts=[f"node{r}" for r in range(ranks)], table=lambda own: numbers)
    folder: Any = SimpleNamespace(event=lambda kind, **values: told.append((kind, values)))
    phases, entered = Phases(), []
    phases.enter("reporting")
    phases.on_enter = entered.append
    config = Config.model_validate({"monitor": {"details_every_steps": 10}, "model": MODEL})
    group: Any = object() if ranks > 1 else None
    parallel = ParallelContext(data_rank=rank, data_size=ranks, data_group=group)
    comparison = RankComparison(config, parallel, control, phases, folder)
    return [comparison.step(step, {"forward": 0.1}) for step in range(1, 31)], entered, told


def test_a_warning_and_an_event_name_eight_ranks_and_count_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    for count, more in ((1, ""), (8, ""), (9, " and 1 more"), (11, " and 3 more")):
        values, _, told = compared(24, list(range(4, 4 + count)))
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("warning: step 30: slower than the others in their own work: rank 4 on node4 (")
        assert line.count("comparisons in a row)") == min(count, 8)
        assert line.endswith(f"in a row){more} (docs/monitoring.md#which-rank-is-slow)")
        ((kind, event),) = told
        assert (kind, event["step"], event["count"]) == ("slow_ranks", 30, count)
        assert [one["rank"] for one in event["ranks"]] == list(range(4, 4 + min(count, 8)))
        assert [step for step, row in enumerate(values, 1) if row] == [10, 20, 30]


def test_waiting_for_the_comparison_is_a_phase_of_its_own_and_only_the_first_rank_speaks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in (0, 1):
        values, entered, told = compared(2, [1], rank=rank)
        assert all(isinstance(row, dict) for row in values) and entered == ["comparing ranks", "reporting"] * 3
        assert (len(told), any(values), bool(capsys.readouterr().out)) == (rank == 0,) * 3
    values, entered, told = compared(1, [])
    assert values == [{}] * 30 and not entered and not told, "a rank alone is compared with nobody"


def counted_run(rank: int, config: Config, run_dir: Path, slow: int | None, phase: str) -> str:
    """Trains where every look at the clock takes 10 ms; on rank `slow`, every phase `phase` 40 ms more."""
    now = [0.0]

    def perf_counter() -> float:
        now[0] += 0.01
        return now[0]

    pretrain.late_reading.time = SimpleNamespace(perf_counter=perf_counter)  # type: ignore[assignment]

    def prepare(trainer: Trainer) -> None:
        enter = trainer.setup.phases.enter

        def entered(name: str, **options: bool) -> None:
            enter(name, **options)
            if rank == slow and name == phase:
                now[0] += 0.04

        trainer.setup.phases.enter = entered

    return train_with(rank, config, run_dir, prepare)


KEYS = (
    f"train.steps={3 * FEWEST_STEPS}",
    "evaluate.sequences=0",
    "checkpoint.every_steps=100",
    f"monitor.details_every_steps={FEWEST_STEPS}",
)


@pytest.mark.parametrize(
    "ranks, slow, phase, layout",
    [
        pytest.param(2, 1, "reading batches", (), marks=pytest.mark.slow),
        (4, 3, "forward", ("parallel.zero=2",)),
        pytest.param(
            4,
            1,
            "reading batches",
            ("parallel.pipeline=2", "model.num_layers=2", "batch.micro_sequences=4"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["reading", "forward", "pipeline"],
)
def test_the_rank_that_is_delayed_is_named(
    prepared: Path, tmp_path: Path, ranks: int, slow: int, phase: str, layout: tuple[str, ...]
) -> None:
    config = light_config(prepared, *KEYS, *layout, ranks=ranks)
    assert run_ranks(counted_run, ranks, config, tmp_path, slow, phase) == ["FINISHED"] * ranks
    compared = {row["step"]: row["slowest_rank"] for row in metrics(tmp_path) if "slowest_rank" in row}
    assert compared == {FEWEST_STEPS: slow, 2 * FEWEST_STEPS: slow, 3 * FEWEST_STEPS: slow}
    behind = [row["slowest_rank_behind_seconds"] for row in metrics(tmp_path) if "slowest_rank" in row]
    assert behind == pytest.approx([0.04] * 3, abs=1e-5)
    (event,) = events(tmp_path, "slow_ranks")
    assert event["step"] == 3 * FEWEST_STEPS and event["count"] == 1
    assert (event["ranks"][0]["rank"], event["ranks"][0]["phase"]) == (slow, phase)
    assert event["ranks"][0]["host"] in event_text(event, 0.0) and f"rank {slow} on " in event_text(event, 0.0)


@pytest.mark.parametrize("phase", [pytest.param("", marks=pytest.mark.slow), "backward"])
def test_nobody_is_named_where_all_are_alike_or_where_waiting_cannot_be_told_from_work(
    prepared: Path, tmp_path: Path, phase: str
) -> None:
    config = light_config(prepared, *KEYS, ranks=2)
    assert run_ranks(counted_run, 2, config, tmp_path, 1, phase) == ["FINISHED"] * 2
    assert [row["slowest_rank_behind_seconds"] for row in metrics(tmp_path) if "slowest_rank" in row] == [0.0] * 3
    assert not events(tmp_path, "slow_ranks")
