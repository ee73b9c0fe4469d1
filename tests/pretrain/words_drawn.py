"""Where matplotlib draws the words of a picture."""

from __future__ import annotations

from typing import Any

import pytest
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
