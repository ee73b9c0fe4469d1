"""JSON according to the standard: other programs, which refuse NaN, read every file that training writes."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON; NaN and infinities, which JSON does not have, become null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(value), indent=indent, allow_nan=False)


def finite(value: float) -> float | None:
    """`value`, None if it is not finite."""
    return value if math.isfinite(value) else None


def without_nan(value: Any) -> Any:
    """`value` with None for every float that is not finite, inside lists, tuples and dicts too."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value
