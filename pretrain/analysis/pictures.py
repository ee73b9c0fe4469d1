"""PNG pictures of attention maps and experts. Every function returns the bytes of a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from common.tables import shortened
from pretrain.analysis.counting import gate_matrix
from pretrain.analysis.findings import Findings, shown

CELL_INCHES = 0.135
"""Of a token with a label."""
LETTERS_PER_INCH, FEWEST_LETTERS = 11, 12
"""Of a title, and the fewest that stay of a run's."""
LABEL_CHARACTERS = 12
MOST_LABELS = 96
"""Axes with more tokens than this have positions instead."""
FEWEST_CELLS = 24
"""Room for a title above a map of a few tokens."""
WEIGHT_NORM = PowerNorm(0.5, vmin=0.0, vmax=1.0)
"""Of attention weights in all maps, so that they compare; the square root shows small ones too."""
NOT_CHOSEN = "#e9e9e9"
UNITS = {"weight": "attention weight (colours by its square root)", "gate": "gate of the chosen expert"}


def maximum_maps(rows: Sequence[tuple[Findings, int]]) -> bytes:
    """For each run and its layer, the largest attention weight over heads of every query and key, side by side."""
    sizes = [(f.trace.maps[layer].shape[2], f.trace.maps[layer].shape[1]) for f, layer in rows]
    labelled = [max(size) <= MOST_LABELS for size in sizes]
    widths = [
        CELL_INCHES * max(size[0], FEWEST_CELLS) if has else 6.0 for size, has in zip(sizes, labelled, strict=True)
    ]
    heights = [
        CELL_INCHES * max(size[1], FEWEST_CELLS) if has else max(6.0 * size[1] / size[0], 2.0)
        for size, has in zip(sizes, labelled, strict=True)
    ]
    figure = _figure(sum(widths) + 1.3 * len(rows) + 0.9, max(heights) + 1.9)
    axes = figure.subplots(1, len(rows), squeeze=False, width_ratios=widths)[0]
    image: Any = None
    for place, (findings, layer), has_labels, width in zip(axes, rows, labelled, widths, strict=True):
        maps = findings.trace.maps[layer]
        image = _map(place, maps.max(0), findings, labels=has_labels)
        keys, queries = _axis_names(findings, labels=has_labels)
        place.set_xlabel(keys, fontsize=8)
        place.set_ylabel(queries, fontsize=8)
        many = f"{len(maps)} {findings.map_name}{'s' if len(maps) > 1 else ''}"
        title = _words(findings.title, f"\nlayer {layer}, maximum over {many}", width, lines=2)
        place.set_title(title, fontsize=9, parse_math=False)
    figure.colorbar(image, ax=axes, label=UNITS["weight"], shrink=0.7, aspect=30, ticks=[0, 0.05, 0.2, 0.5, 1])
    return _png(figure)


def head_maps(findings: Findings, layer: int) -> bytes:
    """The attention weights of every head of a layer."""
    maps = findings.trace.maps[layer]
    columns = min(len(maps), 5)
    rows = -(-len(maps) // columns)
    figure = _figure(2.3 * columns + 1.3, 2.4 * rows + 0.8)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for number, place in enumerate(axes.flat):
        if number >= len(maps):
            place.set_axis_off()
            continue
        image = _map(place, maps[number], findings, labels=False)
        place.set_title(f"{findings.map_name} {number}", fontsize=8)
        place.label_outer()
    # Once for all: the words are wider than a map, and those of two neighbours would lie over each other.
    keys, queries = _axis_names(findings, labels=False)
    figure.supxlabel(keys, fontsize=8)
    figure.supylabel(queries, fontsize=8)
    _title(figure, findings, f": layer {layer}, each {findings.map_name}")
    label = "attention weight" if rows == 1 else UNITS["weight"]
    figure.colorbar(image, ax=axes, label=label, shrink=0.8, ticks=[0, 0.05, 0.2, 0.5, 1])
    return _png(figure)


def selection(findings: Findings, layer: int, num_tokens: int) -> bytes:
    """The experts of each router of a layer against the first `num_tokens` drawn tokens, coloured by the gate."""
    tokens = findings.drawn(num_tokens)
    strips = [
        (f"{router.title}{f', head {head}' if router.index.shape[1] > 1 else ''}", matrix[:, head])
        for router, _ in findings.routers_of(layer)
        for matrix in (gate_matrix(router, tokens),)
        for head in range(router.index.shape[1])
    ]
    heights = [max(0.6, min(0.14, 4.0 / strip.shape[1]) * strip.shape[1]) for _, strip in strips]
    count = tokens.stop - tokens.start
    figure = _figure(CELL_INCHES * max(count, FEWEST_CELLS) + 2.0, sum(heights) + 0.34 * len(strips) + 1.6)
    axes = figure.subplots(len(strips), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    norm = matplotlib.colors.Normalize(0.0, 1.0)
    for place, (name, strip) in zip(axes, strips, strict=True):
        image = place.imshow(strip.T, aspect="auto", norm=norm, cmap=_colours("viridis_r"), interpolation="nearest")
        place.set_title(name, fontsize=8, loc="left", pad=2)
        place.set_ylabel("expert", fontsize=7)
        _few_ticks(place.yaxis, strip.shape[1])
    _token_labels(axes[-1].xaxis, findings.pieces[tokens], rotation=90)
    axes[-1].set_xlabel("token of the text", fontsize=8)
    figure.colorbar(
        image,
        ax=list(axes),
        label=UNITS["gate"] + "\n(grey: not chosen)",  # in one line longer than a strip or two are high
        aspect=40,
        shrink=min(1.0, 4.0 / sum(heights)),
    )
    _title(figure, findings, f": experts chosen in layer {layer}")
    return _png(figure)


def together(findings: Findings, layer: int) -> bytes | None:
    """For each router of a layer with at least two choices: of the tokens that chose the row's expert, the share that
    chose the column's too. None if a layer has no such router."""
    panels = [
        (f"{router.title}{f', head {head}' if len(counts.load) > 1 else ''}", counts.given()[head])
        for router, counts in findings.routers_of(layer)
        if router.index.shape[2] > 1
        for head in range(len(counts.load))
    ]
    if not panels:
        return None
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = _figure(2.7 * columns + 1.2, 2.7 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False)
    image: Any = None
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    for place, (name, share) in zip(axes.flat, panels, strict=False):
        share = share.copy()
        np.fill_diagonal(share, np.nan)
        image = place.imshow(share, vmin=0, vmax=1, cmap=_colours("magma_r"), interpolation="nearest")
        place.set_title(name, fontsize=8)
        place.set_xlabel("also this expert", fontsize=7)
        place.set_ylabel("tokens of expert", fontsize=7)
        for axis in (place.xaxis, place.yaxis):
            _few_ticks(axis, len(share))
    figure.colorbar(image, ax=axes, label="share of its tokens", shrink=0.8)
    _title(figure, findings, f": experts chosen together in layer {layer}")
    return _png(figure)


def load(findings: Findings, kind: str) -> bytes:
    """The load of every expert of a kind of router, a row for each layer and head, in units of the row's mean."""
    rows, names = [], []
    for router, counts in findings.kinds()[kind]:
        for head, row in enumerate(counts.load):
            rows.append(row / max(row.mean(), 1e-9))
            names.append(f"layer {router.layer}" + (f", head {head}" if len(counts.load) > 1 else ""))
    values = np.array(rows)
    height, width = 0.17 * len(values), max(2.6, min(0.3 * values.shape[1], 12.0))
    figure = _figure(width + 2.6, max(height, 1.6) + 1.3)
    axes = figure.subplots()
    top = max(2.0, float(values.max()))
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
    dead = np.argwhere(values == 0)
    if len(dead):
        axes.plot(dead[:, 1], dead[:, 0], "x", color="#ff4d4d", markersize=4, label="dead: no token chose it")
        axes.legend(
            loc="upper left", bbox_to_anchor=(0, -0.55 / max(height, 1.6)), fontsize=7, frameon=False, borderaxespad=0
        )
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("expert", fontsize=8)
    _few_ticks(axes.xaxis, values.shape[1])
    figure.colorbar(image, ax=axes, label="load / mean load of the row")
    _title(figure, findings, f"\n{kind}", lines=2)  # narrow, and names of a sweep's runs are long
    return _png(figure)


def _map(axes: Any, weights: np.ndarray, findings: Findings, *, labels: bool) -> Any:
    """weights [queries, keys]; the axes count tokens of the text."""
    trace, (queries, keys) = findings.trace, weights.shape
    first_query, first_key = trace.first_query, trace.first_key
    extent = (
        None if labels else (first_key - 0.5, first_key + keys - 0.5, first_query + queries - 0.5, first_query - 0.5)
    )
    hidden = np.where(np.triu(np.ones((queries, keys), bool), keys - queries + 1), np.nan, weights)
    image = axes.imshow(hidden, norm=WEIGHT_NORM, cmap=_colours("viridis"), interpolation="nearest", extent=extent)
    if labels:
        _token_labels(axes.xaxis, findings.pieces[first_key : first_key + keys], rotation=90)
        _token_labels(axes.yaxis, findings.pieces[first_query : first_query + queries], rotation=0)
    else:
        axes.tick_params(labelsize=6)
    if first_key < first_query:  # the keys before this line are memory
        axes.axvline(first_query - first_key - 0.5 if labels else first_query - 0.5, color="#d62728", linewidth=1)
    return image


def _axis_names(findings: Findings, *, labels: bool) -> tuple[str, str]:
    """Of the keys and the queries of a map."""
    memory = " (left of the line: memory)" if findings.trace.first_key < findings.trace.first_query else ""
    unit = "" if labels else ", position in the text"
    return f"key{unit}{memory}", f"query{unit}"


def _title(figure: Figure, findings: Findings, what: str, *, lines: int = 1) -> None:
    """Above the whole picture."""
    words = _words(findings.title, what, figure.get_figwidth(), lines=lines)
    figure.suptitle(words, fontsize=10, parse_math=False)


def _words(title: str, what: str, inches: float, *, lines: int = 1) -> str:
    """What is shown, behind the run's title, of which the middle is left out where that is wider."""
    most = int(LETTERS_PER_INCH * inches)
    return shortened(title, most if lines > 1 else max(most - len(what), FEWEST_LETTERS)) + what


def _token_labels(axis: Any, pieces: Sequence[str], *, rotation: int) -> None:
    names = [
        name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "\u2026"
        for name in map(shown, pieces)
    ]
    axis.set_ticks(range(len(names)), names, fontsize=6, rotation=rotation, parse_math=False)


def _few_ticks(axis: Any, count: int) -> None:
    """Numbers from 0 to count - 1, 17 at most."""
    axis.set_ticks(range(0, count, -(-count // 16)))
    axis.set_tick_params(labelsize=6)


def _colours(name: str) -> Any:
    """A colour map in which what has no value is grey."""
    return matplotlib.colormaps[name].with_extremes(bad=NOT_CHOSEN)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # figure.savefig would draw it twice
    return buffer.getvalue()
