"""The share of each checkpoint in a mean. Imports no torch, for which a refusal need not wait."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.arguments import quoted
from common.errors import UserError
from common.tables import counted


def read_weights(text: str) -> list[float]:
    """The numbers of --weights. Raises UserError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights: {quoted(text)} are no numbers; write e.g. 1,1,2") from None


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """`count` shares whose sum is 1, from positive numbers; None: all the same. Raises UserError."""
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise UserError(f"--weights: {counted(len(given), 'weight')} for {count} checkpoints; give one for each")
    for weight in given:
        if not (weight > 0.0 and math.isfinite(weight)):
            raise UserError(f"--weights: {weight:g} is no share; give positive numbers")
    largest = max(given)  # first: their sum may be more than a float holds
    shares = [weight / largest for weight in given]
    return [share / sum(shares) for share in shares]
