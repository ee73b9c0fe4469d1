"""Whole runs on two ranks that meet a full disk, diverge with validation on, or are started again when finished."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from common import line_log
from pretrain.checkpoint import list_checkpoints
from pretrain.config.schema import Config
from pretrain.parallel.agreement import PeerFailed
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.report.test_line_log import strict
from tests.pretrain.resilience.faults import before_steps, outcome, train_with
from tests.pretrain.runs import events, light_config, metrics


def nothing(trainer: Trainer) -> None:
    """No fault."""


def full_disk(trainer: Trainer, first: int, last: int) -> None:
    """On rank 0 the disk takes no line of metrics.jsonl from step `first` until step `last` begins."""
    if dist.get_rank() > 0:
        return
    append, now = line_log.append_whole, [0]
    before_steps(trainer, lambda step: now.__setitem__(0, step))

    def refused(path: Path, data: bytes) -> None:
        if path.name == "metrics.jsonl" and first <= now[0] < last:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append(path, data)

    line_log.append_whole = refused


def read_only(trainer: Trainer, step: int) -> None:
    """From `step` on the file system of the run folder takes nothing, as after a fault of its disk."""

    def refused(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def turn(now: int) -> None:
        if now == step:
            line_log.append_whole = refused
            Path.unlink = Path.rmdir = Path.mkdir = refused  # type: ignore[assignment]

    before_steps(trainer, turn)


def no_folder_for_ranks(rank: int, config: Config, run_dir: Path) -> str:
    """How a run ends whose rank 1 finds that it cannot write into the run folder."""
    make = Path.mkdir

    def refused(path: Path, *arguments: Any, **options: Any) -> None:
        if rank == 1 and path.name == "ranks":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        make(path, *arguments, **options)

    Path.mkdir = refused  # type: ignore[assignment]
    try:
        return train_with(rank, config, run_dir, nothing)
    except PeerFailed:
        return "another rank said why"


def test_a_rank_that_may_not_write_into_the_folder_is_named(prepared: Path, tmp_path: Path) -> None:
    config = light_config(prepared, "train.steps=1", ranks=2)
    other, said = run_ranks(no_folder_for_ranks, 2, config, tmp_path)
    assert other == "another rank said why"
    assert said == f"REFUSED: --run-dir: {tmp_path}/ranks cannot be written by rank 1: Read-only file system"
    assert outcome(tmp_path)["exit_code"] == 2 and not list(tmp_path.glob("lock-*"))


def run_all(rank: int, cases: list[tuple[Config, Path, Any]]) -> list[str]:
    found = []
    original = line_log.append_whole
    for config, run_dir, fault in cases:
        try:
            found.append(train_with(rank, config, run_dir, *fault))
        except PeerFailed:
            found.append("another rank said why")
        line_log.append_whole = original
    return found


@pytest.fixture(scope="module")
def endings(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """How the runs below ended on both ranks; one launch for all."""
    folder = tmp_path_factory.mktemp("runs")
    keys = ("train.steps=8", "checkpoint.every_steps=2", "evaluate.sequences=8", "monitor.tensorboard=true")
    config = light_config(prepared, *keys, ranks=2)
    at_once = light_config(prepared, *keys, "train.steps=4", "checkpoint.asynchronous=false", ranks=2)
    wild = light_config(
        prepared, *keys, "optimizer.learning_rate=1e30", "schedule.warmup_steps=0", "evaluate.every_steps=2",
        "train.steps=30", ranks=2,
    )  # fmt: skip
    cases = [
        (config, folder / "cleared", (full_disk, 3, 6)),
        (config, folder / "full", (full_disk, 3, 99)),
        (config, folder / "full", (nothing,)),
        (config, folder / "full", (nothing,)),
        (wild, folder / "wild", (nothing,)),
        (config, folder / "board", (nothing,)),
        (config, folder / "log", (nothing,)),
        (at_once, folder / "read only", (read_only, 3)),  # the last: nothing takes it back
    ]
    (folder / "board").mkdir()
    (folder / "board" / "tensorboard").write_text("not a folder")
    (folder / "log" / "metrics.jsonl").mkdir(parents=True)
    by_rank = run_ranks(run_all, 2, cases)
    return folder, [list(ending) for ending in zip(*by_rank, strict=True)]


def test_a_folder_that_becomes_read_only_ends_the_run_with_its_reason(endings: tuple[Path, list[list[str]]]) -> None:
    folder, ends = endings
    said, other = ends[7]
    assert said.startswith("REFUSED: checkpoint.every_steps: rank 0 ") and other == "another rank said why"
    assert "metrics.jsonl, which a checkpoint needs: Read-only file system; the newest checkpoint is" in said
    assert said.endswith("When the disk takes files again, the same command continues")
    assert [path.name for path in list_checkpoints(folder / "read only" / "checkpoints")] == ["step-00000002"]


def test_a_disk_that_is_cleared_costs_no_line(endings: tuple[Path, list[list[str]]]) -> None:
    folder, ends = endings
    assert ends[0] == ["FINISHED", "FINISHED"]
    assert [row["step"] for row in metrics(folder / "cleared")] == list(range(1, 9))
    # The checkpoint of step 4 would have been ahead of metrics.jsonl; that of step 6 came after the disk was cleared.
    (failed,) = events(folder / "cleared", "checkpoint_failed")
    assert failed["step"] == 4 and "metrics.jsonl, which a checkpoint needs: No space left" in failed["reason"]
    assert [event["step"] for event in events(folder / "cleared", "checkpoint")] == [2, 6, 8]


def test_a_disk_that_stays_full_ends_the_run_and_the_next_start_has_every_line(
    endings: tuple[Path, list[list[str]]],
) -> None:
    folder, ends = endings
    assert ends[1][0].startswith("REFUSED: checkpoint.every_steps: rank 0 could not save")
    assert ends[1][1] == "another rank said why"
    assert ends[2] == ["FINISHED", "FINISHED"]
    assert [row["step"] for row in metrics(folder / "full")] == list(range(1, 9))
    assert metrics(folder / "full")[-1]["loss"] == metrics(folder / "cleared")[-1]["loss"]
    assert len(list_checkpoints(folder / "full" / "checkpoints")) == 3


def test_a_finished_run_that_is_started_again_does_nothing(endings: tuple[Path, list[list[str]]]) -> None:
    folder, ends = endings
    assert ends[3] == ["FINISHED", "FINISHED"]
    assert len(events(folder / "full", "started")) == 3
    # By the first start, whose last steps could not be saved, and by the second, which computed them again.
    assert [event["step"] for event in events(folder / "full", "validation")] == [8, 8]
    # One file of points of each start that made steps.
    board = folder / "full" / "tensorboard"
    for place in (board, board / "events", board / "against tokens", board / "against MFLOP"):
        assert len(list(place.glob("events.out.*"))) == 2


@pytest.mark.parametrize(
    "place, name, key",
    [(5, "board/tensorboard", "monitor.tensorboard"), (6, "log/metrics.jsonl", "--run-dir")],
)
def test_what_is_in_the_way_ends_every_rank_with_one_sentence(
    endings: tuple[Path, list[list[str]]], place: int, name: str, key: str
) -> None:
    folder, ends = endings
    assert ends[place][0].startswith(f"REFUSED: {key}: {folder / name} is ")
    assert ends[place][1] == "another rank said why"
    assert not list((folder / name).parent.glob("lock-*"))


def test_a_run_that_diverges_with_validation_on_says_so(endings: tuple[Path, list[list[str]]]) -> None:
    folder, ends = endings
    assert all(end.startswith("DIVERGED: step ") for end in ends[4])
    assert outcome(folder / "wild")["exit_code"] == 3
    validations = events(folder / "wild", "validation")
    assert validations and validations[-1]["loss"] is None and validations[-1]["perplexity"] is None
    for path in (folder / "wild").rglob("*.json*"):
        for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            strict(text)
    newest = list_checkpoints(folder / "wild" / "checkpoints")[-1]
    assert json.loads((newest / "state.json").read_text())["validation_loss"] is None
