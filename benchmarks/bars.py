"""Pictures of docs/benchmarks.md that are one row of bars for each tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Bar(NamedTuple):
    """One bar, from left to right."""

    name: str
    value: float
    label: str
    """Written at its end."""


def draw_bars(panels: Mapping[str, Sequence[Bar]], axis_label: str, path: Path) -> None:
    """PNG with a panel for each title, side by side, all on one scale, the first bar on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    longest = max(bar.value for bars in panels.values() for bar in bars)
    tallest = max(len(bars) for bars in panels.values())
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.5 + 4.5 * len(panels), 0.9 + 0.34 * tallest),
        sharey=True,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, bars) in zip(axes[0], panels.items(), strict=True):
        drawn = axis.barh([bar.name for bar in bars], [bar.value for bar in bars], 0.7)
        axis.bar_label(drawn, [bar.label for bar in bars], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(axis_label, fontsize=9)
        axis.set_xlim(right=1.7 * longest)  # room for the labels
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
