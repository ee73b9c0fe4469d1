"""A comparison as a picture and as one HTML page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from common import html_page
from common.tables import shortened_apart
from common.terminal import visible
from pretrain.views.comparison import AXES, Run, splits_of
from pretrain.views.comparison_text import DIFFERS, notes, tables

MARKS = "^svDP*"
"""Of the sources of a mixture; of more curves than these none is drawn, for nobody could tell them apart."""
DOTS = {"validation": ("o", "dots"), "test": ("X", "crosses"), "train": ("p", "pentagons")}
"""How the losses of a split are marked, and what a person calls that."""
POINTS = 600
"""Most points of a curve: the mean of its steps in as many equal parts."""
LEGEND_LETTERS, TITLE_LETTERS = 168, 28
"""Letters for which the width of the picture has room, and for a name in the title of one part."""

WIDE = 10.0
"""Losses or norms that differ by more than this factor, as after a blow-up, are drawn on a logarithmic axis, or the
others would lie on one line."""


COLOURS, DASHES = 10, ("-", "--", ":", "-.")
"""Of matplotlib's cycle, and how the lines of every further ten runs are broken."""


def look(number: int) -> dict[str, Any]:
    """Colour and line of a run, which no other of the first forty has."""
    return {"color": f"C{number % COLOURS}", "linestyle": DASHES[number // COLOURS % len(DASHES)]}


def fill(number: int) -> Literal["full", "none"]:
    """Of its dots."""
    return "full" if number < COLOURS else "none"


def set_scale(axes: Axes) -> None:
    """Makes the vertical axis logarithmic where the lines in it are that far apart; zero has no logarithm."""
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines] or [np.array([])])
    values = values[np.isfinite(values)]
    if len(values) and 0 < values.min() < values.max() / WIDE:
        axes.set_yscale("log")


def thinned(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbouring points, so that a curve has `points` at most; what is not finite is left out."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= points:
        return x, y
    edges = np.arange(points) * len(x) // points
    sizes = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def drawn(runs: Sequence[Run]) -> bytes:
    """PNG: losses against steps (those of validations as dots, of a few sources as marks), tokens, FLOPs; how far the
    others are from the first (of a single run: its learning rate), gradient norm, speed."""
    columns, most = _legend_columns(runs)
    rows = -(-len(runs) // columns)
    wide, high = 15.0, 8.1 + 0.2 * max(rows, 2)
    figure = Figure(figsize=(wide, high), dpi=100)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(2, 3)
    for axes, (axis, name) in zip(grid[0], AXES.items(), strict=True):
        _curves(axes, runs, axis, "loss")
        axes.set(title=f"training loss against {name}", xlabel=name, ylabel="nats per token")
    for number, run in enumerate(runs):
        for split in run.view.splits:
            dots = {"color": f"C{number}", "markersize": 5, "fillstyle": fill(number)}
            grid[0, 0].plot(*zip(*run.view.validations(split), strict=True), DOTS[split][0], **dots)
    if splits := splits_of(runs):
        shown = [f"{split} loss ({DOTS[split][1]})" for split in splits]
        grid[0, 0].set_title(f"training loss, {' and '.join(shown)}{' against steps' * (len(shown) == 1)}")
    _sources(grid[0, 0], runs)
    if len(runs) > 1:
        _distance(grid[1, 0], runs)
    else:
        _curves(grid[1, 0], runs, "step", "lr")
        grid[1, 0].set(title="learning rate", xlabel="steps", ylabel="learning rate")
    for axes, key, title, unit in (
        (grid[1, 1], "grad_norm", "gradient norm before clipping", "norm"),
        (grid[1, 2], "tokens_per_second", "speed", "tokens per second"),
    ):
        _curves(axes, runs, "step", key)
        axes.set(title=title, xlabel="steps", ylabel=unit)
    for axes in grid.flat:
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))  # numbers as short as their place is narrow
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 2.5, 5, 10), integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1.5T
    for axes in (*grid[0], grid[1, 1]):
        set_scale(axes)
    # Its own handles: a curve whose label begins with _ would have none. A name may also hold a $.
    handles = [Line2D([], [], **look(number)) for number in range(len(runs))]
    legend = figure.legend(handles, ["" for _ in runs], loc="lower center", ncols=columns, frameon=False)
    for entry, name in zip(legend.get_texts(), shortened_apart([run.label for run in runs], most), strict=True):
        entry.set(text=name, parse_math=False)
    # Inches that the words need: to measure them (tight_layout) would take longer than to draw them.
    edges = {"left": 0.8 / wide, "right": 1 - 0.2 / wide, "bottom": (0.8 + 0.2 * rows) / high, "top": 1 - 0.4 / high}
    figure.subplots_adjust(**edges, wspace=0.24, hspace=0.3)
    data = io.BytesIO()
    with warnings.catch_warnings():  # a letter that the font lacks is drawn as a box; extremes of an axis overflow
        warnings.simplefilter("ignore")
        canvas.print_png(data)
    return data.getvalue()


def _legend_columns(runs: Sequence[Run]) -> tuple[int, int]:
    """Columns of the legend, in which the longest name of a run has room, and the most letters of a name. A sweep's
    runs have long names, with every value that was varied."""
    longest = max(len(run.label) for run in runs)
    columns = max(1, min(4, len(runs), LEGEND_LETTERS // (longest + 8)))  # 8: line and gap
    return columns, LEGEND_LETTERS // columns - 8


def _curves(axes: Axes, runs: Sequence[Run], axis: str, key: str) -> None:
    for number, run in enumerate(runs):
        x, y = thinned(run.column(axis), run.column(key))
        # Wider and paler, so that the first is seen below one that is equal.
        width, alpha = (1.2, 1.0) if number else (3.0, 0.5)
        axes.plot(x, y, **look(number), linewidth=width, alpha=alpha)
    axes.grid(alpha=0.3)


def _sources(axes: Axes, runs: Sequence[Run]) -> None:
    """The validation losses of the sources of mixtures, a mark for each source, where these are few enough to be told
    apart."""
    splits = splits_of(runs)
    found = [
        [
            (step, {(split, name): loss for name, loss in losses.items()})
            for split in splits
            for step, losses in run.view.source_validations(split)
        ]
        for run in runs
    ]
    names = list(dict.fromkeys(name for of_run in found for _, losses in of_run for name in losses))
    if not names or len(names) * len(runs) > len(MARKS):
        return
    for number, of_run in enumerate(found):
        for name, mark in zip(names, MARKS, strict=False):
            points = [(step, losses[name]) for step, losses in of_run if name in losses]
            if points:
                axes.plot(*zip(*points, strict=True), f"{mark}:", color=f"C{number}", markersize=4, linewidth=0.8)
    marks = [Line2D([], [], color="gray", marker=mark, linestyle=":") for mark in MARKS[: len(names)]]
    shown = [name if len(splits) == 1 else f"{name} ({split})" for split, name in names]
    title = f"{splits[0] if len(splits) == 1 else 'held out'}, by source"
    for text in axes.legend(marks, shown, title=title, fontsize=8, title_fontsize=8).get_texts():
        text.set_parse_math(False)


def _distance(axes: Axes, runs: Sequence[Run]) -> None:
    for number, other in enumerate(runs[1:], start=1):
        steps, ours, theirs = np.intersect1d(runs[0].column("step"), other.column("step"), return_indices=True)
        distance = other.column("loss")[theirs] - runs[0].column("loss")[ours]
        axes.plot(*thinned(steps, distance), **look(number), linewidth=1.2)
    axes.axhline(0.0, color="C0", linewidth=1.0)
    axes.grid(alpha=0.3)
    name = shortened_apart([run.label for run in runs], TITLE_LETTERS)[0]
    axes.set_title(f"loss less that of {name}", parse_math=False, pad=14)  # room for the axis' power of ten
    axes.set(xlabel="steps", ylabel="nats per token")


def page(runs: Sequence[Run], tolerance: float, png: bytes) -> str:
    """The HTML file."""
    parts = [f"<h1>{escape(' and '.join(run.label for run in runs))}</h1>"]
    parts.append(
        html_page.table(
            ("run", "folder"), [(escape(r.label), escape(visible(str(r.view.path)))) for r in runs], numbers=()
        )
    )
    parts.append(html_page.image(png, "curves of all runs"))
    noted = [f"<p>Note: {escape(note)}.</p>" for note in notes(runs)]
    parts += noted if len(runs) == 1 else []  # nothing differs of one
    for title, header, rows in tables(runs, tolerance):
        parts.append(f"<h2>{escape(title)}</h2>")
        cells = [tuple(map(escape, row)) for row in rows]
        numbers = range(1, len(header)) if not title.startswith("What") else ()
        parts.append(html_page.table(tuple(map(escape, header)), cells, numbers=numbers) if rows else "<p>nothing</p>")
        if title == DIFFERS:
            parts += noted
    what = "Curves of " if len(runs) == 1 else "Comparison of "
    return html_page.page(what + ", ".join(run.label for run in runs), parts)
