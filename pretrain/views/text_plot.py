"""A curve as text, in braille dots where the terminal has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Unicode's bits of a braille character's dots, by row and column."""


def text_plot(x: Sequence[float], y: Sequence[float], *, width: int, height: int, braille: bool = True) -> list[str]:
    """Lines of text: `y` against `x`, both axes labelled at their ends.

    A column shows the mean of its points. Points that are not finite are left out; without any other the result is
    empty. width, height: characters of the whole and of the curve.
    """
    # Sorted, because a run that has lost its folder to another one may have written a last, older step into it.
    points = sorted((a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b))
    if not points:
        return []
    low, high = min(b for _, b in points), max(b for _, b in points)
    labels = f"{high:.4g}", f"{low:.4g}"
    margin = max(map(len, labels)) + 1
    columns, rows = max(8, width - margin - 1), height
    across, down = (2, 4) if braille else (1, 1)
    heights = _binned(points, columns * across)
    span = (high - low) or 1.0
    bits = [[0] * columns for _ in range(rows)]
    before: int | None = None
    for number, value in heights:
        dot = round((high - value) / span * (rows * down - 1))
        # A steep curve stays connected: the dots between this one and its neighbour's are set as well.
        reached = range(dot, dot + 1) if before is None else range(min(dot, before + 1), max(dot, before - 1) + 1)
        for place in reached:
            bits[place // down][number // across] |= DOTS[place % 4][number % 2] if braille else 1
        before = dot
    text = ["".join(chr(0x2800 + b) if braille else " *"[b] for b in row) for row in bits]
    axis = "│" if braille else "|"
    lines = [f"{'':>{margin}}{axis}{row}" for row in text]
    lines[0] = f"{labels[0]:>{margin}}{axis}{text[0]}"
    lines[-1] = f"{labels[1]:>{margin}}{axis}{text[-1]}"
    first, last = f"{points[0][0]:,.0f}", f"{points[-1][0]:,.0f}"
    return [line.rstrip() for line in lines] + [" " * (margin + 1) + first + last.rjust(columns - len(first))]


def _binned(points: list[tuple[float, float]], count: int) -> list[tuple[int, float]]:
    """The mean of y in each of `count` equal parts of the x axis that has points, with the part's number."""
    first, last = points[0][0], points[-1][0]
    found: dict[int, list[float]] = {}
    for x, y in points:
        number = int((x - first) / ((last - first) or 1.0) * (count - 1) + 0.5)
        found.setdefault(number, []).append(y)
    return [(number, sum(values) / len(values)) for number, values in sorted(found.items())]
