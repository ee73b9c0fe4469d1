"""Disks without room: compared with an estimate at the start, and named with folder and bytes when they are full."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import cli
from data_prep.cli import main
from data_prep.config.loading import load_config
from data_prep.config.resolved import resolve
from data_prep.run import disk_estimate
from data_prep.run.disk_estimate import needed_bytes, used_bytes
from launch.slurm import preparation
from tests.data_prep.conftest import Corpus
from tests.data_prep.outcome import one_error, outputs
from tests.data_prep.raw_corpus import SAMPLE

Usage = namedtuple("Usage", "total used free")


def estimate(folder: Path, **body: Any) -> int:
    path = folder / "estimate.json"
    path.write_text(json.dumps({"output": str(folder / "out"), **body}))
    return needed_bytes(resolve(load_config(path, [])))


def test_the_formula(tmp_path: Path) -> None:
    """By hand, of 1,000,000 stored bytes."""
    for name in ("plain.jsonl", "packed.json.gz"):
        (tmp_path / name).write_bytes(bytes(1_000_000))
    plain, packed = str(tmp_path / "plain.jsonl"), str(tmp_path / "packed.json.gz")
    assert estimate(tmp_path, input=plain) == 400_000 + 2 * 2 * 250_000
    assert estimate(tmp_path, input=packed) == 3 * (400_000 + 2 * 2 * 250_000)
    assert estimate(tmp_path, input=[plain, packed]) == 4 * (400_000 + 2 * 2 * 250_000)
    assert estimate(tmp_path, input=plain, dedup={}) == 400_000 + 2 * 2 * 250_000 + 250_000
    assert estimate(tmp_path, input=plain, dedup={"near": False}) == 400_000 + 2 * 2 * 250_000
    for vocab_size, id_bytes in ((65_536, 2), (65_537, 4), (70_000, 4)):
        needed = 400_000 + 2 * id_bytes * 250_000
        assert estimate(tmp_path, input=plain, tokenizer={"vocab_size": vocab_size}) == needed
    given = {"model": plain}
    assert estimate(tmp_path, input=plain, tokenizer=given) == 2 * 2 * 250_000, "ids are made while reading"
    assert estimate(tmp_path, input=plain, format="enwik8", tokenizer={"type": "bytes"}) == 2 * 2 * 1_000_000
    symbols = {"type": "symbols"}
    assert estimate(tmp_path, input=plain, format="enwik8", tokenizer=symbols) == 400_000 + 2 * 2 * 1_000_000


def test_the_estimate_is_near_what_real_text_takes(tmp_path: Path) -> None:
    """Within a half and twice: everything that lies in the output and the work folder at the end."""
    body = {
        "input": str(SAMPLE / "c4" / "c4-validation.*.json.gz"),
        "validation_fraction": 0.1,
        "keep_work": True,
        "workers": 1,
        "tokenizer": {"vocab_size": 2000},
    }
    expected = estimate(tmp_path, **body)
    assert main(["run", "--config", str(tmp_path / "estimate.json")]) == 0
    assert expected / 2 < used_bytes(tmp_path / "out") < 2 * expected


def test_files_that_other_array_tasks_rename_meanwhile_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task counts what is done while the others write: a name that was listed may be gone when it is asked for."""
    asked: list[str] = []
    stat, lstat = os.stat, os.lstat

    def gone_after(path: Any, **options: Any) -> os.stat_result:
        found = stat(path, **options)
        if str(path).endswith(".tmp"):
            Path(path).unlink()
        return found

    def gone_before(path: Any) -> os.stat_result:
        if str(path).endswith(".tmp"):
            asked.append(str(path))
            Path(path).unlink()
        return lstat(path)

    folder = tmp_path / ".work" / "ingest-0123456789abcdef"
    folder.mkdir(parents=True)
    for name in ("a.zst", ".b.zst.host-1-01234567.tmp", "c.zst"):
        (folder / name).write_bytes(bytes(10))
    monkeypatch.setattr(os, "stat", gone_after)
    monkeypatch.setattr(os, "lstat", gone_before)
    assert used_bytes(tmp_path / ".work") == 20 and asked
    assert used_bytes(tmp_path / "none") == 0


def test_a_disk_below_the_estimate_is_said_at_the_start(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = corpus.write_config(tmp_path / "config.json", output=str(tmp_path / "out"))
    needed = needed_bytes(resolve(load_config(config, [])))
    free = needed // 4 - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    said = (
        f"output: the disk of {tmp_path}/out has no room for the work folder and the shards: about {needed:,} bytes "
        "are needed, {free:,} are free; "
    )
    assert main(["run", "--config", str(config)]) == 2
    assert one_error(capsys) == f"error: {said.format(free=free)}make room, or choose another `output`"
    arguments = ["--config", str(config), "--tasks", "1", "--time", "1:00:00", "--dry-run"]
    assert preparation.main(arguments) == 2
    assert said.format(free=free) in one_error(capsys)
    assert not (tmp_path / "out").exists()
    free = needed - 1
    assert main(["ingest", "--config", str(config)]) == 0
    assert f"warning: {said.format(free=free)}filters may leave less text" in capsys.readouterr().err
    free = needed - used_bytes(tmp_path / "out" / ".work")  # what is done already needs no room
    assert main(["run", "--config", str(config)]) == 0
    assert "has no room" not in capsys.readouterr().err


def test_with_room_for_everything_nobody_walks_over_the_work_folder(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each array task would, and the work folder of C4 holds 200,000 files."""
    resolved = resolve(load_config(corpus.write_config(tmp_path / "config.json", output=str(tmp_path / "out")), []))
    needed = needed_bytes(resolved)
    walked: list[Path] = []

    def counted(folder: Path) -> int:
        walked.append(folder)
        return 1

    monkeypatch.setattr(disk_estimate, "used_bytes", counted)
    for free, times in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(disk_estimate, "free_bytes", lambda folder, free=free: free)
        walked.clear()
        disk_estimate.check_room(resolved)
        assert len(walked) == times


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_disk_that_fills_is_one_sentence_and_the_same_command_goes_on(
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    disk = small_disk(512 << 10)
    with gzip.open(SAMPLE / "c4" / "c4-validation.00000-of-00001.json.gz") as stream:
        lines = stream.read()
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(lines)
    body = {"input": str(tmp_path / "*.jsonl"), "workers": workers, "tokenizer": {"vocab_size": 600}}
    for name, output in (("full", disk / "out"), ("roomy", tmp_path / "roomy")):
        (tmp_path / f"{name}.json").write_text(json.dumps({**body, "output": str(output)}))
    monkeypatch.setattr(cli, "check_room", lambda resolved: None)  # which would refuse it at the start
    assert main(["run", "--config", str(tmp_path / "full.json")]) == 1
    error = one_error(capsys)
    assert error.startswith(f"error: output: the disk of {disk}/out has no room for the work folder and the shards")
    assert "bytes are needed" in error and "are free; make room: the same command goes on where it was" in error
    assert not (disk / "out" / "manifest.json").exists()
    assert not list((disk / "out").rglob("*.tmp")), "nothing half-written"
    small_disk(64 << 20)
    monkeypatch.undo()
    assert main(["run", "--config", str(tmp_path / "full.json")]) == 0
    assert main(["run", "--config", str(tmp_path / "roomy.json")]) == 0
    assert outputs(disk / "out") == outputs(tmp_path / "roomy")


def test_an_error_of_another_kind_is_left_as_it_is(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(pipeline: object, until: str) -> None:
        raise OSError(5, "Input/output error", "a.zst")

    monkeypatch.setattr("data_prep.run.pipeline.Pipeline.run", broken)
    config = corpus.write_config(tmp_path / "config.json", output=str(tmp_path / "out"))
    assert main(["run", "--config", str(config)]) == 1
    assert one_error(capsys) == "error: [Errno 5] Input/output error: 'a.zst'"
    assert disk_estimate.REFUSED_BELOW == 4, "as the documentation says"
