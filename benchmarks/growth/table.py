"""The tables and the picture of docs/benchmarks.md, and the same for a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.growth import fit
from benchmarks.growth.axes import AXES
from benchmarks.marked import markdown
from benchmarks.pictures import picture
from common.tables import text_table


class Series(NamedTuple):
    """Times along an axis."""

    axis: str
    """Name in AXES, or ranks."""
    name: str
    sizes: list[int]
    seconds: list[float]
    """Medians over rounds."""
    macs: list[int]
    """Multiply-accumulates of a step; on ranks those of one rank, in units of themselves."""


def series(found: Any) -> Iterator[Series]:
    """All that has an exponent: two points or more."""
    for axis, families in found["axes"].items():
        for family, points in families.items():
            sizes, macs = ([point[key] for point in points] for key in ("size", "macs"))
            yield Series(axis, family, sizes, [statistics.median(point["seconds"]) for point in points], macs)
    # More ranks than cores share them, and how that prolongs a step says nothing about the ranks.
    own_core = [point for point in found["ranks"] if point["ranks"] <= found["cores"]]
    for name, clock, points in (("step", "passed", own_core), ("processor time", "worked", found["ranks"])):
        if len(points) > 1:
            sizes, times = [point["ranks"] for point in points], [statistics.median(point[clock]) for point in points]
            yield Series("ranks", name, sizes, times, [1] * len(points))


HEADER = ["what grows", "of", "from, to", "ms", "exponent of time", "one point left out", "of MACs"]
HEADER += ["between neighbours", "largest residual", "fixed share of time", "of MACs"]
RANKS_HEADER = ["ranks", "cores", "step ms", "to the first", "processor ms of a rank", "to the first"]
RANKS_HEADER += ["MB sent by a rank"]


def rows(found: Any) -> list[list[str]]:
    """A line for each series."""
    lines = []
    for one in series(found):
        sizes, seconds = one.sizes, one.seconds
        left_out, straight = fit.leave_one_out(sizes, seconds), one.axis in AXES and AXES[one.axis].is_straight
        shares = [f"{fit.fixed_share(sizes, values):.0%}" if straight else "-" for values in (seconds, one.macs)]
        lines.append(
            [
                AXES[one.axis].label if one.axis in AXES else one.axis,
                one.name,
                f"{sizes[0]}, {sizes[-1]}",
                f"{1e3 * seconds[0]:.0f}, {1e3 * seconds[-1]:.0f}",
                f"{fit.exponent(sizes, seconds):.2f}",
                f"{left_out[0]:.2f} to {left_out[1]:.2f}" if left_out else "-",
                f"{fit.exponent(sizes, one.macs):.2f}",
                ", ".join(f"{value:.2f}" for value in fit.local_exponents(sizes, seconds)),
                f"{fit.residual(sizes, seconds):.0%}",
                *shares,
            ]
        )
    return lines


def rank_rows(found: Any) -> list[list[str]]:
    """A line for each number of ranks: medians over rounds."""
    lines, first = [], None
    for point in found["ranks"]:
        passed, worked = (statistics.median(point[clock]) for clock in ("passed", "worked"))
        first = first or (passed, worked)
        lines.append(
            [
                str(point["ranks"]),
                str(min(point["ranks"], found["cores"])),
                f"{1e3 * passed:.0f}",
                f"{passed / first[0]:.2f}",
                f"{1e3 * worked:.0f}",
                f"{worked / first[1]:.2f}",
                f"{point['sent'] / 1e6:.1f}",
            ]
        )
    return lines


def text(found: Any) -> str:
    """For a terminal."""
    both = (HEADER, rows(found), {0, 1}), (RANKS_HEADER, rank_rows(found), set[int]())
    return "\n\n".join(text_table(header, lines, left=left) for header, lines, left in both if lines)


def page(found: Any) -> str:
    """The tables of docs/benchmarks.md."""
    both = (HEADER, rows(found)), (RANKS_HEADER, rank_rows(found))
    return "\n\n".join(markdown(header, lines) for header, lines in both if lines)


def draw(found: Any, path: Path) -> None:
    """PNG: a panel for each axis, logarithmic, all of the same height in powers of ten, so that slopes compare: times,
    their power law, and multiply-accumulates (dotted), which meet the law at the smallest size."""
    from matplotlib import ticker

    panels: dict[str, list[Series]] = {}
    for one in series(found):
        panels.setdefault(one.axis, []).append(one)
    count = max(1, len(panels))
    with picture(path, count, (3.6 * count, 3.6)) as (_, axes):
        for panel, (axis, group) in zip(axes, panels.items(), strict=False):
            for number, one in enumerate(group):
                _draw_series(panel, one, f"C{number}")
            ticks = sorted({size for one in group for size in one.sizes})
            panel.set_xticks(ticks, [str(size) for size in ticks])
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            panel.minorticks_off()
            panel.set_xlabel(AXES[axis].label if axis in AXES else axis)
            panel.legend(fontsize=7, loc="upper left")
        limits = [panel.get_ylim() for panel in axes]
        half = max(math.sqrt(high / low) for low, high in limits) * 1.3  # and room for the legend
        for panel, (low, high) in zip(axes, limits, strict=True):
            middle = math.sqrt(low * high)
            panel.set_ylim(middle / half, middle * half)
        axes[0].set_ylabel("ms of a step")


def _draw_series(panel: Any, one: Series, color: str) -> None:
    factor, power = fit.power_law(one.sizes, one.seconds)
    law = [1e3 * factor * size**power for size in one.sizes]
    label = f"{one.name}: time {power:.2f}, MACs {fit.exponent(one.sizes, one.macs):.2f}"
    panel.loglog(one.sizes, [1e3 * value for value in one.seconds], "o", color=color, markersize=4)
    panel.loglog(one.sizes, law, "-", color=color, label=label)
    panel.loglog(one.sizes, [law[0] * value / one.macs[0] for value in one.macs], ":", color=color)
