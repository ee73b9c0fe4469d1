"""Which steps of a start are printed and shown, at which numbers; with a board that writes down what it is given."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
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
from pretrain.report.estimate import RunEstimate, SideBySide
from pretrain.report.event_text import event_text
from pretrain.report.monitor import Monitor, Origin
from pretrain.report.run_folder import RunFolder
from pretrain.report.writer import Position
from tests.pretrain.runs import events, metrics, small_config

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
        self.event_texts: list[str] = []
        self.images: list[tuple[int, str]] = []
        self.calls: list[str] = []
        """Of `flush` and `close`."""

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        self.flops[at.step] = at.flops
        for tag, value in values.items():
            self.points.setdefault(tag, []).append((at.step, value))

    def text(self, step: int, tag: str, text: str) -> None:
        self.texts[tag] = text

    def event(self, step: int, kind: str, text: str) -> None:
        self.events.append((step, kind))
        self.event_texts.append(text)

    def histogram(self, step: int, tag: str, shares: Tensor) -> None: ...

    def image(self, step: int, tag: str, png: bytes) -> None:
        self.images.append((step, png.decode()))

    def settings(self, values: Mapping[str, Any]) -> None: ...

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


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
    prepared: Path, tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those since the details before, or since this start; a skipped update has no details, and counts with the next.
    Experts are dead that none of these steps chose. What is still being drawn is shown later, at the latest at the
    end."""
    is_awaited, threads, result = threading.Event(), set(threading.enumerate()), Future.result

    def awaited(future: Future[bytes], timeout: float | None = None) -> bytes:
        is_awaited.set()
        return result(future, timeout)

    def draw(title: str, rows: Tensor, *, heads: int, active: int) -> bytes:
        is_awaited.wait(10)
        return f"{title}, {active} of each".encode()

    monkeypatch.setattr(Future, "result", awaited)
    monkeypatch.setattr(pretrain.report.pictures, "draw_load", draw)
    keys = ("monitor.details_every_steps=2", "model.feedforward.active_experts=3")  # attention chooses 2
    _, of_start = going_on(prepared, tmp_path, *keys)
    for step in range(FIRST + 1, LAST + 1):
        load = torch.zeros(5, dtype=torch.float64)
        load[step % 5] = 256.0
        norm = None if step == 10 else 1.0
        is_due = step % 2 == 0 or step == LAST
        of_start.step({**values(step), "grad_norm": norm}, {NAME: load}, details=details() if is_due else None)
    of_start.close()
    assert set(threading.enumerate()) <= threads
    assert notes.images == [
        (8, "feed-forward, steps 7 to 8, 3 of each"),
        (11, "feed-forward, steps 9 to 11, 3 of each"),
    ]
    rows = [json.loads(line) for line in (tmp_path / "details.jsonl").read_text().splitlines()]
    assert [(row["step"], row["load_from_step"]) for row in rows] == [(8, 7), (11, 9)]
    assert "step 10/11  loss 2.0000, update skipped\n" in capsys.readouterr().out
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
    for step, key in ((5, "a"), (5, "b"), (6, "c")):
        of_start._folder.event("changed_setting", step=step, key=key, then=1, now=2)
    of_start.step(values(8, loss=1e4), {NAME: torch.zeros(5)}, details=details())
    told = [(3, "loss spike"), (8, "lock taken over"), (5, "changed setting"), (6, "changed setting")]
    assert notes.events[-4:] == told, "with the next point"
    texts = [re.findall("setting (.) changed from 1 to 2", text) for text in notes.event_texts[-2:]]
    assert texts == [["a", "b"], ["c"]], "those of one step together, for a board that keeps one text of a step"
    of_start.close()
    ((step, perplexity),) = notes.points["perplexity/train"]
    assert step == 8 and perplexity == pytest.approx(math.exp(700.0))
    assert all(math.isfinite(value) for points in notes.points.values() for _, value in points)
    assert notes.events[-4:] == told and notes.calls == ["flush", "close"]


def test_what_is_evaluated_is_printed_recorded_and_shown_by_its_split_and_task(
    prepared: Path, tmp_path: Path, notes: Notes, capsys: pytest.CaptureFixture[str]
) -> None:
    config, of_start = going_on(prepared, tmp_path)
    of_start.step(values(8), {})
    found = {"loss": 2.5, "perplexity": 12.25, "bits_per_byte": 1.5, "ema_loss": 2.0, "ema_perplexity": 7.5}
    of_start.validation(8, {**found, "loss/a": 3.0, "ema_loss/a": 2.75}, split="test")
    of_start.validation(8, {"loss": 2.25, "perplexity": 9.5}, split="validation")
    of_start.evaluation(8, "cbt", {"accuracy": 0.25, "loss": None}, examples=10, limit=5)
    of_start.flush()
    assert notes.calls == ["flush"]
    shown = {tag: value for tag, ((_, value), *_) in notes.points.items()}
    moving = " of the moving average"
    assert (shown["loss/test split"], shown[f"loss/test split{moving}"]) == (2.5, 2.0)
    assert (shown["perplexity/test split"], shown[f"perplexity/test split{moving}"]) == (12.25, 7.5)
    by_source = "test split loss by source/a"
    assert (shown[by_source], shown[by_source + moving], shown["loss/validation"]) == (3.0, 2.75, 2.25)
    assert shown["tasks/cbt accuracy"] == 0.25 and "tasks/cbt loss" not in shown
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "validation after step 8 on the test split: loss 2.5000  perplexity 12.25  bits per byte 1.5000  (a 3.0000); "
        "moving average: loss 2.0000  perplexity 7.50",
        "validation after step 8: loss 2.2500  perplexity 9.50",
        "cbt after step 8: accuracy 0.25  loss not finite (10 examples)",
    ]
    (task,) = events(tmp_path, "evaluation")
    assert (task["step"], task["task"], task["examples"], task["limit"]) == (8, "cbt", 10, 5)
    assert [(row["step"], row["split"]) for row in events(tmp_path, "validation")] == [(8, "test"), (8, "validation")]
    # What happens between two of a run's segments stands on the board of the second.
    folder = of_start._folder
    of_start.close()
    folder.event("rollback", step=8)
    again = Monitor(config, folder, Origin(FIRST, FIRST * 128, LAST, torch.device("cpu"), 2))
    again.step(values(8), {})
    assert notes.events[-1] == (8, "rollback")


def test_an_estimate_stands_beside_the_last_steps_alone_and_a_run_without_a_board_measures_no_cpu(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(monitor, "find_peak", lambda *_: pytest.fail("it takes time"))
    config, folder = small_config(prepared, "monitor.collapse_after_steps=0"), RunFolder(tmp_path, writes=True)
    estimate = RunEstimate(None, "cpu", "not estimated", (1.0, 2.0))
    origin = Origin(0, 0, 40, torch.device("cpu"), 1)
    of_start = Monitor(config, folder, origin, side_by_side=SideBySide(lambda: estimate))
    for step in range(1, 21):
        of_start.step({**values(step), "step_seconds": 9.0 if step <= 10 else 4.0}, {})
    of_start.measured(20, 1)
    (compared,) = events(tmp_path, "estimate_compared")
    assert (compared["step"], compared["measured"]["step_seconds"]) == (20, 4.0)
    assert "\nwarning: a step takes 100% above the estimate: " in capsys.readouterr().out
