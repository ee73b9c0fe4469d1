"""The picture that launch/compare.py draws: its curves, axes and room for words."""

from __future__ import annotations

import io
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from pretrain.views.comparison_page import _sources, drawn, thinned
from tests.pretrain.views.compared import of_mixture, row, runs_of, write
from tests.pretrain.words_drawn import note_words


def curves_by_source(*paths: Path) -> list[tuple[list[float], list[float]]]:
    axes = Figure().subplots()
    _sources(axes, runs_of(*paths))
    assert (axes.get_legend() is not None) == bool(axes.lines)
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in axes.lines]


def test_the_picture_has_the_losses_of_a_few_sources(tmp_path: Path) -> None:
    one = of_mixture(tmp_path / "one", {4: {"c4": 4.5, "$math$": 3.5}, 8: {"c4": 4.0, "$math$": None}})
    other = of_mixture(tmp_path / "other", {8: {"books": 2.0, "c4": 4.25}})
    of_one, of_other = curves_by_source(one), curves_by_source(one, other)
    assert of_one[0] == ([4, 8], [4.5, 4.0])
    assert of_one[1][0] == [4, 8] and of_one[1][1][0] == 3.5 and math.isnan(of_one[1][1][1])
    assert of_other[:1] + of_other[2:] == [([4, 8], [4.5, 4.0]), ([8], [4.25]), ([8], [2.0])]
    assert len(drawn(runs_of(one, other))) > 10_000


def test_the_losses_of_each_split_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, list[str], list[str]]] = []

    def noted(canvas: FigureCanvasAgg, *_: Any) -> None:  # and draws nothing
        axes = canvas.figure.axes[0]
        legend = axes.get_legend()
        names = [] if legend is None else [legend.get_title().get_text(), *(t.get_text() for t in legend.get_texts())]
        found.append((axes.get_title(), [str(line.get_marker()) for line in axes.lines], names))

    monkeypatch.setattr(FigureCanvasAgg, "print_png", noted)
    test = of_mixture(tmp_path / "test", {4: {"c4": 4.5}}, split="test")
    other = of_mixture(tmp_path / "other", {4: {"c4": 4.25}})
    drawn(runs_of(test))
    drawn(runs_of(test, other))
    alone = ("training loss, test loss (crosses) against steps", ["None", "X", "^"], ["test, by source", "c4"])
    words = ["held out, by source", "c4 (test)", "c4 (validation)"]
    both = (
        "training loss, validation loss (dots) and test loss (crosses)",
        ["None", "None", "X", "o", "^", "s"],
        words,
    )
    assert found == [alone, both]


@pytest.mark.parametrize(
    "loss, norm, logarithmic",
    [
        (8.0, 2.0, set()),
        (math.nan, math.inf, set()),
        (9e3, 2.0, {"training loss"}),
        (8.0, 0.05, {"gradient norm before clipping"}),
        (8.0, 0.0, set()),  # which has no logarithm
    ],
)
def test_losses_and_norms_more_than_a_decade_apart_have_a_logarithmic_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float, norm: float, logarithmic: set[str]
) -> None:
    """One run that blew up leaves the others apart; the first step of it is like theirs."""
    found: dict[str, str] = {}

    def noted(canvas: FigureCanvasAgg, *_: Any) -> None:  # and draws nothing
        found.update({axes.get_title(): axes.get_yscale() for axes in canvas.figure.axes})

    monkeypatch.setattr(FigureCanvasAgg, "print_png", noted)
    calm = write(tmp_path / "calm", [row(n, 3.0) for n in (1, 2, 3)])
    wild = write(tmp_path / "wild", [row(1, 3.0), row(2, loss, grad_norm=norm), row(3, loss)])
    drawn(runs_of(calm, wild))
    assert len(found) == 6
    assert {title.partition(" against")[0] for title, scale in found.items() if scale == "log"} == logarithmic


def test_every_run_of_many_has_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib has ten colours and begins anew."""
    figures = []
    print_png = FigureCanvasAgg.print_png

    def noted(canvas: FigureCanvasAgg, *args: Any, **kwargs: Any) -> None:
        figures.append(canvas.figure)
        print_png(canvas, *args, **kwargs)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", noted)
    paths = [write(tmp_path / f"run-{number}", [row(1, 2.0), row(2, 1.0)]) for number in range(13)]
    assert len(drawn(runs_of(*paths))) > 10_000
    (figure,) = figures
    (legend,) = figure.legends
    lines = (legend.get_lines(), figure.axes[0].lines, figure.axes[4].lines)
    shown = [
        [(to_hex(line.get_color()), line.get_linestyle(), line.get_linewidth(), line.get_alpha()) for line in of_one]
        for of_one in lines
    ]
    assert shown[0] == shown[1] == shown[2] and len(set(shown[0])) == len(paths)


def test_the_first_of_runs_of_a_sweep_is_told_by_the_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that lose their middle, where they differ, were `switchall_ti...mory_chunks=0` for two of them."""
    names = [f"switchall_tiny,learning_rate={rate},memory_chunks={n}" for rate in ("4e-3", "1e-3") for n in (0, 1)]
    words = note_words(monkeypatch)
    drawn(runs_of(*(write(tmp_path / name, [row(1, 2.0), row(2, 1.0)]) for name in names)))
    (title,) = (word for word, _ in words if word.startswith("loss less that of"))
    shown = title.rpartition("...")[2]
    assert [name for name in names if name.endswith(shown)] == names[:1]


@pytest.mark.parametrize(
    "runs, letters",
    [
        (1, 34),
        (10, 120),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(3, 34), (9, 34), (4, 47), (2, 198)]),
    ],
)
def test_words_and_numbers_have_room_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int, letters: int
) -> None:
    """Nothing touches its edge, and no word another: long numbers, rows of the legend, names as those of a sweep."""
    words = note_words(monkeypatch)
    paths = []
    for number in range(runs):
        rows = [
            row(
                n,
                2.25 - 1e-5 * number * n,
                10**9 * n,
                lr=2.5e-5 * n,
                grad_norm=12345.0 + n,
                tokens_per_second=1.25e8 + n,
            )
            for n in range(1, 100_001, 10_000)
        ]
        paths.append(write(tmp_path / (f"{number}" + ",learning_rate=1e-3" * 11)[:letters], rows))
    picture = np.asarray(Image.open(io.BytesIO(drawn(runs_of(*paths)))).convert("L"))
    for edge in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
        assert edge.min() == 255
    for (one, box), (other, its) in combinations(words, 2):
        assert Bbox.intersection(box.padded(-1), its.padded(-1)) is None, f"{one!r} lies over {other!r}"


def test_the_picture_has_no_losses_by_source_of_one_data_set_or_of_too_many_curves(tmp_path: Path) -> None:
    alone = of_mixture(tmp_path / "alone", {4: {}})
    four = of_mixture(tmp_path / "four", {4: dict.fromkeys("abcd", 4.0)})
    assert curves_by_source(alone) == [] and len(curves_by_source(four)) == 4
    assert curves_by_source(four, alone) == []


def test_thinned_curves_keep_their_mean() -> None:
    x, y = thinned(np.arange(1000.0), np.arange(1000.0) * 2, 10)
    assert x.tolist() == [49.5 + 100 * n for n in range(10)] and np.array_equal(y, 2 * x)
    x, y = thinned(np.arange(5.0), np.arange(5.0) * 2, 2)  # of two points and of three
    assert x.tolist() == [0.5, 3.0] and y.tolist() == [1.0, 6.0]
    x, y = thinned(np.array([1.0, 2.0, 3.0]), np.array([1.0, math.nan, 3.0]), 10)
    assert x.tolist() == y.tolist() == [1.0, 3.0]
