"""Exponents of growth: straight lines through logarithms, by least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def line(x: Sequence[float], y: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Intercept and slope of the straight line with the least sum of (weight * distance)^2. At least two different x;
    the weights are 1 if there are none."""
    squares = [w * w for w in weights or [1.0] * len(x)]
    total = sum(squares)
    mean_x, mean_y = (sum(w * v for w, v in zip(squares, values, strict=True)) / total for values in (x, y))
    variance = sum(w * (a - mean_x) ** 2 for w, a in zip(squares, x, strict=True))
    slope = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(squares, x, y, strict=True)) / variance
    return mean_y - slope * mean_x, slope


def power_law(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """c and p of c * size^p: the straight line through the logarithms."""
    intercept, slope = line([math.log(s) for s in sizes], [math.log(v) for v in values])
    return math.exp(intercept), slope


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
    return line(sizes, values, [1.0 / value for value in values])[0] / values[0]
