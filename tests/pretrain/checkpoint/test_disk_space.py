"""Room for checkpoints: what one takes, equal to what is saved, and what is said where the disk has less."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.folders import room_text
from model.language_model import build_on_meta
from pretrain.checkpoint import Retention, list_checkpoints
from pretrain.cli import train as cli
from pretrain.config.loading import to_json
from pretrain.report.disk_space import CheckpointSpace, checkpoint_space
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs
from tests.pretrain.saved import whole_tensors

Usage = namedtuple("Usage", "total used free")


def test_the_size_by_hand(prepared: Path, tmp_path: Path) -> None:
    plain = small_config(prepared)
    parameters = sum(parameter.numel() for parameter in build_on_meta(plain.model).parameters())
    space = checkpoint_space(plain, tmp_path)
    assert space.size == 12 * parameters and "memory" not in space.row().formula
    for precision, width in (("fp32", 4), ("bf16", 2)):
        config = small_config(prepared, "model.position.type=xl", f"train.precision={precision}")
        parameters = sum(parameter.numel() for parameter in build_on_meta(config.model).parameters())
        memory = 8 * 2 * 16 * 24 * width  # streams, layers, tokens, features
        space = checkpoint_space(config, tmp_path)
        assert space.size == 12 * parameters + memory and " + memory;" in space.row().formula


def test_what_a_disk_that_refused_a_file_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**values: int) -> str:
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096, **values))
        return room_text(tmp_path)

    assert of(f_files=10, f_favail=1) == "12,288 bytes are free there (a quota may leave less): make room"
    assert of(f_files=10, f_favail=0).startswith("no more files may be made there")
    assert of(f_files=0, f_favail=0).startswith("12,288 bytes")  # a file system that counts none, such as btrfs
    monkeypatch.undo()
    assert room_text(tmp_path / "gone") == ""


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_was_said(prepared: Path, tmp_path: Path) -> None:
    """Every tensor but the generators' states; the files around them take a few KB. Without and with XL memory."""
    short = ("train.steps=1", "evaluate.sequences=0")
    configs = [small_config(prepared, *short), small_config(prepared, *short, "model.position.type=xl")]
    run_ranks(train_runs, 1, [(config, tmp_path / str(number)) for number, config in enumerate(configs)])
    for number, config in enumerate(configs):
        (saved,) = list_checkpoints(tmp_path / str(number) / "checkpoints")
        tensors = whole_tensors(saved, prefixes=("master/", "exp_avg/", "exp_avg_sq/", "memory/"))
        assert any(name.startswith("memory/") for name in tensors) == bool(number)
        size = checkpoint_space(config, tmp_path / "none").size
        assert size == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        stored = sum(path.stat().st_size for path in saved.iterdir())
        assert size < stored < size + 100_000


@pytest.mark.parametrize(
    "keys, there, kept, wanted, least",
    [
        # 100 steps, saved every 10: 10 checkpoints, of which the last 3 are kept, and one is written meanwhile.
        (("train.steps=100", "checkpoint.every_steps=10"), 0, 3, 4, 2),
        (("train.steps=100", "checkpoint.every_steps=10"), 3, 3, 1, 1),
        (("train.steps=100", "checkpoint.every_steps=10"), 1, 3, 3, 1),
        (("train.steps=100", "checkpoint.every_steps=10", "checkpoint.keep_best=2"), 0, 5, 6, 2),
        # 20, 40 and 60 beside 80, 90 and 100; of the steps divisible by 15 only 30, 60 and 90 are saved.
        (("train.steps=100", "checkpoint.every_steps=10", "checkpoint.keep_every_steps=20"), 0, 6, 7, 2),
        (("train.steps=100", "checkpoint.every_steps=10", "checkpoint.keep_every_steps=15"), 0, 5, 6, 2),
        # None is removed.
        (("train.steps=25", "checkpoint.every_steps=10", "checkpoint.keep_last=9"), 0, 3, 3, 2),
        # There is only one.
        (("train.steps=5", "checkpoint.every_steps=10"), 0, 1, 1, 1),
        (("train.steps=100", "train.stop_after_steps=5", "checkpoint.every_steps=10"), 0, 1, 1, 1),
        (("train.steps=100", "train.stop_after_steps=40", "checkpoint.every_steps=10"), 0, 3, 4, 2),
        # By time every step may be saved.
        (("train.steps=5", "checkpoint.every_steps=10", "checkpoint.every_minutes=1"), 0, 3, 4, 2),
        (("train.steps=2", "checkpoint.every_steps=10", "checkpoint.every_minutes=1"), 0, 2, 2, 2),
        (("train.steps=100", "checkpoint.every_steps=10", "checkpoint.keep_last=1"), 0, 1, 2, 2),
    ],
)
def test_numbers_of_checkpoints(
    prepared: Path, tmp_path: Path, keys: tuple[str, ...], there: int, kept: int, wanted: int, least: int
) -> None:
    for number in range(there):
        (tmp_path / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)
    space = checkpoint_space(small_config(prepared, *keys), tmp_path)
    assert (space.kept, space.wanted, space.least) == (kept, wanted * space.size, least * space.size)


@pytest.mark.parametrize(
    "every, keep_every, last", [(10, 20, 3), (10, 15, 3), (7, 4, 1), (4, 8, 2), (30, 7, 9), (3, 3, 2)]
)
def test_as_many_are_kept_as_outlive_newer_ones(
    prepared: Path, tmp_path: Path, every: int, keep_every: int, last: int
) -> None:
    settings = {"every_steps": every, "keep_every_steps": keep_every, "keep_last": last}
    for steps in (every, 3 * every + 1, 100):
        keys = [f"checkpoint.{key}={value}" for key, value in settings.items()]
        space = checkpoint_space(small_config(prepared, *keys, f"train.steps={steps}"), tmp_path)
        kept: list[Path] = []
        for step in [*range(every, steps, every), steps]:
            there = [*kept, Path(f"step-{step:08d}")]
            kept = sorted(Retention(keep_last=last, keep_every_steps=keep_every).kept(there))
        assert space.kept == len(kept)


def test_the_limits_themselves() -> None:
    sizes: Any = {"parameters": 5, "per_parameter": 12, "memory": 40, "kept": 3, "there": 0, "folder": Path("run")}
    space = CheckpointSpace(saved=4, free=200, **sizes)
    space.check()
    assert space.warning() == (
        "the disk of run has no room for the 3 checkpoints that the run keeps and one being written: 400 bytes are "
        "needed, 200 are free; make room, or lower checkpoint.keep_last, keep_best or raise keep_every_steps"
    )
    assert not CheckpointSpace(saved=4, free=400, **sizes).warning()
    assert not CheckpointSpace(saved=3, free=300, **sizes).warning()
    assert "3 checkpoints that the run keeps: 300 bytes" in CheckpointSpace(saved=3, free=200, **sizes).warning()


@pytest.mark.parametrize("more", [[], ["--dry-run", "--no-step"]])
def test_a_disk_too_small_is_refused_and_one_without_room_for_all_is_warned_about(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    config = small_config(prepared, "checkpoint.every_steps=10", "train.steps=40")
    (tmp_path / "c.json").write_text(json.dumps(to_json(config)))
    size = checkpoint_space(config, tmp_path / "run").size
    started: list[object] = []

    def run(*given: object) -> int:
        started.append(given)
        return 0

    monkeypatch.setattr(cli, "run", run)
    arguments = ["--config", str(tmp_path / "c.json"), "--run-dir", str(tmp_path / "run"), *more]
    for free, code in ((2 * size - 1, 2), (2 * size, 0), (4 * size - 1, 0), (4 * size, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free, 0, free))
        assert cli.main(arguments) == code
        captured = capsys.readouterr()
        if code:
            assert captured.err == (
                f"error: --run-dir: the disk of {tmp_path}/run has no room for checkpoints of {size:,} bytes: "
                f"{2 * size:,} bytes are needed, {free:,} are free; make room or choose another --run-dir\n"
            )
            assert not (tmp_path / "run").exists() and not started
        else:
            wanted, there = f"3 of {size / 2**30:,.2f} GiB", f"{free / 2**30:,.1f} GiB are free"
            assert wanted in captured.out and there in captured.out
            assert (f"{4 * size:,} bytes are needed, {free:,} are free" in captured.err) == (free < 4 * size)
