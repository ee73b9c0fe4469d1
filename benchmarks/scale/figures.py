"""What a simulation gives: figures by part, and a table with a column for each number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.tables import text_table


class Figure(NamedTuple):
    """One number of a simulation."""

    what: str
    value: float
    unit: str


Parts = dict[str, Sequence[Figure]]
"""What was simulated -> its figures."""


def table(found: dict[int, Parts]) -> str:
    """Figures by number of ranks, which all have the same rows."""
    header = ["part", "what", "unit", *(f"{ranks:,}" for ranks in found)]
    rows = []
    for part in next(iter(found.values())):
        for row in zip(*(parts[part] for parts in found.values()), strict=True):
            first = row[0]
            assert all(figure._replace(value=0) == first._replace(value=0) for figure in row), first
            rows.append([part, first.what, first.unit, *(_text(figure.value) for figure in row)])
    return text_table(header, rows, left={0, 1, 2})


def _text(value: float) -> str:
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"
