"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pretrain.config import Config


def warmup_steps(config: Config) -> int:
    """schedule.warmup_steps, clipped so that at least one step follows the warm-up."""
    return min(config.schedule.warmup_steps, config.train.steps - 1)


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0).

    Linear from peak / (warmup + 1) to the peak during warm-up, then a cosine that reaches final_ratio x peak at
    train.steps (after the last step, so that the last step still learns).
    """
    peak = config.optimizer.learning_rate
    warmup = warmup_steps(config)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (config.train.steps - warmup)
    final = config.schedule.final_ratio
    return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))
