"""A start that ends before it has opened its run folder: whoever reads the folder reads of this start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import pretrain.device
import pretrain.resilience.guard
from common.errors import PassingError, UserError
from common.paths import REPOSITORY
from common.run_lock import FolderLock
from data_prep.shards.format import Manifest
from pretrain.cli.train import main
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.loop import train
from pretrain.parallel.agreement import PeerFailed
from pretrain.report.exit_codes import ExitCode
from pretrain.resilience.signals import Stop
from pretrain.views.reading import RunView, State
from tests.harness import run_ranks
from tests.pretrain.runs import light_config
from tests.pretrain.views.status_case import write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of a start that a signal has stopped."""
    folder = write(tmp_path / "run", exit_code=85, reason="SIGUSR1", step=8, time=1.0)
    (folder / "checkpoints" / "step-00000008").rmdir()
    return folder


def started(run: Path, *settings: str) -> int:
    config = REPOSITORY / "configs" / "switchall_tiny.json"
    return main(["--config", str(config), "--run-dir", str(run), *(f"--set={setting}" for setting in settings)])


@pytest.mark.parametrize("setting", ["data.manifest=nowhere", "train.stepz=3"])
def test_what_is_refused_before_the_ranks_meet_is_the_outcome(run: Path, setting: str) -> None:
    names = {path.name for path in run.iterdir()}
    assert started(run, setting) == ExitCode.REFUSED
    view = RunView.open(run)
    assert view.state is State.FAILED and view.outcome["exit_code"] == ExitCode.REFUSED
    assert view.outcome["reason"].startswith(setting.partition("=")[0])
    assert [event["event"] for event in view.events] == ["started", "opened", "failed"]
    assert {path.name for path in run.iterdir()} == names


def test_so_it_is_where_the_start_before_came_to_no_configuration(run: Path) -> None:
    """It had no memory for its model. A folder that no start has opened stays as it is."""
    (run / "config.json").unlink()
    assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    assert RunView.open(run).outcome["exit_code"] == ExitCode.REFUSED
    for name in ("events.jsonl", "outcome.json", "metrics.jsonl"):
        (run / name).unlink()
    assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    assert {path.name for path in run.iterdir()} == {"checkpoints"}


@pytest.mark.parametrize("is_alone", [False, True])
def test_of_other_ranks_the_one_that_alone_has_found_it_notes_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 2), ("MASTER_ADDR", "::1"), ("MASTER_PORT", 9)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(Stop, "step_aside", lambda stop: is_alone)
    assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    assert (RunView.open(run).outcome["exit_code"] == ExitCode.REFUSED) == is_alone


def test_nothing_is_noted_in_the_folder_of_a_run_that_goes_on(run: Path) -> None:
    before = (run / "outcome.json").read_bytes()
    lock = FolderLock(run)
    try:
        assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    finally:
        lock.release()
    assert (run / "outcome.json").read_bytes() == before


@pytest.mark.parametrize("step, is_noted", [(40, False), (20, True)])
def test_a_run_that_has_taken_all_steps_stays_finished(run: Path, step: int, is_noted: bool) -> None:
    """And one that train.stop_after_steps has ended does not."""
    outcome = {"exit_code": 0, "reason": "finished", "step": step, "time": 1.0}
    (run / "outcome.json").write_text(json.dumps(outcome))
    assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    assert (RunView.open(run).state is State.FAILED) == is_noted


@pytest.mark.parametrize("content", ["3", "{", "[" * 100_000])
def test_what_the_folder_holds_does_not_change_how_the_start_ends(run: Path, content: str) -> None:
    for name in ("outcome.json", "config.json"):
        (run / name).write_text(content)
    assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    assert RunView.open(run).outcome["exit_code"] == ExitCode.REFUSED


def test_ranks_that_cannot_meet_are_the_outcome(
    run: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*arguments: object, **options: object) -> torch.device:
        raise pretrain.device.Unreachable("the ranks cannot meet")

    monkeypatch.setattr(pretrain.device, "start", start)
    assert started(run, f"data.manifest={prepared}") == ExitCode.CUT_OFF, capsys.readouterr().err
    assert RunView.open(run).outcome["reason"] == "the ranks cannot meet"


def _refused(rank: int, config: Config, run: Path) -> None:
    sources = Sources.find(config, lambda error: None, follow_links=False)
    assert sources is not None
    with pytest.raises((UserError, PeerFailed)):
        train(config, sources, run, torch.device("cpu"))


def test_what_the_ranks_refuse_once_they_have_met_is_the_outcome(run: Path, prepared: Path, tmp_path: Path) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    shard = Manifest.load(data).split("train")[1].file  # the second of all files: rank 1's
    (data / shard).write_bytes(b"")
    run_ranks(_refused, 2, light_config(data), run)
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["exit_code"] == ExitCode.REFUSED and shard in outcome["reason"]


def _unconnected(rank: int, config: Config, run: Path) -> None:
    def unreachable(seconds: float) -> None:
        raise PassingError("GLOO_SOCKET_IFNAME: gloo does not connect the ranks")

    pretrain.resilience.guard.control_group = unreachable  # this process ends with the test
    with pytest.raises(PassingError):
        train(config, Sources.load(config), run, torch.device("cpu"))


def test_ranks_that_meet_and_cannot_agree_are_the_outcome(prepared: Path, tmp_path: Path) -> None:
    """The folder is open by then."""
    run_ranks(_unconnected, 1, light_config(prepared), tmp_path)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["exit_code"] == ExitCode.CUT_OFF and outcome["reason"].startswith("GLOO_SOCKET_IFNAME: ")
    assert not list(tmp_path.glob("lock-*"))
