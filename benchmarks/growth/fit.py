"""Exponents of growth: straight lines through logarithms, by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def power_law(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """c and p of c * size^p: the straight line through the logarithms."""
    slope, intercept = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(np.exp(intercept)), float(slope)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of `power_law`."""
    return power_law(sizes, values)[1]


def leave_one_out(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """The least and the largest exponent when one point is left out. None for two points: one has no exponent."""
    if len(sizes) < 3:
        return None
    others = [[number for number in range(len(sizes)) if number != out] for out in range(len(sizes))]
    found = [exponent([sizes[n] for n in kept], [values[n] for n in kept]) for kept in others]
    return min(found), max(found)


def residual(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The largest distance of a point from its power law, as a share of the law's value."""
    factor, power = power_law(sizes, values)
    return max(abs(value / (factor * size**power) - 1.0) for size, value in zip(sizes, values, strict=True))


def local_exponents(sizes: Sequence[float], values: Sequence[float]) -> list[float]:
    """Between neighbouring points."""
    return [exponent([a, b], [u, v]) for (a, b), (u, v) in zip(pairwise(sizes), pairwise(values), strict=True)]


def fixed_share(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The part of the first value that does not grow with the size, if the values lie on a straight line. Distances
    count relative to the values: otherwise the noise of the largest would decide about the smallest."""
    return float(np.polyfit(sizes, values, 1, w=1.0 / np.asarray(values))[1] / values[0])
