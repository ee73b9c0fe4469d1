from __future__ import annotations

import io
import sys
import time

import pytest
import tqdm.std

from common.progress_bar import phase_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(tqdm.std, "time", lambda: self.now)


def shown(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, seconds: float, batches: int, enabled: bool = True
) -> str:
    """What a phase writes whose batches take so many seconds each."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(sys, "stderr", stream)
    with phase_progress("validation after step 5", "batches", enabled=enabled) as progress:
        for done in range(batches):
            progress(done, batches)
            clock.now += seconds
    return stream.getvalue()


def test_a_log_gets_a_line_every_15_seconds_and_no_carriage_return(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(io.StringIO(), monkeypatch, seconds=6, batches=7)
    assert text == (
        "validation after step 5: 3 of 7 batches after 18 s\nvalidation after step 5: 6 of 7 batches after 36 s\n"
    )


def test_a_short_phase_and_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch, seconds=2, batches=8) == ""
    assert shown(io.StringIO(), monkeypatch, seconds=60, batches=8, enabled=False) == ""
    assert shown(Terminal(), monkeypatch, seconds=60, batches=8, enabled=False) == ""


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch, seconds=6, batches=7)
    assert "| 3/7 [" in text and "\n" not in text
    assert text.split("\r")[-2].strip() == "", "erased"
    assert shown(Terminal(), monkeypatch, seconds=0.01, batches=7).strip() == "", "too short for one"
