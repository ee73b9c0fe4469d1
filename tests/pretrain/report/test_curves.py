"""What a board shows, read with TensorBoard's own reader: names, axes, pictures, texts, and each step once."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.plugins.custom_scalar import layout_pb2

import pretrain.report.pictures
from model.costs import training_flops_per_token
from pretrain.config.schema import Config
from pretrain.engine.details import KINDS, Details
from pretrain.late_reading import Laps, Stopwatch
from pretrain.report import peak, tags
from pretrain.report.board import Board
from pretrain.report.curves import Curves
from pretrain.report.monitor import Monitor, Origin
from pretrain.report.pictures import draw_load
from pretrain.report.run_folder import RunFolder
from pretrain.report.tensorboard import TensorBoard
from pretrain.report.writer import Position
from tests.harness import RankFailed, run_ranks
from tests.pretrain.report.boards import read, steps_of
from tests.pretrain.resilience.faults import train_with
from tests.pretrain.resilience.test_spikes import SPIKY, spike_on_position
from tests.pretrain.runs import light_config, metrics, small_config, train_runs

KEYS = (
    "monitor.tensorboard=true",
    "monitor.details_every_steps=2",
    "evaluate.sequences=8",
    "evaluate.every_steps=2",
    "checkpoint.every_steps=2",
)


def test_a_run_that_is_stopped_and_goes_back_shows_each_step_once(prepared: Path, tmp_path: Path) -> None:
    """Stopped at step 3 of 6, and started from the checkpoint of step 2 in another layout; curves, pictures and
    histograms go on without a gap, and what happened stays."""
    run_dir, keys = tmp_path / "run", (*KEYS, "train.steps=6")
    first = light_config(prepared, *keys, "train.stop_after_steps=3")
    run_ranks(train_runs, 1, [(first, run_dir)])
    for path in (run_dir / "checkpoints").glob("step-00000003"):
        path.rename(tmp_path / "lost")  # what a kill before the save would leave: the board is ahead of the checkpoint
    run_ranks(train_runs, 2, [(light_config(prepared, *keys, "parallel.zero=3", ranks=2), run_dir)])

    board = read(run_dir / "tensorboard")
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == steps_of(board, "loss/train") == [1, 2, 3, 4, 5, 6]
    values = [point.value for point in board.Scalars("loss/train")]
    assert values == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert steps_of(board, "loss/validation") == [2, 4, 6]
    for tag in ("gradient norm by group/experts", "routing/attention value/load max/block 0"):
        assert steps_of(board, tag) == [1, 2, 4, 6]
    assert [image.step for image in board.Images("load of the experts/feed-forward")] == [1, 2, 4, 6]
    assert [h.step for h in board.Histograms("selection scores/attention output/block 00")] == [1, 2, 4, 6]

    tokens = read(run_dir / "tensorboard" / "against tokens")
    assert steps_of(tokens, "loss against tokens/train") == [row["tokens"] for row in rows]
    assert steps_of(tokens, "loss against tokens/validation") == [rows[n]["tokens"] for n in (1, 3, 5)]
    per_token = training_flops_per_token(first.model)
    flops = read(run_dir / "tensorboard" / "against MFLOP")
    assert steps_of(flops, "loss against MFLOP/train") == [int(row["tokens"] * per_token / 1e6) for row in rows]

    events = read(run_dir / "tensorboard" / "events")
    texts = [t.tensor_proto.string_val[0].decode() for t in events.Tensors("events/changed setting/text_summary")]
    (changed,) = texts  # all at once, for a board that keeps one text of a step
    assert "setting parallel.zero changed from 1 to 3" in changed and "data-parallel size changed" in changed
    assert len(events.Tensors("events/started/text_summary")) == 2


@pytest.mark.slow  # the test above; launch/test_launcher.py does it with SIGKILL
def test_a_run_that_rolls_back_shows_each_step_once(prepared: Path, tmp_path: Path) -> None:
    """Steps 7 and 8 are computed twice, with other data: the curves have the second, and the event stays."""
    config = small_config(prepared, *SPIKY, "monitor.tensorboard=true", "monitor.details_every_steps=4")
    assert run_ranks(train_with, 2, config, tmp_path, spike_on_position, 60) == ["FINISHED"] * 2
    board = read(tmp_path / "tensorboard")
    assert steps_of(board, "loss/train") == list(range(1, 17))
    losses = [point.value for point in board.Scalars("loss/train")]
    assert losses == pytest.approx([row["loss"] for row in metrics(tmp_path)], rel=1e-6) and max(losses) < 20
    assert steps_of(board, "gradient norm by group/experts") == [1, 4, 8, 12, 16]
    tokens = read(tmp_path / "tensorboard" / "against tokens")
    assert len(steps_of(tokens, "loss against tokens/train")) == 16
    kinds = read(tmp_path / "tensorboard" / "events").Tags()["tensors"]
    assert {"events/loss spike/text_summary", "events/rollback/text_summary"} <= set(kinds)


@pytest.mark.parametrize("moved", [-3600, 0, 3600])
def test_a_start_continues_the_curves_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """It begins behind step 6 of 8: on a machine whose clock is an hour behind or ahead, or in the same second."""
    for now, first, value in ((1_800_000_000, 0, 1.0), (1_800_000_000 + moved, 6, 2.0)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        board = Board(tmp_path, first_step=first)
        for step in range(first + 1, first + 9):
            board.scalars(step, {"loss/train": value})
        board.flush()
    points = [(point.step, point.value) for point in read(tmp_path).Scalars("loss/train")]
    assert points == [(step, 1.0) for step in range(1, 7)] + [(step, 2.0) for step in range(7, 15)]


def test_losses_on_the_test_split_are_shown_as_those_on_the_other(prepared: Path, tmp_path: Path) -> None:
    """Against tokens and FLOPs, among the hyperparameters, and on the page that one looks at first."""
    config = light_config(prepared).replaced("evaluate", split="test", ema=True)
    board, at = TensorBoard(tmp_path, Position(0, 0, 0.0)), Position(3, 300, 3e9)
    curves = Curves([board], config, at, {})
    curves.validation(at, {"loss": 2.5, "perplexity": 12.0, "ema_loss": 2.25}, "test")
    curves.close()
    assert [p.value for p in read(tmp_path / "against tokens").Scalars("loss against tokens/test split")] == [2.5]
    assert steps_of(read(tmp_path / "against MFLOP"), "loss against MFLOP/test split") == [3000]
    chart: list[Any] = tags.layout(has_tasks=False, has_sources=False)["how well it learns"]["loss"]
    _, (pattern,) = chart
    shown = {tag for tag in read(tmp_path).Tags()["scalars"] if re.search(pattern, tag)}
    assert shown == {"loss/test split", "loss/test split of the moving average"}
    assert b"loss/test split" in read(tmp_path).SummaryMetadata("_hparams_/experiment").plugin_data.content


def texts_shown(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Steps and texts of every tag, without those that the reader drops."""
    shown: dict[str, list[tuple[int, str]]] = {}
    board = read(folder)
    for tag in board.Tags()["tensors"]:
        for text in board.Tensors(tag):
            kept = [(step, words) for step, words in shown.get(tag, []) if step < text.step]
            shown[tag] = [*kept, (text.step, text.tensor_proto.string_val[0].decode())]
    return shown


def test_the_reader_that_tensorboard_uses_by_default_hides_no_event(tmp_path: Path) -> None:
    """It drops a text behind one of its tag whose step is not above: here of a start that begins 40 steps earlier."""
    first = TensorBoard(tmp_path, Position(0, 0, 0.0))
    for step, text in ((20, "early"), (60, "one setting"), (60, "another"), (62, "spike")):
        first.event(step, "kind", text)
    first.event(62, "other kind", "alone")
    first.close()
    assert texts_shown(tmp_path / "events")["events/kind/text_summary"] == [
        (20, "early"),
        (60, "one setting\n\nanother"),
        (62, "spike"),
    ]
    (written,) = (tmp_path / "events").iterdir()
    written.write_bytes(written.read_bytes() + b"\x20torn by a kill")
    second = TensorBoard(tmp_path, Position(40, 0, 0.0))
    second.event(42, "kind", "later")
    second.event(63, "kind", "last")
    second.close()
    assert texts_shown(tmp_path / "events") == {
        "events/kind/text_summary": [
            (20, "early"),
            (42, "one setting\n\nanother\n\nspike\n\nlater"),
            (63, "last"),
        ],
        "events/other kind/text_summary": [(62, "alone")],
    }


def test_the_texts_of_starts_that_come_to_nothing_grow_no_more_than_their_number(tmp_path: Path) -> None:
    """Each start says what the ones before it said at this step, of which the reader shows the last text alone."""
    sizes = []
    for number in range(120):
        before = set(tmp_path.glob("events/*"))
        board = TensorBoard(tmp_path, Position(7, 0, 0.0))
        board.event(7, "started", f"start {number:03d}")
        board.close()
        (written,) = set(tmp_path.glob("events/*")) - before
        sizes.append(written.stat().st_size)
    assert sizes[0] < sizes[40] and len(set(sizes[55:])) == 1, "else a year of starts fills the disk"
    ((step, text),) = texts_shown(tmp_path / "events")["events/started/text_summary"]
    newest = [f"start {number:03d}" for number in range(70, 120)]
    assert (step, text.split("\n\n")) == (7, ["Earlier ones: events.jsonl.", *newest])


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run of three steps with a board."""
    config, run_dir = small_config(prepared, *KEYS, "train.steps=3"), tmp_path_factory.mktemp("finished")
    run_ranks(train_runs, 1, [(config, run_dir)])
    return config, run_dir


def test_a_board_tells_what_run_it_is_of_and_opens_on_what_matters(finished: tuple[Config, Path]) -> None:
    _, run_dir = finished
    board = read(run_dir / "tensorboard")

    def text(tag: str) -> str:
        (event,) = board.Tensors(f"{tag}/text_summary")
        return str(event.tensor_proto.string_val[0].decode())

    tree = json.loads(text("run/configuration").removeprefix("```json\n").removesuffix("\n```"))
    assert tree == json.loads((run_dir / "config.json").read_text())
    assert f"| torch | {torch.__version__} |" in text("run/software") and "| git | " in text("run/software")
    assert "| data | 1 |" in text("run/layout") and "stage 0 | embedding, blocks 0-1" in text("run/layout")
    assert "measured: the best" in text("run/peak of a device")

    (event,) = board.Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    scalars = board.Tags()["scalars"]
    charts = [chart for category in page.category for chart in category.chart]
    assert len(charts) == 11
    for chart in charts:
        assert any(re.search(pattern, tag) for pattern in chart.multiline.tag for tag in scalars), chart.title
    more = {"accuracy of tasks", "validation loss by source"}
    assert more.isdisjoint(chart.title for chart in charts)
    assert more <= tags.layout(has_tasks=True, has_sources=True)["how well it learns"].keys()
    assert "_hparams_/session_start_info" in board.summary_metadata


def test_a_run_that_has_nothing_to_do_writes_nothing(finished: tuple[Config, Path], tmp_path: Path) -> None:
    config, run_dir = finished
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    before = sorted((p, p.stat().st_size) for p in (tmp_path / "tensorboard").rglob("*"))
    run_ranks(train_runs, 1, [(config, tmp_path)])
    assert sorted((p, p.stat().st_size) for p in (tmp_path / "tensorboard").rglob("*")) == before


def test_every_key_of_a_line_has_words(finished: tuple[Config, Path]) -> None:
    _, run_dir = finished
    scalars = set(read(run_dir / "tensorboard").Tags()["scalars"])
    assert not [tag for tag in scalars if tag.startswith("other/") or "_" in tag]
    assert {tags.tag_of(key)[0] for key in metrics(run_dir)[0] if key != "step"} <= scalars
    phases = {tag.partition("/")[2] for tag in scalars if tag.startswith("time of a step in seconds/")}
    assert phases >= {"forward", "backward", "update", "reading batches", "validation", "checkpoint", "whole step"}


def test_every_documented_key_has_words() -> None:
    """Those too that only some runs have: of docs/metrics.md's table of metrics.jsonl."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text()
    table = page.partition("## What a run writes")[2].partition("MoA's routers are")[0]
    keys = [
        key
        for line in table.splitlines()
        if line.startswith("| `")
        for key in re.findall("`([a-zA-Z_/]+)`", line.split("|")[1])
    ]
    assert {"loss", "epoch/NAME", "loss_scale", "memory_reserved_bytes", "routing_flips"} <= set(keys)
    assert not [key for key in keys if key != "step" and tags.tag_of(key)[0].startswith("other/")]


def test_every_group_of_the_board_is_in_the_table_of_the_page(finished: tuple[Config, Path]) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "monitoring.md").read_text()
    groups = {words for line in page.splitlines() if line.startswith("| `") for words in re.findall("`([^`]+)`", line)}
    board = read(finished[1] / "tensorboard").Tags()
    shown = {*board["scalars"], *board["images"], *board["histograms"], *(tag for tag, _ in tags.TAGS.values())}
    known = [tag for tag in shown if {tag.split("/")[0], "/".join(tag.split("/")[:2])} & groups]
    assert sorted(shown - set(known)) == []


def fail_to_draw(rank: int, runs: list[tuple[Config, Path]], output: Path) -> None:
    """As where matplotlib finds no font, or no room for its cache."""

    def broken(*args: object, **kwargs: object) -> bytes:
        raise RuntimeError("no font")

    pretrain.report.pictures.draw_load = broken
    with open(output, "w") as file, contextlib.redirect_stderr(file):
        train_runs(rank, runs)


def test_a_run_goes_on_without_pictures(prepared: Path, tmp_path: Path) -> None:
    config = light_config(prepared, *KEYS, "train.steps=5")
    run_ranks(fail_to_draw, 1, [(config, tmp_path / "run")], tmp_path / "err")
    board = read(tmp_path / "run" / "tensorboard")
    assert steps_of(board, "loss/train") == [1, 2, 3, 4, 5] and not board.Tags()["images"]
    assert (tmp_path / "err").read_text().count("cannot be drawn (RuntimeError('no font'))") == 1


def test_a_step_without_an_update_has_no_details(tmp_path: Path, prepared: Path) -> None:
    """Adam's state is then that of an earlier step, or none."""
    details = Details({kind: {"experts": 1.0} for kind in KINDS}, {})
    folder = RunFolder(tmp_path, writes=True)
    monitor = Monitor(small_config(prepared, *KEYS), folder, Origin(0, 0, 9, torch.device("cpu"), 1))
    load = {"blocks.0.attention.value_statistics": torch.ones(2, 3), "blocks.0.feedforward.statistics": torch.ones(5)}
    speed = {"tokens_per_second": 1.0, "step_seconds": 1.0, "memory_bytes": 1, "memory_peak_bytes": 1, "lr": 0.1}
    for step, norm in ((1, None), (2, 1.0)):
        values = {"step": step, "loss": 1.0, "grad_norm": norm, "tokens": 128 * step, **speed}
        monitor.step(values, load, details=details)
    monitor.close()
    assert steps_of(read(tmp_path / "tensorboard"), "update norm by group/experts") == [2]


def test_a_run_that_fails_shows_its_last_steps(prepared: Path, tmp_path: Path) -> None:
    wild = ("optimizer.learning_rate=1e30", "optimizer.clip_norm=0", "resilience.max_skipped_updates=2")
    config = light_config(prepared, *KEYS, "train.steps=30", "schedule.warmup_steps=0", *wild)
    with pytest.raises(RankFailed, match="Diverged"):
        run_ranks(train_runs, 1, [(config, tmp_path)])
    shown = steps_of(read(tmp_path / "tensorboard"), "optimizer/learning rate")
    assert shown == [row["step"] for row in metrics(tmp_path)] and len(shown) >= 3


def test_router_points_count_by_hand() -> None:
    load = {
        "blocks.7.attention.value_statistics": torch.tensor([[6.0, 0.0, 0.0], [2.0, 2.0, 2.0]]),
        "blocks.11.feedforward.statistics": torch.tensor([1.0, 1.0, 2.0, 0.0]),
    }
    points = tags.router_points(load)
    assert points["routing/attention value/load max/block 07"] == 3.0
    assert points["routing/attention value/entropy, 1 is even/block 07"] == pytest.approx(0.5)
    assert points["routing/attention value/dead experts/block 07"] == 2.0
    assert points["routing/feed-forward/load max/block 11"] == 2.0
    assert points["routing/feed-forward/entropy, 1 is even/block 11"] == pytest.approx(0.75)
    assert points["routing/feed-forward/dead experts/block 11"] == 1.0
    empty = {name: torch.zeros_like(counts) for name, counts in load.items()}
    assert all(math.isfinite(value) for value in tags.router_points(empty).values())
    assert all(rows.isfinite().all() for rows in tags.load_by_block(empty).values())


def test_a_picture_shows_each_block_and_expert() -> None:
    load = {f"blocks.{n}.attention.value_statistics": torch.tensor([[9.0, 3.0], [n, 12.0 - n]]) for n in (10, 2)}
    (rows,) = tags.load_by_block(load).values()
    assert rows.tolist() == [[1.5, 0.5], [2 / 6, 10 / 6], [1.5, 0.5], [10 / 6, 2 / 6]]
    png = draw_load("attention value: load", rows, heads=2, active=1)
    picture = matplotlib.image.imread(io.BytesIO(png))
    assert picture.shape[:2] == struct.unpack(">II", png[16:24])[::-1]
    colours = {tuple(pixel) for pixel in (picture[..., :3] * 255).astype(int).reshape(-1, 3)}
    assert len(colours) > 100, "four cells, a colour bar and smoothed letters"
    assert not np.array_equal(picture, matplotlib.image.imread(io.BytesIO(draw_load("x", rows * 0, heads=2, active=1))))


def test_laps_add_up_to_the_time_between_two_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0, 4.0, 7.0, 11.0, 16.0, 22.0])
    monkeypatch.setattr("pretrain.late_reading.time.perf_counter", lambda: next(times))
    laps = Laps(torch.device("cpu"))
    for name in ("forward", "backward", "forward"):
        laps.begin(name)
    first = laps.cut("reading")
    laps.begin("forward")
    second = laps.cut("reading")
    assert first.seconds() == {"forward": 1.0 + 3.0, "backward": 2.0}
    assert second.seconds() == {"reading": 4.0, "forward": 5.0}
    assert Laps(torch.device("cpu")).seconds() == {}


def test_a_stopwatch_counts_from_its_making_to_its_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 7.5])
    monkeypatch.setattr("pretrain.late_reading.time.perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    watch.stop()
    assert watch.seconds() == 4.5


def test_the_peak_of_a_cpu_is_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.05, 0.06, 0.11, 0.16])
    monkeypatch.setattr("pretrain.report.peak.time.perf_counter", lambda: next(times))
    assert peak.measured().flops == pytest.approx(2 * 384**3 / 0.01)
    assert peak.find_peak(torch.device("cpu"), "fp32", 5e12) == peak.Peak(5e12, "monitor.peak_flops")
