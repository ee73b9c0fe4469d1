"""What matplotlib draws in a picture, and where its words are."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def note_words(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Bbox]]:
    """From now on gets every visible text that is drawn, with its place in pixels."""
    words: list[tuple[str, Bbox]] = []
    draw = Text.draw

    def noted(text: Text, renderer: Any) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text():
            words.append((text.get_text(), text.get_window_extent(renderer)))

    monkeypatch.setattr(Text, "draw", noted)
    return words


def note_axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """From now on gets the axes of every picture that is written."""
    found: list[Axes] = []
    print_png = FigureCanvasAgg.print_png

    def noted(canvas: FigureCanvasAgg, *given: Any, **options: Any) -> None:
        found.extend(canvas.figure.axes)
        print_png(canvas, *given, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", noted)
    return found
