"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pretrain.config.schema import Config, ScheduleConfig

SPANNING = ("cosine", "published", "linear")
"""Shapes that span the whole run: if train.steps changes, every rate after the warm-up changes. The rates of the other
shapes do not depend on train.steps, except in wsd's decay."""


def warmup_steps(config: Config) -> int:
    """schedule.warmup_steps; for a shape that spans the whole run it is clipped, so that at least one step follows the
    warm-up."""
    return _warmup_steps(config.schedule, config.train.steps)


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0)."""
    return _rate(config.schedule, config.optimizer.learning_rate, config.train.steps, step)


def keeps_the_past(then: tuple[ScheduleConfig, int], now: tuple[ScheduleConfig, int], done: int) -> bool:
    """Whether a run of (schedule, train.steps) `then` may go on as `now` after `done` steps: true if neither shape
    spans the run and all rates so far, for the same peak, are the same under both."""
    (schedule_then, steps_then), (schedule_now, steps_now) = then, now
    if done > min(steps_then, steps_now) or schedule_then.shape in SPANNING or schedule_now.shape in SPANNING:
        return False
    return all(
        _rate(schedule_then, 1.0, steps_then, step) == _rate(schedule_now, 1.0, steps_now, step) for step in range(done)
    )


def _warmup_steps(schedule: ScheduleConfig, steps: int) -> int:
    return min(schedule.warmup_steps, steps - 1) if schedule.shape in SPANNING else schedule.warmup_steps


def _rate(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """The warm-up of W steps rises from peak / (W + 1) to W peak / (W + 1), and step W has the peak. The published one
    rises from peak / W to the peak, and step W has the peak again. The curve ends at `steps`, one after the last step,
    so the last step still learns."""
    warmup, final = _warmup_steps(schedule, steps), schedule.final_ratio
    if schedule.shape == "wsd":
        return min(_warmed(peak, step, warmup), _decayed(schedule, peak, steps, step))
    if step < warmup:
        return peak / warmup * (step + 1) if schedule.shape == "published" else _warmed(peak, step, warmup)
    if schedule.shape == "constant":
        return peak
    if schedule.shape == "inverse_sqrt":
        return peak * math.sqrt((warmup + 1) / (step + 1))
    # The published cosine begins after the warm-up and is as long as the run, so the run ends before the cosine does.
    length = steps if schedule.shape == "published" else steps - warmup
    progress = (step - warmup) / length
    if schedule.shape == "linear":
        return peak * (final + (1.0 - final) * (1.0 - progress))
    return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def _warmed(peak: float, step: int, warmup: int) -> float:
    return peak * (step + 1) / (warmup + 1) if step < warmup else peak


def _decayed(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """wsd without its warm-up: the peak until the last decay_steps of the run, then down to final_ratio of it."""
    assert schedule.decay_steps is not None, "refused by ScheduleConfig"
    progress = max(0.0, 1.0 - (steps - step) / schedule.decay_steps)
    remaining = 1.0 - (progress if schedule.decay == "linear" else math.sqrt(progress))
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * remaining)
