"""Rounds of a measurement on a shared machine: what is compared runs in turns, and ratios are those of one round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def orders(names: Sequence[T], rounds: int) -> Iterator[T]:
    """Every name once a round, each round beginning with the next one."""
    for number in range(rounds):
        first = number % len(names)
        yield from (*names[first:], *names[:first])


def seconds() -> float:
    """A reading of the clock. Where one thread computes, that of the processors in all threads, which other processes
    of the machine do not prolong."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(own, other, strict=True)]


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds."""
    return statistics.median(ratios(own, other))


def quartiles(values: Sequence[float]) -> tuple[str, str]:
    """The median, and the quartiles around it, as a table shows them."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return f"{middle:.2f}", f"{low:.2f} to {high:.2f}"
