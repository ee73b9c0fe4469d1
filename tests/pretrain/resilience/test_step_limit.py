"""The limit of a step follows what steps took, and only where that tells something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pretrain.segment
from pretrain.config.watching import ResilienceConfig
from pretrain.data.progress import Progress
from pretrain.phases import Phases, read
from pretrain.resilience.step_limit import StepLimit
from pretrain.trainer import LaunchedStep, StepInput, Trainer
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import before_steps, train_with
from tests.pretrain.runs import light_config


def test_a_phase_that_is_alive_began_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 5.0])
    monkeypatch.setattr("pretrain.phases.time.monotonic", lambda: next(clock))
    phases = Phases()
    phases.enter("validation", quick=True)
    assert phases.since == 2.0 and phases.is_quick
    phases.alive()
    assert phases.since == 5.0
    phases.keep_in(tmp_path / "phase")
    record = read(tmp_path / "phase")
    assert record is not None and (record.name, record.count) == ("validation", 1)
    monkeypatch.undo()
    phases.enter("a" * 70)  # there is room for 64
    record = read(tmp_path / "phase")
    assert record is not None and (record.name, record.count) == ("a" * 64, 2)
    phases.close()


def limit_after(seconds: list[float], config: ResilienceConfig | None = None, **options: bool) -> float | None:
    """The limit after steps of these seconds."""
    phases = Phases()
    limit = StepLimit(config or ResilienceConfig(), phases, **options)
    for each in seconds:
        limit.add(each)
    return phases.step_limit


def test_there_is_no_limit_before_ten_steps_after_the_first_five() -> None:
    assert limit_after([20.0] * 14) is None
    assert limit_after([20.0] * 15) == 200.0


def test_the_limit_is_a_multiple_of_the_longest_of_the_last_hundred_steps() -> None:
    assert limit_after([90.0] * 5 + [20.0] * 9 + [30.0] + [20.0] * 99) == 300.0
    assert limit_after([90.0] * 5 + [20.0] * 9 + [30.0] + [20.0] * 100) == 200.0
    assert limit_after([20.0] * 15, ResilienceConfig(step_timeout_factor=7.0)) == 140.0


def test_the_limit_is_at_least_two_minutes_and_never_above_the_long_one() -> None:
    assert limit_after([0.5] * 15) == 120.0
    assert limit_after([100.0] * 15) == 540.0
    assert limit_after([0.5] * 15, ResilienceConfig(hang_timeout_seconds=60.0)) == 60.0


def test_steps_have_no_limit_if_it_is_off_or_if_they_read_files() -> None:
    assert limit_after([0.5] * 15, ResilienceConfig(step_timeout_factor=0.0)) is None
    assert limit_after([0.5] * 15, ResilienceConfig(hang_timeout_seconds=0.0)) is None
    assert limit_after([0.5] * 15, reads_files=True) is None


@pytest.mark.parametrize("again", ["restart", "segment"])
def test_steps_unlike_those_before_have_no_limit_until_they_are_measured(again: str) -> None:
    """A segment that begins after a rollback has the same phases."""
    phases = Phases()
    limit = StepLimit(ResilienceConfig(), phases)
    for _ in range(15):
        limit.add(20.0)
    assert phases.step_limit == 200.0
    if again == "restart":
        limit.restart()
    else:
        limit = StepLimit(ResilienceConfig(), phases)
    assert phases.step_limit is None
    for _ in range(15):
        limit.add(30.0)
    assert phases.step_limit == 300.0


def note_limits(trainer: Trainer, file: Path) -> None:
    """Writes the limit of each step, when it begins, to `file`."""
    limits: list[float | None] = []

    def note(step: int) -> None:
        limits.append(trainer.setup.phases.step_limit)
        file.write_text(json.dumps(limits))

    before_steps(trainer, note)


def test_a_run_has_the_limit_from_its_sixteenth_step_on_unless_memory_begins_anew_or_choices_are_recorded(
    prepared: Path, tmp_path: Path
) -> None:
    """Of the run with memory every pass over the data has 20 steps."""
    steps = ("train.steps=22", "evaluate.sequences=0")
    memory = 'model.position={"type": "xl", "memory_chunks": 1}'
    streams = light_config(prepared, *steps, memory, f"data.max_tokens={20 * 8 * 16 + 1}")
    limits = []
    recorded = light_config(prepared, *steps, "train.record_routing=true")
    for name, config in (("streams", streams), ("recorded", recorded)):
        assert run_ranks(train_with, 1, config, tmp_path / name, note_limits, tmp_path / f"{name}.json") == ["FINISHED"]
        limits.append(json.loads((tmp_path / f"{name}.json").read_text()))
    # A step begins before the sums of the one before are read.
    assert limits[0] == [None] * 16 + [120.0] * 4 + [None] * 2
    assert limits[1] == [None] * 22


def note_quick_phases(trainer: Trainer, file: Path) -> None:
    """Writes to `file` the phases that the limit holds for, and those that it holds for when a step was launched or is
    written down."""
    phases, quick, late = trainer.setup.phases, dict[str, None](), dict[str, None]()
    enter, launch = phases.enter, trainer.launch

    def entered(name: str, **options: bool) -> None:
        enter(name, **options)
        if phases.is_quick:
            quick[name] = None

    def note() -> None:
        if phases.is_quick:
            late[phases.record.name] = None
        file.write_text(json.dumps([list(quick), list(late)]))

    def launched(progress: Progress, given: StepInput) -> LaunchedStep:
        found = launch(progress, given)
        note()
        return found

    phases.enter, trainer.launch = entered, launched
    step_values = pretrain.segment.step_values

    def written(*arguments: Any, **options: Any) -> Any:
        note()
        return step_values(*arguments, **options)

    pretrain.segment.step_values = written


def test_the_limit_holds_for_a_steps_own_work_and_for_nothing_that_is_written(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=4", "evaluate.every_steps=2", "evaluate.sequences=8", "checkpoint.every_steps=2")
    config, file = light_config(prepared, *keys), tmp_path / "phases"
    assert run_ranks(train_with, 1, config, tmp_path / "run", note_quick_phases, file) == ["FINISHED"]
    own = ["forward", "backward", "update", "adding up over ranks", "reading the step's sums"]
    assert json.loads(file.read_text()) == [own, []]
