"""What is trained: five models of one size on one text, each with a learning rate chosen in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.paths import REPOSITORY

CONFIGS = REPOSITORY / "configs" / "quality"
SEEDS = {"dense": 3, "dense_2heads": 2, "moa": 2, "switchhead": 3, "switchall": 3}
"""Model -> how many seeds are trained: more for the dense model and the two that this project is about."""
RATES = (0.004, 0.008, 0.016)
"""The learning rates that every model tries first: of 0.001 to 0.008 all were best at the highest, on an H200."""
LOWEST, HIGHEST = 0.00025, 0.064
"""Bounds of further ones."""
TUNED_STEPS = 250
"""2.05 million tokens, with a schedule of that length."""
STEPS = 1000
"""8.19 million tokens."""


class Training(NamedTuple):
    """One run."""

    model: str
    """Of configs/quality."""
    rate: float
    """Learning rate at its highest."""
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.steps}-{self.rate:g}-{self.seed}"

    @property
    def config(self) -> Path:
        return CONFIGS / f"{self.model}.json"

    @property
    def overrides(self) -> list[str]:
        """KEY=VALUE, beside the data and the run folder."""
        return [
            f"optimizer.learning_rate={self.rate}",
            f"train.seed={self.seed}",
            f"train.steps={self.steps}",
            f"schedule.warmup_steps={self.steps // 10}",
        ]


def rates(model: str, losses: dict[str, float]) -> list[float]:
    """Those that a model tries, rising: RATES, and while the best is the lowest or the highest, half or twice of it.
    `losses`: name of a run -> its last validation loss, NaN if it failed."""
    found = list(RATES)
    while (best := _best(model, found, losses)) is not None:
        if best == found[-1] and best < HIGHEST:
            found.append(2 * best)
        elif best == found[0] and best > LOWEST:
            found.insert(0, best / 2)
        else:
            break
    return found


def _best(model: str, tried: Sequence[float], losses: dict[str, float]) -> float | None:
    """The rate whose short run ended with the lowest validation loss; None: not all have ended, or all have failed."""
    of_rates = {rate: losses.get(Training(model, rate, 0, TUNED_STEPS).name) for rate in tried}
    if any(loss is None for loss in of_rates.values()):
        return None
    finite = {rate: loss for rate, loss in of_rates.items() if loss is not None and loss == loss}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def tuning(losses: dict[str, float]) -> Iterator[Training]:
    """The short runs that choose a learning rate for each model, as far as `losses` say which."""
    for model in SEEDS:
        for rate in rates(model, losses):
            yield Training(model, rate, 0, TUNED_STEPS)


def chosen_rate(model: str, losses: dict[str, float]) -> float | None:
    """The best of those that a model tries; None: not all have ended, or all have failed."""
    return _best(model, rates(model, losses), losses)


def compared(losses: dict[str, float]) -> Iterator[Training]:
    """The runs whose perplexities are compared, of those models whose learning rate is known: first one seed of every
    model, then the second."""
    for seed in range(max(SEEDS.values())):
        for model, seeds in SEEDS.items():
            rate = chosen_rate(model, losses)
            if seed < seeds and rate is not None:
                yield Training(model, rate, seed, STEPS)


def missing(losses: dict[str, float]) -> Iterator[Training]:
    """In their order, those without a result of which everything is known."""
    return (training for training in (*tuning(losses), *compared(losses)) if training.name not in losses)
