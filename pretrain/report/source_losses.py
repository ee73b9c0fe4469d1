"""The losses of the sources of a mixture among the values of a validation: keys loss/NAME."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.tables import listed

MOST_SOURCES = 6
"""In a line."""


def source_losses(values: Mapping[str, Any], prefix: str = "loss/") -> dict[str, Any]:
    """Source -> loss in nats per token, in the order of the mixture; None is a loss that is not finite. Empty for one
    data set, and in runs from before these losses existed."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def sources_text(losses: Mapping[str, Any]) -> str:
    """`c4 3.1234, pes2o 2.9876`, and how many more there are."""
    return listed([f"{name} {_number(loss)}" for name, loss in losses.items()], MOST_SOURCES)


def _number(loss: Any) -> str:
    return f"{loss:.4f}" if isinstance(loss, int | float) and math.isfinite(loss) else "not finite"
