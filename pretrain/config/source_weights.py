"""The weights of data.sources as whole numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

LARGEST_PERIOD = 10_000
"""The longest period of a schedule, in positions; it takes about 0.1 s to compute."""


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights as written in decimal, e.g. [0.7, 0.3] -> [7, 3]."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    common = math.gcd(*whole)
    return [weight // common for weight in whole]
