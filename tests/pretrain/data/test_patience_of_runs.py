"""Runs whose data cannot be read for a while: what all ranks do, and how they end."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.data.patience
import pretrain.together
from common.errors import UserError
from pretrain.cli import train as cli
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.patience import Patience, Wait
from pretrain.data.sources import Sources
from pretrain.loop import train
from pretrain.parallel.agreement import PeerFailed
from pretrain.phases import read
from pretrain.report.exit_codes import ExitCode, code_of
from pretrain.report.run_folder import RunFolder
from tests.harness import run_ranks
from tests.pretrain.data.faulty_files import Faults
from tests.pretrain.runs import assert_bit_identical, events, light_config, small_config

KEYS = ("train.steps=4", "evaluate.sequences=8", "evaluate.every_steps=2", "checkpoint.every_steps=2")


def _train(rank: int, config: Config, folder: Path) -> list[str]:
    """How runs end without a fault, with a fault of rank 1 that passes, and with faults that stay: in training, for a
    missing file too, and at the start."""
    pretrain.data.patience.FIRST_PAUSE_SECONDS = 0.01
    endings = []
    for name, number, times, is_late in (
        ("plain", 0, 0, True),
        ("passes", errno.ESTALE, 2, True),
        ("stays", errno.EIO, 10**6, True),
        ("missing", errno.ENOENT, 10**6, True),
        ("start", errno.ETIMEDOUT, 10**6, False),
        ("absent", errno.ENOENT, 10**6, False),
    ):
        faults = Faults(".tar", number, times if rank == 1 else 0)
        patience = Patience(0.5 if times > 2 else 60.0, rank=rank)
        sources = Sources.load(config, patience=patience)
        with pytest.MonkeyPatch.context() as patch:
            if is_late:  # once the files were looked at
                check = pretrain.together.check_data

                def checked(*args: Any, faults: Faults = faults, check: Any = check, patch: Any = patch) -> Sources:
                    found: Sources = check(*args)
                    faults.install(patch, "Path.open")
                    return found

                patch.setattr("pretrain.loop.check_data", checked)
            else:
                faults.install(patch, "Path.stat")
            try:
                code = train(config, sources, folder / name, torch.device("cpu"))
                endings.append(f"{code.name}, {faults.met} faults")
            except PeerFailed as error:
                endings.append(f"PeerFailed {code_of(error.kind).name}")
            except UserError as error:
                endings.append(f"{code_of(type(error)).name}: {error}")
    return endings


def test_two_ranks_of_which_one_cannot_read(prepared: Path, tmp_path: Path) -> None:
    first, second = run_ranks(_train, 2, light_config(prepared, *KEYS, ranks=2), tmp_path)
    assert first[:2] == ["FINISHED, 0 faults"] * 2 and second[:2] == ["FINISHED, 0 faults", "FINISHED, 2 faults"]
    assert_bit_identical(tmp_path / "passes", tmp_path / "plain")
    (wait,) = [event for event in events(tmp_path / "passes") if event["event"] == "data_waited"]
    assert (wait["rank"], wait["attempts"]) == (1, 2) and "ESTALE" in wait["reason"] and wait["file"].endswith(".tar")
    for number, (name, words) in enumerate((("stays", "(errno 5, EIO)"), ("missing", "(errno 2, ENOENT)")), start=2):
        assert first[number] == "PeerFailed CUT_OFF" and second[number].startswith(f"CUT_OFF: {prepared}/")
        assert words in second[number] and "rank 1 tried" in second[number]
        # Rank 0 writes the outcome, and rank 1 knows what happened.
        assert second[number].endswith(". Nothing was saved: the same command begins anew")
        outcome = json.loads((tmp_path / name / "outcome.json").read_text())
        assert outcome["exit_code"] == int(ExitCode.CUT_OFF) == 7
        assert outcome["reason"] == second[number].replace("CUT_OFF: ", "rank 1: ")
        assert not (tmp_path / name / "metrics.jsonl").exists() and any(
            e["event"] == "data_waited" for e in events(tmp_path / name)
        )
    # At the start the first rank says what any rank has met.
    assert second[4] == "PeerFailed CUT_OFF" and first[4].startswith(f"CUT_OFF: {prepared}/")
    assert "ETIMEDOUT" in first[4] and "rank 1 tried" in first[4]
    assert second[5] == "PeerFailed REFUSED" and first[5].startswith("REFUSED: missing file ")


def test_a_manifest_that_cannot_be_read_before_the_ranks_meet_ends_with_the_code_of_a_fault_that_passes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain.data.patience, "FIRST_PAUSE_SECONDS", 0.001)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(small_config(prepared, "resilience.hang_timeout_seconds=1"))))
    with monkeypatch.context() as patch:
        Faults("manifest.json", errno.EIO, 10**6).install(patch, "Path.read_bytes")
        code = cli.main(["--config", str(path), "--run-dir", str(tmp_path / "run")])
    assert code == ExitCode.CUT_OFF
    assert (
        f"{prepared}/manifest.json cannot be read: Input/output error (errno 5, EIO); rank 0 tried"
        in capsys.readouterr().err
    )


def _train_beside_a_slow_disk(rank: int, config: Config, run_dir: Path) -> list[str]:
    """The phases of rank 1 while rank 0 writes down that rank 1 waited for its data."""
    patience, event, found = Patience(60.0, rank=rank), RunFolder.event, []
    if rank == 1:
        patience._waits.append(Wait(rank=1, file="x.tar", seconds=70.0, attempts=3, reason="ESTALE"))

    def slow(folder: RunFolder, kind: str, **values: Any) -> None:
        event(folder, kind, **values)
        if kind == "data_waited" and rank == 0:
            time.sleep(1.0)  # in which rank 1 would go on
            last = read(run_dir / "ranks" / "rank-00001.phase")
            found.append("" if last is None else last.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "event", slow)
        train(config, Sources.load(config, patience=patience), run_dir, torch.device("cpu"))
    return found


def test_no_rank_begins_a_step_while_the_first_writes_what_was_waited_for(prepared: Path, tmp_path: Path) -> None:
    """In a step the others would wait for it no longer than a step's limit."""
    config = light_config(prepared, "train.steps=2", "evaluate.sequences=0", ranks=2)
    first, _ = run_ranks(_train_beside_a_slow_disk, 2, config, tmp_path / "run")
    assert first == ["waiting for the batches of other ranks"]
