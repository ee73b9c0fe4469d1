"""Pictures of docs/benchmarks.md: panels side by side in one PNG."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


@contextlib.contextmanager
def picture(path: Path, panels: int, size: tuple[float, float], **options: Any) -> Iterator[tuple[Any, Any]]:
    """matplotlib's figure of so many panels in a row, and their axes; written to `path` when the block ends. `size`:
    inches; `options`: of plt.subplots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained", **options)
    yield figure, axes[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


class Bar(NamedTuple):
    """One bar, from left to right."""

    name: str
    value: float
    label: str
    """Written at its end."""


def draw_bars(panels: Mapping[str, Sequence[Bar]], axis_label: str, path: Path) -> None:
    """PNG with a panel for each title, side by side, all on one scale, the first bar on top."""
    longest = max(bar.value for bars in panels.values() for bar in bars)
    tallest = max(len(bars) for bars in panels.values())
    size = 1.5 + 4.5 * len(panels), 0.9 + 0.34 * tallest
    with picture(path, len(panels), size, sharey=True, sharex=True) as (_, axes):
        for axis, (title, bars) in zip(axes, panels.items(), strict=True):
            drawn = axis.barh([bar.name for bar in bars], [bar.value for bar in bars], 0.7)
            axis.bar_label(drawn, [bar.label for bar in bars], padding=3, fontsize=8)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(axis_label, fontsize=9)
            axis.set_xlim(right=1.7 * longest)  # room for the labels
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].invert_yaxis()
