"""Checkpoints by time: after which steps they are saved, and that they are like those that are saved by steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pretrain.saving
from pretrain.checkpoint import list_checkpoints
from pretrain.checkpoint.folder import step_of
from pretrain.config.schema import Config
from pretrain.resilience.rollback import Rollback, record
from pretrain.saving import SaveTimer
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import spike_on_position, train_with
from tests.pretrain.runs import assert_bit_identical, events, light_config, train_runs
from tests.pretrain.test_steps_in_flight import logged_run

NEVER = ("checkpoint.every_steps=100", "checkpoint.keep_last=99", "evaluate.sequences=0")
"""No step is saved by its number, and none is validated; all that are saved are kept."""


def let_steps_take(minutes: float) -> None:
    """In this process, every step that is launched takes this long, and nothing else takes any time: a checkpoint is
    on the disk before the next step is launched."""
    launch, now = Trainer.launch, [1000.0]

    def launching(self: Trainer, *arguments: Any, **options: Any) -> Any:
        self.saver.wait()
        launched = launch(self, *arguments, **options)
        now[0] += 60.0 * minutes
        return launched

    Trainer.launch = launching
    pretrain.saving.monotonic = lambda: now[0]


def log_of_timed_run(rank: int, config: Config, run_dir: Path, minutes: tuple[float, float]) -> list[str]:
    """What a rank does, where a step takes minutes[rank] by its clock."""
    let_steps_take(minutes[rank])
    return logged_run(rank, config, run_dir)


def train_timed(rank: int, runs: list[tuple[Config, Path]]) -> None:
    let_steps_take(1.0)
    train_runs(rank, runs)


def saved_steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run_dir / "checkpoints")]


def test_minutes_count_from_the_start_and_from_the_last_save_and_not_while_that_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, saver = [500.0], SimpleNamespace(is_writing=False)
    monkeypatch.setattr(pretrain.saving, "monotonic", lambda: now[0])
    timer, never = SaveTimer(1.5, saver), SaveTimer(0.0, saver)  # type: ignore[arg-type]
    due = []
    for seconds in (0.0, 89.0, 1.0, 50.0):
        now[0] += seconds
        due.append(timer.is_due())
    assert due == [False, False, True, True]
    timer.restart()
    assert not timer.is_due()
    now[0] += 90.0
    saver.is_writing = True
    assert not timer.is_due()
    saver.is_writing = False
    assert timer.is_due() and not never.is_due()


@pytest.mark.parametrize("other", [0.0, 1000.0])
def test_all_ranks_save_after_the_steps_that_the_clock_of_rank_0_chooses(
    prepared: Path, tmp_path: Path, other: float
) -> None:
    """A step takes a minute. After 3 of them, one begins that is saved; those of steps 6 and 12 are due by number."""
    keys = ("train.steps=12", "checkpoint.every_steps=6", "checkpoint.every_minutes=3")
    config = light_config(prepared, *NEVER, *keys, ranks=2)
    logs = run_ranks(log_of_timed_run, 2, config, tmp_path, (1.0, other))
    assert logs[0] == logs[1]
    assert [word for word in logs[0] if word.startswith("save")] == ["save 4", "save 6", "save 10", "save 12"]
    assert saved_steps(tmp_path) == [4, 6, 10, 12]


def test_a_save_by_time_costs_and_does_what_one_by_steps_does_and_is_not_made_twice(
    prepared: Path, tmp_path: Path
) -> None:
    """Messages, comparison of replicas, settling and saving, in order; where both are due it is one."""
    keys = (*NEVER, "train.steps=7")
    by_steps, by_time = "checkpoint.every_steps=4", "checkpoint.every_minutes=3"
    logs = [
        run_ranks(log_of_timed_run, 2, light_config(prepared, *keys, *more, ranks=2), tmp_path / str(n), (1.0, 1.0))[0]
        for n, more in enumerate([(by_steps,), (by_time,), (by_steps, by_time)])
    ]
    assert logs[0] == logs[1] == logs[2]
    assert logs[0].count("save 4") == 1 and logs[0].count("compare") == 2


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("parallel.zero=1",), id="zero"),
        pytest.param(
            ("parallel.pipeline=2", "model.num_layers=2", "checkpoint.asynchronous=false"),
            id="pipeline",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_resumes_from_a_save_by_time_is_bit_identical_to_an_unbroken_one(
    prepared: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    keys = (*NEVER, "train.steps=9", "model.dropout=0.1", *layout)
    plain = light_config(prepared, *keys, ranks=2)
    timed = light_config(prepared, *keys, "checkpoint.every_minutes=3", ranks=2)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run_ranks(train_timed, 2, [(plain, unbroken), (timed, broken)])
    assert saved_steps(unbroken) == [9] and saved_steps(broken) == [4, 8, 9]
    for path in list_checkpoints(broken / "checkpoints")[1:]:
        shutil.rmtree(path)
    run_ranks(train_runs, 2, [(plain, broken)])
    assert [event["step"] for event in events(broken, "resumed")] == [4]
    assert_bit_identical(broken, unbroken)


def spiked_run(rank: int, config: Config, run_dir: Path) -> str:
    let_steps_take(1.0)
    return train_with(rank, config, run_dir, spike_on_position, 60)


@pytest.mark.slow  # the fast one: the first of resilience/test_spikes.py
def test_a_spike_is_not_saved_by_time_and_the_run_goes_back_to_a_save_by_time(prepared: Path, tmp_path: Path) -> None:
    """Position 60 of the data, in step 8, is bad, and step 8 is due. Steps 7 and 8 go, from the checkpoint of step 4;
    then the minutes begin anew."""
    spiky = ("spike_window_steps=8", "spike_threshold=5", "spike_action=rollback", "spike_skip_steps=2")
    keys = (*NEVER, "train.steps=13", *(f"resilience.{key}" for key in spiky))
    run_dir, told = tmp_path / "spiked", tmp_path / "told"
    timed = light_config(prepared, *keys, "checkpoint.every_minutes=3", ranks=2)
    assert run_ranks(spiked_run, 2, timed, run_dir) == ["FINISHED"] * 2
    (rollback,) = events(run_dir, "rollback")
    assert (rollback["at_step"], rollback["first_step"]) == (8, 7)
    assert [event["step"] for event in events(run_dir, "resumed")] == [4]
    assert [event["step"] for event in events(run_dir, "checkpoint")] == [4, 8, 12, 13]
    told.mkdir()
    record(told, Rollback("told", 8, 7, (48, 64)))  # leaves the same data out from its first step on
    run_ranks(train_runs, 2, [(light_config(prepared, *keys, ranks=2), told)])
    assert_bit_identical(run_dir, told)
