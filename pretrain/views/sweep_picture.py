"""A sweep as a picture: the loss that runs ended with against each value that was varied."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.tables import shortened
from pretrain.views.comparison_page import fill, look, set_scale
from pretrain.views.reading import State
from pretrain.views.sweep import BITS, Result, content_of, loss_name, number_of, ranked, short_keys

CONFIG = "config"
"""Stands for the configuration where keys stand."""
MOST_LETTERS = 24
"""Of a value in the picture."""
AXIS_INCHES, LETTER_INCHES = 5.2, 0.09
"""From the lowest to the highest number on an axis, and of a letter below it (a layout is known once it is drawn)."""
MOST_IN_A_ROW = 60
"""Letters of words below an axis; more stand aslant."""
MOST_LABELS = 16
"""More lines than this have no legend, which would cover them."""


def losses_drawn(results: Sequence[Result], keys: Sequence[str]) -> bytes:
    """PNG of the finished runs: for each key with several values, and for the configurations, the loss against the
    value, in one colour for each combination of the others. Of runs that differ in their seeds alone the mean is drawn,
    with the standard deviation (of a sample) as a bar; against the seeds themselves each run. A star is the best."""
    varied = [key for key in (*keys, CONFIG) if len({_value(result, key) for result in results}) > 1] or [CONFIG]
    name = loss_name(results)
    finished = [r for r in ranked(results) if r.state is State.FINISHED and math.isfinite(r.loss(name))]
    figure = Figure(figsize=(6.5 * len(varied), 5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, len(varied), squeeze=False)[0], varied, strict=True):
        _lines(axes, results, finished, key, [other for other in varied if other != key])
    data = io.BytesIO()
    canvas.print_png(data)
    return data.getvalue()


def _lines(axes: Axes, results: Sequence[Result], finished: Sequence[Result], key: str, others: Sequence[str]) -> None:
    name = loss_name(results)
    if not key.endswith("seed"):
        others = [other for other in others if not other.endswith("seed")]
    places, short = _places(results, key), short_keys([other for other in others if other != CONFIG])
    names = {every: _names(results, every) for every in (key, *others)}
    lines: dict[str, dict[float, list[float]]] = {}
    for result in finished:
        texts = {other: names[other][_value(result, other)] for other in others}
        label = ", ".join(text if other == CONFIG else f"{short[other]}={text}" for other, text in texts.items())
        lines.setdefault(label, {}).setdefault(places[_value(result, key)], []).append(result.loss(name))
    curves: list[Line2D] = []
    for number, (label, points) in enumerate(sorted(lines.items())):
        curve = {**look(number), "marker": "o", "fillstyle": fill(number), "linewidth": 1.2}
        if not _are_numbers(results, key):
            curve["linestyle"] = ""  # nothing lies between two words
        at = sorted(points)
        means = [statistics.fmean(points[place]) for place in at]
        curves += axes.plot(at, means, label=label, **curve)
        bars = [statistics.stdev(points[place]) if len(points[place]) > 1 else 0.0 for place in at]
        if any(bars):
            axes.errorbar(at, means, yerr=bars, fmt="none", ecolor=curves[-1].get_color(), capsize=3)
    if finished:
        best = min(((statistics.fmean(v), place) for points in lines.values() for place, v in points.items()))
        axes.plot(best[1], best[0], "k*", markersize=14)
    is_log = _are_numbers(results, key) and min(places.values()) > 0
    if is_log:
        axes.set_xscale("log")
    shown = names[key]
    if _are_numbers(results, key):
        best_first = [_value(result, key) for result in finished[:1]]
        shown = _with_room(names[key], {v: math.log(x) if is_log else x for v, x in places.items()}, best_first)
    axes.set_xticks(list(places.values()), labels=[shown.get(value, "") for value in places])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(key, parse_math=False)
    axes.set(ylabel=name if name.endswith(BITS) else f"{name} loss, nats per token")
    set_scale(axes)
    axes.grid(alpha=0.3)
    for text in axes.get_xticklabels():
        text.set_parse_math(False)  # a user's value may hold a $
    if not _are_numbers(results, key) and sum(map(len, names[key].values())) > MOST_IN_A_ROW:
        for text in axes.get_xticklabels():
            text.set(rotation=20, ha="right", rotation_mode="anchor")
    if others and 0 < len(lines) <= MOST_LABELS:
        legend = axes.legend(curves, ["" for _ in curves], fontsize=8)
        for text, label in zip(legend.get_texts(), sorted(lines), strict=True):
            text.set(text=label, parse_math=False)  # set here: matplotlib leaves out labels that begin with _


def _names(results: Sequence[Result], key: str) -> dict[str, str]:
    """Of each value of a key a few letters that tell it from the others: of a list or a section what it holds."""
    values = dict.fromkeys(_value(result, key) for result in results)
    short = {value: shortened(" ".join(content_of(value)) or value, MOST_LETTERS) for value in values}
    found = list(short.values())
    return {
        value: f"{text} ({number})" if found.count(text) > 1 else text
        for number, (value, text) in enumerate(short.items(), start=1)
    }


def _with_room(names: dict[str, str], places: dict[str, float], first: Sequence[str]) -> dict[str, str]:
    """The names that stand side by side below an axis of numbers: those of `first`, the lowest and the highest, and of
    the others each that none of these would touch. Values close together, as of a search that was refined, have too
    little room for all of them."""
    rising = sorted(places, key=lambda value: places[value])
    inch = (places[rising[-1]] - places[rising[0]]) / AXIS_INCHES or 1.0
    kept: dict[str, str] = {}
    for value in dict.fromkeys([*first, rising[0], rising[-1], *rising]):
        room = (
            abs(places[value] - places[other]) / inch - LETTER_INCHES * len(name) / 2 for other, name in kept.items()
        )
        if all(gap > LETTER_INCHES * (len(names[value]) / 2 + 1) for gap in room):
            kept[value] = names[value]
    return kept


def _value(result: Result, key: str) -> str:
    return result.run.config if key == CONFIG else result.run.values[key]


def _are_numbers(results: Sequence[Result], key: str) -> bool:
    """Whether something lies between two values: a seed is a name."""
    return not key.endswith("seed") and all(number_of(_value(result, key)) is not None for result in results)


def _places(results: Sequence[Result], key: str) -> dict[str, float]:
    """Where each value lies on the axis: a number at itself, others side by side, seeds rising."""
    values = list(dict.fromkeys(_value(result, key) for result in results))
    if all(number_of(value) is not None for value in values):
        values.sort(key=lambda value: number_of(value) or 0.0)
    if not _are_numbers(results, key):
        return {value: float(place) for place, value in enumerate(values)}
    return {value: number for value in values if (number := number_of(value)) is not None}
