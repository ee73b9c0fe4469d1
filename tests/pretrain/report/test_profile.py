"""monitor.profile_steps records the steps that it names, on the ranks that it names, and changes no number;
monitor.memory_history, what stands in the snapshot of a full GPU."""

from __future__ import annotations

import contextlib
import gzip
import inspect
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from common.errors import ConfigError
from model.parallel.context import ParallelContext
from pretrain import device, loop
from pretrain.config.schema import Config
from pretrain.report import profile
from tests.harness import run_ranks
from tests.pretrain.runs import COMPARED, light_config, metrics, small_config, train_runs


def train_and_keep_warnings(rank: int, runs: list[tuple[Config, Path]], output: Path) -> None:
    with open(output, "w") as file, contextlib.redirect_stderr(file):
        train_runs(rank, runs)


def test_the_named_steps_are_recorded_on_the_first_slice(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=4", "evaluate.sequences=0", "batch.micro_sequences=2")
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    run_ranks(
        train_runs,
        2,
        [
            (light_config(prepared, *keys), plain),
            (light_config(prepared, *keys, "monitor.profile_steps=[2, 3]"), profiled),
        ],
    )
    folder = profiled / "profile" / "steps-2-3"
    assert {path.name for path in folder.iterdir()} == {"rank-00000.txt", "rank-00000.json.gz"}
    assert "aten::mm" in (folder / "rank-00000.txt").read_text()
    events = json.loads(gzip.decompress((folder / "rank-00000.json.gz").read_bytes()))["traceEvents"]
    forward = [event for event in events if event.get("name") == "aten::embedding"]
    assert len(forward) == 2 * 2, "two steps of two micro-steps"
    assert [[row[key] for key in COMPARED] for row in metrics(profiled)] == [
        [row[key] for key in COMPARED] for row in metrics(plain)
    ]


@pytest.mark.slow  # the fast one ends where its steps do
def test_a_run_that_ends_early_writes_what_it_has(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=2", "evaluate.sequences=0", "monitor.profile_steps=[2, 9]")
    run_ranks(train_runs, 1, [(small_config(prepared, *keys), tmp_path)])
    assert (tmp_path / "profile" / "steps-2-9" / "rank-00000.txt").exists()


def test_a_disk_that_refuses_it_is_a_warning(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    keys = ("train.steps=2", "evaluate.sequences=0", "monitor.profile_steps=[1, 1]")
    run_ranks(train_and_keep_warnings, 1, [(light_config(prepared, *keys), tmp_path)], tmp_path / "err")
    assert (tmp_path / "err").read_text().startswith("warning: monitor.profile_steps: ")
    assert len(metrics(tmp_path)) == 2


def test_steps_that_this_start_does_not_run_are_a_warning(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pretrain.report.profile.dist.get_rank", lambda: 0)

    def build(steps: tuple[int, int] | None, ahead: range) -> str:
        profile.StepProfiler(steps, tmp_path, ParallelContext(), torch.device("cpu"), ahead=ahead)
        return capsys.readouterr().err

    assert build((4, 9), range(5, 9)) == (
        "warning: monitor.profile_steps: [4, 9] begins outside of this start, which runs steps 5 to 8; "
        "nothing is profiled\n"
    )
    assert "[9, 9] begins outside of this start, which runs steps 5 to 8;" in build((9, 9), range(5, 9))
    assert "[9, 9] begins outside of this start, which is done, at step 8;" in build((9, 9), range(9, 9))
    # train.stop_after_steps = 5 of a run that has taken 8.
    assert "which is done, at step 8;" in build((9, 9), range(9, 6))
    assert build((5, 9), range(5, 9)) == build((8, 8), range(5, 9)) == build(None, range(5, 9)) == ""
    (tmp_path / "profile" / "steps-4-9").mkdir(parents=True)
    assert build((4, 9), range(5, 9)) == "", "an earlier start recorded them"


def test_steps_in_the_wrong_order_are_refused(prepared: Path) -> None:
    with pytest.raises(ConfigError, match=r"^monitor.profile_steps: \[9, 4\] ends before it begins"):
        small_config(prepared, "monitor.profile_steps=[9, 4]")


def train_and_keep_what_was_called(rank: int, runs: list[tuple[Config, Path]], output: Path) -> None:
    """Of each run: the calls that begin the history and build the model, in their order."""
    calls: list[str] = []

    def build(*args: Any) -> Any:
        calls.append("model")
        return loop_build(*args)

    loop_build = loop.build_segment
    with (
        mock.patch.object(loop, "record_memory_history", lambda where: calls.append(f"history of {where}")),
        mock.patch.object(loop, "build_segment", build),
    ):
        train_runs(rank, runs)
    output.write_text(json.dumps(calls))


def test_the_history_of_memory_begins_before_the_model_is_built_and_only_where_it_is_asked_for(
    prepared: Path, tmp_path: Path
) -> None:
    keys, calls = ("train.steps=1", "evaluate.sequences=0"), tmp_path / "calls"
    runs = [
        (light_config(prepared, *keys), tmp_path / "plain"),
        (light_config(prepared, *keys, "monitor.memory_history=true"), tmp_path / "history"),
    ]
    run_ranks(train_and_keep_what_was_called, 1, runs, calls)
    assert json.loads(calls.read_text()) == ["model", "history of cpu", "model"]


def test_torch_takes_the_call_that_begins_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the signature of the torch that is installed: no GPU is here."""
    signature, calls = inspect.signature(torch.cuda.memory._record_memory_history), []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **keys: calls.append(keys))
    device.record_memory_history(torch.device("cpu"))
    assert not calls
    device.record_memory_history(torch.device("cuda", 0))
    (keys,) = calls
    assert signature.bind(**keys) and keys["max_entries"] < signature.parameters["max_entries"].default


def test_torch_takes_the_call_that_writes_a_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    signature, calls = inspect.signature(torch.cuda.memory._dump_snapshot), list[str]()
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    assert not device.write_memory_snapshot(tmp_path, torch.device("cpu"))
    assert device.write_memory_snapshot(tmp_path, torch.device("cuda", 0))
    assert calls == [str(tmp_path)] and next(iter(signature.parameters)) == "filename" and signature.bind(*calls)


@pytest.mark.parametrize("has_history", [False, True])
def test_the_message_of_a_full_gpu_says_what_its_snapshot_has(
    has_history: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(profile, "write_memory_snapshot", lambda path, device: True)
    profile.note_full_memory(tmp_path, torch.device("cuda", 0), has_history=has_history)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"out of memory: {tmp_path / 'memory' / 'rank-00003.pickle'} shows the blocks that hold it")
    assert ("the lines that allocated them" in line) == has_history
    assert ("monitor.memory_history=true" in line) != has_history
