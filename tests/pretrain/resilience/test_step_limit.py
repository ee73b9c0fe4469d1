"""The limit of a step follows what steps took, and only where that tells something."""

from __future__ import annotations

import pytest

from pretrain.config.schema import ResilienceConfig
from pretrain.phases import Phases
from pretrain.resilience.step_limit import StepLimit


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
