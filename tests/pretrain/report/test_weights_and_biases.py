"""Weights & Biases through a stand-in of its package; where the real one is installed, its offline files (slow)."""

from __future__ import annotations

import errno
import importlib.machinery
import importlib.util
import inspect
import json
import os
import re
import struct
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from pretrain.config.watching import MonitorConfig
from pretrain.preflight.run import preflight
from pretrain.report import weights_and_biases
from pretrain.report.monitor import Monitor, Origin, make_writers
from pretrain.report.run_folder import RunFolder
from pretrain.report.weights_and_biases import WeightsAndBiases, check_installed
from pretrain.report.writer import Position, Writer
from tests.harness import run_ranks
from tests.pretrain.runs import metrics, small_config, train_runs

PAGE = Path(__file__).resolve().parents[3] / "docs" / "monitoring.md"
PNG = bytes.fromhex(  # one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b5500"
    "00000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)
OFFLINE = MonitorConfig(wandb="offline", wandb_project="tests")


def text_of(shown: Any) -> str:
    """Of a stand-in's Html."""
    return str(shown[0][0]).removeprefix("<pre>").removesuffix("</pre>")


def open_files() -> list[Path]:
    """Of this process."""
    return [Path(os.path.realpath(link)) for link in Path("/proc/self/fd").iterdir()]


class Run:
    """What `wandb.init` gives: takes no step that it has, as the real one, nor anything for those of earlier starts."""

    def __init__(self, rows: dict[int, dict[str, Any]], folder: str) -> None:
        self.rows, self.dir, self.url, self.finished = rows, f"{folder}/wandb/offline-run/files", "https://here", False
        self.config = types.SimpleNamespace(values={}, update=self._update)
        self.before = self.newest = max(rows, default=0)

    def _update(self, values: dict[str, Any], *, allow_val_change: bool) -> None:
        assert allow_val_change, "W&B refuses a setting that has changed"
        self.config.values.update(values)

    def log(self, values: dict[str, Any], *, step: int) -> None:
        assert step >= self.newest and step > self.before, "W&B would drop this"
        self.newest = step
        row = self.rows.setdefault(step, {})
        for key in row.keys() & values.keys():
            assert key.startswith("events/") and text_of(row[key]) in text_of(values[key]), f"{key} is lost"
        row.update(values)

    def finish(self) -> None:
        self.finished = True


class Settings:
    model_fields = ("finish_timeout",)

    def __init__(self, **given: Any) -> None:
        self.given = given


class StandIn(types.ModuleType):
    """The package."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.runs: list[Run] = []
        self.given: list[dict[str, Any]] = []
        self.Html = self.Histogram = self.Image = lambda *args, **kwargs: (args, kwargs)
        self.Settings = Settings

    def init(self, **given: Any) -> Run:
        self.given.append(given)
        self.runs.append(Run(self.rows.setdefault(given["id"], {}), given["dir"]))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def at(step: int) -> Position:
    return Position(step, 100 * step, 1e6 * step)


def test_each_step_is_sent_once_after_a_kill_and_a_rollback(wandb: StandIn, tmp_path: Path) -> None:
    """Killed after step 5 and started from the checkpoint of step 3; then back to step 6, and to the end."""
    for start, end in ((0, 5), (3, 8), (6, 9)):
        writer = WeightsAndBiases(tmp_path, OFFLINE, {"software": {"torch": "2"}})
        writer.settings({"model.d_model": 24, "optimizer.learning_rate": 0.1 / end})
        writer.event(start, "started", f"after step {start}")
        for step in range(start + 1, end + 1):
            writer.scalars(at(step), {"loss/train": 10.0 * start + step})
            if step % 2 == 0:
                writer.scalars(at(step), {"loss/validation": float(step)})
        writer.image(end - 1, "load", PNG)  # drawn while step `end` was computed
        if end != 5:
            writer.close()
        else:  # Killed once all of it is sent: a flush alone waits 2 s at most, a busy machine may need more.
            sent = threading.Event()

            def told(run: Any, sent: threading.Event = sent) -> None:
                sent.set()

            writer._put(told)
            assert sent.wait(60)
    (rows,) = wandb.rows.values()
    assert sorted(rows) == list(range(1, 10))
    losses = [rows[step]["loss/train"] for step in sorted(rows)]
    assert losses == [1, 2, 3, 4, 5, 36, 37, 38, 69]
    assert [step for step in rows if "loss/validation" in rows[step]] == [2, 4, 6, 8]
    assert [step for step in rows if "events/started" in rows[step]] == [1, 6, 9]
    assert [step for step in rows if "load" in rows[step]] == [5, 8]  # that of step 8 was drawn once
    assert rows[9]["progress/training FLOPs"] == 9e6
    assert len({given["id"] for given in wandb.given}) == 1 and {given["resume"] for given in wandb.given} == {"allow"}
    assert wandb.runs[1].config.values["software"] == {"torch": "2"} and wandb.runs[1].finished


def test_a_writer_that_is_closed_keeps_no_file(
    wandb: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes back opens another one each time."""
    writer = WeightsAndBiases(tmp_path, OFFLINE, {})
    writer.scalars(Position(1, 8, 1.0), {"loss/train": 3.0})
    writer.flush()
    mark = (tmp_path / "wandb" / "newest-step").resolve()
    assert mark in open_files()
    writer.close()
    assert mark not in open_files() and int(mark.read_text()) == 1 and not capsys.readouterr().err


def test_a_full_disk_costs_the_mark_and_no_point(
    wandb: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = WeightsAndBiases(tmp_path, OFFLINE, {})
    monkeypatch.setattr(os, "pwrite", full)
    for step in (1, 2):
        writer.scalars(at(step), {"loss/train": 1.0})
    writer.close()
    assert [sorted(rows) for rows in wandb.rows.values()] == [[1, 2]] and not capsys.readouterr().err


def test_a_branch_has_a_run_of_its_own(wandb: StandIn, tmp_path: Path) -> None:
    """In the folder of a run that came further: its first points are of steps that W&B has of that run."""
    settings = MonitorConfig(tensorboard=False, wandb="offline")
    for start, end, hides_all in ((0, 5, False), (2, 4, True), (4, 6, False)):
        (writer,) = make_writers(settings, tmp_path, at(start), hides_all)
        for step in range(start + 1, end + 1):
            writer.scalars(at(step), {"loss/train": float(step)})
        writer.close()
    assert [sorted(rows) for rows in wandb.rows.values()] == [[1, 2, 3, 4, 5], [3, 4, 5, 6]]


def test_a_branch_that_ends_before_its_first_step_leaves_no_empty_run(wandb: StandIn, tmp_path: Path) -> None:
    """Its next start has none to go on with, and begins another: with all that was said before its first point."""
    for start, end in ((2, 2), (2, 4)):
        writer = WeightsAndBiases(tmp_path, OFFLINE, {"software": {"torch": "2"}}, anew=True)
        writer.settings({"model.d_model": 24})
        writer.event(start, "started", f"start to {end}")
        for step in range(start + 1, end + 1):
            writer.scalars(at(step), {"loss/train": float(step)})
        writer.close()
    ((run,), (rows,)) = wandb.runs, wandb.rows.values()
    assert text_of(rows[2]["events/started"]) == "start to 4" and sorted(rows) == [2, 3, 4]
    assert run.config.values["model.d_model"] == 24 and run.finished


def test_two_events_of_one_step_are_both_there(wandb: StandIn, tmp_path: Path) -> None:
    """Settings that changed; and spikes after a rollback, which are earlier than the steps that W&B has."""
    writer = WeightsAndBiases(tmp_path, OFFLINE, {})
    writer.event(3, "changed setting", "one")
    writer.event(3, "changed setting", "another")
    writer.scalars(at(5), {"loss/train": 1.0})
    for step in (5, 3):
        writer.event(step, "loss spike", f"after step {step}")
    writer.scalars(at(6), {"loss/train": 1.0})
    writer.event(6, "loss spike", "after step 6")
    writer.close()
    (rows,) = wandb.rows.values()
    assert text_of(rows[3]["events/changed setting"]) == "one\nanother"
    assert text_of(rows[5]["events/loss spike"]) == "after step 5\nafter step 3"
    assert text_of(rows[6]["events/loss spike"]) == "after step 6"


def test_starts_that_end_before_the_first_new_step_lose_no_event_of_later_ones(wandb: StandIn, tmp_path: Path) -> None:
    """Two rollbacks from step 5, and a third start that comes further."""
    for start, end in ((0, 5), (2, 4), (2, 4), (2, 9)):
        writer = WeightsAndBiases(tmp_path, OFFLINE, {})
        writer.event(start, "started", f"start to {end}")
        for step in range(start + 1, end + 1):
            writer.scalars(at(step), {"loss/train": float(step)})
        writer.event(end, "rollback", f"after step {end}")
        writer.close()
    (rows,) = wandb.rows.values()
    assert [step for step in sorted(rows) if "events/started" in rows[step]] == [1, 6, 7, 8]
    assert [step for step in sorted(rows) if "events/rollback" in rows[step]] == [5, 6, 7, 9]
    # The row of a step that holds a text of an earlier start takes no points any more.
    assert [step for step in sorted(rows) if "loss/train" in rows[step]] == [1, 2, 3, 4, 5, 8, 9]


def test_a_picture_that_is_drawn_late_goes_behind_the_events_of_later_steps(wandb: StandIn, tmp_path: Path) -> None:
    writer = WeightsAndBiases(tmp_path, OFFLINE, {})
    writer.scalars(at(10), {"loss/train": 1.0})
    writer.event(17, "loss spike", "high")  # points come every 10 steps alone
    writer.image(12, "load", PNG)
    writer.close()
    (rows,) = wandb.rows.values()
    assert rows[17].keys() == {"events/loss spike", "load"}


def test_the_monitor_sends_what_the_board_shows(wandb: StandIn, tmp_path: Path, prepared: Path) -> None:
    config = small_config(prepared, "monitor.wandb=offline", "monitor.wandb_entity=us")
    folder = RunFolder(tmp_path / "run", writes=True)
    monitor = Monitor(config, folder, Origin(0, 0, 9, torch.device("cpu"), 1), facts={"model": "| a | 1 |"})
    speed = {"tokens_per_second": 1.0, "step_seconds": 1.0, "memory_bytes": 1, "memory_peak_bytes": 1, "lr": 0.1}
    load = {"blocks.0.attention.value_statistics": torch.ones(2, 3), "blocks.0.feedforward.statistics": torch.ones(5)}
    monitor.step({"step": 1, "loss": 2.5, "grad_norm": 1.0, "tokens": 128, **speed}, load)
    folder.event("loss_spike", step=1, reason="high")
    monitor.validation(1, {"loss": 2.25, "perplexity": 9.5}, split="validation")
    monitor.close()
    (rows,), (given,), (run,) = wandb.rows.values(), wandb.given, wandb.runs
    assert {"loss/train": 2.5, "loss/validation": 2.25, "optimizer/learning rate": 0.1}.items() <= rows[1].items()
    assert rows[1].keys() >= {"run/model", "events/loss spike"}
    assert run.config.values["model.d_model"] == 24 and run.config.values["software"]["torch"] == torch.__version__
    assert (given["project"], given["entity"], given["name"]) == ("switchall", "us", "run")
    assert not [key for key in run.config.values if key.startswith("monitor.")]
    settings = given["settings"].given
    assert settings.pop("finish_timeout") < weights_and_biases.CLOSE_SECONDS
    private = {"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True}
    assert settings == {**private, "silent": True}, "a command line, a remote and a log may hold passwords"


@pytest.mark.parametrize("what", ["init", "log"])
def test_what_goes_wrong_is_one_warning(
    what: str, wandb: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise SystemExit("no route\nto host")  # which wandb raises too

    if what == "init":
        wandb.init = broken
    if what == "log":
        monkeypatch.setattr(Run, "log", broken)
    writer = WeightsAndBiases(tmp_path, MonitorConfig(wandb="online"), {})
    for step in range(1, 5):
        writer.scalars(at(step), {"loss/train": 1.0})
        writer.flush()
    writer.close()
    said = capsys.readouterr().err
    assert said == (
        "warning: Weights & Biases does not work (no route to host); the run goes on without it, and metrics.jsonl has "
        "every step\n"
    )
    assert weights_and_biases.Mark(tmp_path / "wandb").step == 0, "what was not sent is sent by the next start"


@pytest.mark.parametrize(
    "points, said",
    [
        (8, "does not keep up: 3 points wait; the run goes on"),
        (2, "did not take everything in 0 s; `wandb sync` sends"),
    ],
)
def test_a_network_that_stands_still_stops_nobody(
    wandb: StandIn,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    points: int,
    said: str,
) -> None:
    monkeypatch.setattr(weights_and_biases, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(weights_and_biases, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(weights_and_biases, "MOST_WAITING", 3)
    goes_on, original = threading.Event(), wandb.init
    wandb.init = lambda **given: (goes_on.wait(60), original(**given))[1]
    writer = WeightsAndBiases(tmp_path, OFFLINE, {})
    for step in range(1, points + 1):
        writer.scalars(at(step), {"loss/train": 1.0})
        writer.flush()
    writer.close()
    goes_on.set()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: Weights & Biases {said}")


def test_a_missing_package_is_a_sentence(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = r'^monitor\.wandb: is online, .*; pip install -e "\.\[wandb\]" installs it, and monitor\.wandb=off does'
    with pytest.raises(UserError, match=expected):
        preflight(small_config(prepared, "monitor.wandb=online"), 1, tmp_path / "run")
    check_installed(MonitorConfig())
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(wandb: StandIn, tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("mine")
    with pytest.raises(UserError, match=r"^monitor\.wandb: .*/wandb cannot be written \(File exists\); move it away"):
        WeightsAndBiases(tmp_path, OFFLINE, {})
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "run-id").write_bytes(b"\xff")
    with pytest.raises(
        UserError, match=r"^monitor\.wandb: .*/wandb cannot be written \('utf-8' codec .*; move it away"
    ):
        WeightsAndBiases(tmp_path / "run", OFFLINE, {})


def test_another_board_is_a_class_as_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's program, with a stand-in for its package."""
    called: list[tuple[str, Any]] = []
    package = types.ModuleType("mlflow")
    for name in ("log_metrics", "log_text", "log_image", "log_params", "set_experiment", "start_run", "end_run"):
        setattr(package, name, lambda *args, _name=name, **kwargs: called.append((_name, (*args, *kwargs.values()))))
    monkeypatch.setitem(sys.modules, "mlflow", package)
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (program,) = (text for text in programs if "class MLflow" in text)
    found: dict[str, Any] = {}
    exec(program, found)
    (board,) = (value for name, value in found.items() if name == "MLflow")
    for name, method in inspect.getmembers(Writer, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(board, name)).parameters) == list(
                inspect.signature(method).parameters
            )
    writer: Writer = board()
    writer.settings({"model.d_model": 24})
    writer.scalars(at(3), {"loss/train": 2.0, "routing/feed-forward/entropy, 1 is even/block 0": 1.0})
    writer.event(3, "loss spike", "high")
    writer.text(1, "run/model", "small")
    writer.histogram(3, "selection scores", torch.ones(4) / 4)
    writer.flush()
    writer.close()
    assert ("log_params", ({"model.d_model": 24},)) in called
    (points, step) = next(args for name, args in called if name == "log_metrics")
    assert step == 3 and points["loss/train"] == 2.0 and all(re.fullmatch(r"[\w\-. :/]+", name) for name in points)
    assert called[-1][0] == "end_run"


def records(path: Path) -> Iterator[bytes]:
    """Those of a file of W&B: after 7 bytes of its own, the log format of LevelDB (blocks of 32 KiB; checksum, length
    and kind of each part: 1 whole, 2 first, 3 middle, 4 last)."""
    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


# The fast tests above hold the same with a stand-in.
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason='NOT TESTED: the package wandb is missing (pip install -e ".[wandb]"), so its own files were not read',
)
def test_the_real_package_offline(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped after step 3 and loses that checkpoint, and another layout to the end: W&B's own reader
    finds one run, every step once with the losses of metrics.jsonl, pictures and histograms, and no file has the key.
    """
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    run_dir = tmp_path / "run"
    keys = (
        "monitor.wandb=offline",
        "monitor.details_every_steps=2",
        "train.steps=6",
        "evaluate.every_steps=2",
        "checkpoint.every_steps=2",
    )
    run_ranks(train_runs, 1, [(small_config(prepared, *keys, "train.stop_after_steps=3"), run_dir)])
    (run_dir / "checkpoints" / "step-00000003").rename(tmp_path / "lost")
    run_ranks(train_runs, 2, [(small_config(prepared, *keys, "parallel.zero=3"), run_dir)])

    from wandb.proto import wandb_internal_pb2

    history: list[dict[str, Any]] = []
    identities, settings = set(), set()
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                identities.add((record.run.run_id, record.run.project, record.run.display_name))
                settings |= {".".join(item.nested_key) or item.key for item in record.run.config.update}
            if record.HasField("config"):
                settings |= {".".join(item.nested_key) or item.key for item in record.config.update}
            if record.HasField("history"):
                row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                history.append({**row, "_step": record.history.step.num or row.get("_step")})
    assert len(identities) == 1 and next(iter(identities))[1:] == ("switchall", "run")
    assert {"model.d_model", "software"} <= settings
    losses = [(row["_step"], row["loss/train"]) for row in history if "loss/train" in row]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in metrics(run_dir)]
    # Step 3 was the last of the first start.
    assert [row["_step"] for row in history if "loss/validation" in row] == [2, 3, 4, 6]
    assert [row["_step"] for row in history if "gradient norm by group/experts" in row] == [1, 2, 4, 6]
    keys_of_rows = {key for row in history for key in row}
    for words in ("selection scores/attention output/block 00", "load of the experts/feed-forward", "events/started"):
        assert any(key.startswith(words) for key in keys_of_rows), words
    for path in run_dir.rglob("*"):
        assert not path.is_file() or b"0123456789abcdef" not in path.read_bytes(), path
