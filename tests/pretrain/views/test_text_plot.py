"""Curves as text."""

from __future__ import annotations

import math

from pretrain.views.text_plot import text_plot


def test_a_falling_line_in_plain_characters() -> None:
    lines = text_plot(range(1, 12), [12.0 - n for n in range(1, 12)], width=15, height=11, braille=False)
    assert [line.partition("|")[2] for line in lines[:-1]] == [" " * n + "*" for n in range(11)]
    assert lines[0].startswith(" 11|") and lines[-2].startswith("  1|")
    assert lines[-1] == "    1        11"


def test_a_column_shows_the_mean_and_steep_curves_are_connected() -> None:
    lines = text_plot(range(80), [0.0 if n % 2 else 10.0 for n in range(80)], width=12, height=5, braille=False)
    drawn = [line.partition("|")[2] for line in lines[:-1]]
    assert drawn[2] == "*" * 8 and not any(drawn[0] + drawn[1] + drawn[3] + drawn[4]), drawn
    steep = text_plot([0, 1], [0.0, 1.0], width=12, height=6, braille=False)
    assert all("*" in line for line in steep[:-1])


def test_braille_has_two_by_four_dots() -> None:
    (first, second, _) = text_plot(range(16), [float(n < 8) for n in range(16)], width=10, height=2)
    assert first == " 1│⠉⠉⠉⠉⢸⠀⠀⠀".rstrip() or first.startswith(" 1│⠉⠉⠉⠉")
    assert second.startswith(" 0│⠀⠀⠀⠀")


def test_values_that_are_not_finite_are_left_out() -> None:
    assert text_plot([1, 2], [math.nan, math.inf], width=20, height=3) == []
    assert text_plot([1, 2, 3], [2.0, math.nan, 2.0], width=20, height=3, braille=False)[0].startswith(" 2|*")


def test_a_step_that_goes_back_is_drawn_where_it_belongs() -> None:
    assert text_plot([1, 100, 3], [1.0, 2.0, 3.0], width=20, height=3) == text_plot(
        [1, 3, 100], [1.0, 3.0, 2.0], width=20, height=3
    )
