"""Which steps of a start are printed and shown, at which numbers; with a board that writes down what it is given."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pretrain.report.pictures
from model.costs import training_flops_per_token
from pretrain.config.schema import Config
from pretrain.engine.details import KINDS, Details
from pretrain.report import monitor
from pretrain.report.event_text import event_text
from pretrain.report.monitor import Monitor, Origin
from pretrain.report.run_folder import RunFolder
from pretrain.report.writer import Position
from tests.pretrain.runs import metrics, small_config

FIRST, LAST, EXTRA = 6, 11, 5_000_000
NAME = "blocks.0.feedforward.statistics"


class Notes:
    """A board."""

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[int, float]]] = {}
        """Tag -> step and value."""
        self.flops: dict[int, float] = {}
        """Step -> FLOPs so far."""
        self.texts: dict[str, str] = {}
        self.events: list[tuple[int, str]] = []
        self.images: list[tuple[int, str]] = []

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        self.flops[at.step] = at.flops
        for tag, value in values.items():
            self.points.setdefault(tag, []).append((at.step, value))

    def text(self, step: int, tag: str, text: str) -> None:
        self.texts[tag] = text

    def event(self, step: int, kind: str, text: str) -> None:
        self.events.append((step, kind))

    def histogram(self, step: int, tag: str, shares: Tensor) -> None: ...

    def image(self, step: int, tag: str, png: bytes) -> None:
        self.images.append((step, png.decode()))

    def settings(self, values: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    """Of the next monitor."""
    found = Notes()
    monkeypatch.setattr(monitor, "make_writers", lambda *_: [found])
    return found


def going_on(prepared: Path, tmp_path: Path, *keys: str) -> tuple[Config, Monitor]:
    """A start on two ranks that goes on after step FIRST, of which every fourth is printed and shown."""
    every = ("monitor.print_every_steps=4", "monitor.tensorboard_every_steps=4", "monitor.peak_flops=1e9")
    config = small_config(prepared, "monitor.collapse_after_steps=0", *every, *keys)
    origin = Origin(FIRST, FIRST * 128, LAST, torch.device("cpu"), 2, EXTRA)
    return config, Monitor(config, RunFolder(tmp_path, writes=True), origin)


def values(step: int, loss: float = 2.0) -> dict[str, Any]:
    """A line of metrics.jsonl, of a step of 128 tokens and a quarter of a second."""
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 0.5,
        "tokens": 128 * step,
        "tokens_per_second": 512.0,
        "step_seconds": 0.25,
        "memory_bytes": 3 << 29,
        "memory_peak_bytes": 2 << 30,
    }


def test_the_first_and_last_step_of_a_start_are_printed_and_the_last_is_shown(
    prepared: Path, tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(1000.0, 59.6)
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    config, of_start = going_on(prepared, tmp_path)
    for step in range(FIRST + 1, LAST + 1):
        of_start.step(values(step), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    # The clock is read as the start begins, and for each line: of one step, of two, of five.
    assert [(line.partition("  loss")[0], line.partition("elapsed ")[2]) for line in lines] == [
        ("step  7/11", "1:00  ETA 3:58"),
        ("step  8/11", "1:59  ETA 2:59"),
        ("step 11/11", "2:59  ETA 0:00"),
    ]
    assert all("  512 tok/s  " in line for line in lines)
    per_token = training_flops_per_token(config.model)
    assert notes.points["loss/train"] == [(8, 2.0), (11, 2.0)]
    assert notes.flops == {step: step * 128 * per_token + EXTRA for step in (8, 11)}
    of_peak = 512 * per_token / (2 * 1e9)  # of two ranks
    assert notes.points["speed/share of the peak FLOP per second"] == [(8, of_peak), (11, of_peak)]
    teraflops: Any = pytest.approx(512 * per_token / 10**12)
    assert notes.points["speed/model TFLOP per second"] == [(8, teraflops), (11, teraflops)]
    assert notes.points["memory of rank 0 in GiB/now"] == [(8, 1.5), (11, 1.5)]
    assert [row["flops_utilization"] for row in metrics(tmp_path)] == [of_peak] * 5
    assert notes.texts["run/peak of a device"] == "0.001 TFLOP/s, monitor.peak_flops"


def details(updates: dict[str, float] | None = None) -> Details:
    norms = {kind: {"experts": 2.0} for kind in KINDS}
    return Details({**norms, "update norm": {"experts": 1.0} if updates is None else updates}, {})


def test_a_picture_names_the_steps_that_it_counts(
    prepared: Path, tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those since the details before, or since this start; a skipped update has no details, and counts with the next.
    Experts are dead that none of these steps chose."""

    def draw(title: str, rows: Tensor, *, heads: int, active: int) -> bytes:
        return title.encode()

    monkeypatch.setattr(pretrain.report.pictures, "draw_load", draw)
    _, of_start = going_on(prepared, tmp_path, "monitor.details_every_steps=2")
    for step in range(FIRST + 1, LAST + 1):
        load = torch.zeros(5, dtype=torch.float64)
        load[step % 5] = 256.0
        norm = None if step == 10 else 1.0
        is_due = step % 2 == 0 or step == LAST
        of_start.step({**values(step), "grad_norm": norm}, {NAME: load}, details=details() if is_due else None)
    of_start.close()
    assert notes.images == [(8, "feed-forward, steps 7 to 8"), (11, "feed-forward, steps 9 to 11")]
    assert notes.points["routing/feed-forward/dead experts/block 0"] == [(8, 3.0), (11, 2.0)]
    assert notes.points["update norm over parameter norm/experts"] == [(8, 0.5), (11, 0.5)]


def test_no_more_pictures_are_tried_after_one_that_cannot_be_drawn(
    prepared: Path, tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def draw(title: str, rows: Tensor, *, heads: int, active: int) -> bytes:
        tried.append(title)
        raise RuntimeError("no font")

    monkeypatch.setattr(pretrain.report.pictures, "draw_load", draw)
    _, of_start = going_on(prepared, tmp_path)
    for step in (7, 8, 9):
        of_start.step(values(step), {NAME: torch.ones(5)}, details=details({}))
        of_start.flush()
    of_start.close()
    assert tried == ["feed-forward, step 7"] and not notes.images
    assert capsys.readouterr().err.count("cannot be drawn") == 1
    assert "update norm over parameter norm/experts" not in notes.points  # there was no update of theirs


def test_an_event_of_another_day_has_its_date() -> None:
    noon = time.mktime((2026, 7, 9, 12, 0, 5, 0, 0, -1))
    event = {"event": "finished", "step": 7, "time": noon}
    assert event_text(event, noon + 3600.0) == "12:00:05  finished at step 7"
    assert event_text(event, noon + 86400.0) == "2026-07-09 12:00  finished at step 7"
    assert event_text({**event, "time": "soon"}, noon) == "?  finished at step 7"


def test_points_stay_finite_and_events_stand_at_their_step(prepared: Path, tmp_path: Path, notes: Notes) -> None:
    _, of_start = going_on(prepared, tmp_path)
    of_start._folder.event("loss_spike", step=3, reason="wide")
    of_start._folder.event("lock_taken_over", owner="another")
    of_start.step(values(8, loss=1e4), {NAME: torch.zeros(5)}, details=details())
    of_start.close()
    ((step, perplexity),) = notes.points["perplexity/train"]
    assert step == 8 and perplexity == pytest.approx(math.exp(700.0))
    assert all(math.isfinite(value) for points in notes.points.values() for _, value in points)
    assert notes.events[-2:] == [(3, "loss spike"), (8, "lock taken over")]
