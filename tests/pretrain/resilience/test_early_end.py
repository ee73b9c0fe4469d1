"""A start that ends before it has opened its run folder: whoever reads the folder reads of this start."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.device
import pretrain.loop
import pretrain.resilience.guard
from common.errors import PassingError, UserError
from common.paths import REPOSITORY
from common.run_lock import DEAD_SECONDS, FolderLock
from data_prep.shards.format import Manifest
from pretrain.cli.train import main
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.loop import train
from pretrain.parallel.agreement import PeerFailed, agreed
from pretrain.report.alerts import Alerts
from pretrain.report.exit_codes import ExitCode
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.early_end import EarlyEnd
from pretrain.resilience.signals import Stop
from pretrain.views.reading import RunView, State
from tests.harness import run_ranks
from tests.pretrain.report.alert_case import WRITES, calls, command
from tests.pretrain.runs import light_config
from tests.pretrain.views.status_case import CONFIG, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of a start that a signal has stopped."""
    folder = write(tmp_path / "run", exit_code=85, reason="SIGUSR1", step=8, time=1.0)
    (folder / "checkpoints" / "step-00000008").rmdir()
    return folder


def started(run: Path, *settings: str, stop: Stop | None = None) -> int:
    config = REPOSITORY / "configs" / "switchall_tiny.json"
    given = [setting if setting.startswith("--") else f"--set={setting}" for setting in settings]
    return main(["--config", str(config), "--run-dir", str(run), *given], stop)


@pytest.mark.parametrize("setting", ["data.manifest=nowhere", "train.stepz=3"])
def test_what_is_refused_before_the_ranks_meet_is_the_outcome(run: Path, setting: str) -> None:
    names = {path.name for path in run.iterdir()}
    assert started(run, setting) == ExitCode.REFUSED
    view = RunView.open(run)
    assert view.state is State.FAILED and view.outcome["exit_code"] == ExitCode.REFUSED
    assert view.outcome["reason"].startswith(setting.partition("=")[0])
    assert [event["event"] for event in view.events] == ["started", "failed"]
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


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_of_a_folder_ends_no_other_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: str
) -> None:
    """As of a script's variable that is not set: runs/NAME, the default, was not asked for."""
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(run, tmp_path / "runs" / "switchall_tiny")
    config = REPOSITORY / "configs" / "switchall_tiny.json"
    assert main(["--config", str(config), "--run-dir", empty]) == ExitCode.REFUSED
    assert RunView.open(other).outcome == RunView.open(run).outcome


def test_a_run_that_has_diverged_still_says_so(run: Path) -> None:
    before = json.dumps({"exit_code": 3, "reason": "10 updates skipped in a row", "step": 9, "time": 1.0})
    (run / "outcome.json").write_text(before)
    assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    assert (run / "outcome.json").read_text() == before


def test_the_lock_of_a_process_that_is_only_silent_stays_its_own(run: Path) -> None:
    """On another machine, whose processes cannot be seen: a disk that hangs for a minute does not end that run."""
    owner = {"host": "node7", "boot": "b", "namespace": "n", "pid": 1, "start": 1, "token": "t"}
    (run / "lock-3.json").write_text(json.dumps(owner))
    long_ago = time.time() - 2 * DEAD_SECONDS
    os.utime(run / "lock-3.json", (long_ago, long_ago))
    assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    assert json.loads((run / "lock-3.json").read_text()) == owner
    assert RunView.open(run).outcome["exit_code"] == ExitCode.REFUSED


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


def test_a_folder_that_cannot_be_written_adds_no_word(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pretrain.resilience.early_end.append_whole", refuse)
    assert started(run, "data.manifest=nowhere") == ExitCode.REFUSED
    said = capsys.readouterr().err
    assert said.startswith("error: data.manifest: ") and said.count("\n") == 1


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


class Left(BaseException):
    """In place of os._exit."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stop]:
    """One whose process gets SIGTERM while the data are looked at."""
    stop = Stop()

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr("pretrain.resilience.signals.LEAVE_SECONDS", 1e6)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("pretrain.cli.train.preflight", lambda *_, **__: stop._ask("SIGTERM"))
    yield stop
    for thread in threading.enumerate():  # which would have ended a process that has not left
        if isinstance(thread, threading.Timer):
            thread.cancel()
            thread.join()


def test_a_stop_before_the_ranks_have_met_is_the_outcome(run: Path, stop: Stop, prepared: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"exit_code": 5, "reason": "hung", "step": 9, "time": 1.0}))
    with pytest.raises(Left):
        started(run, f"data.manifest={prepared}", stop=stop)
    view = RunView.open(run)
    assert view.state is State.STOPPED and view.outcome["exit_code"] == ExitCode.STOPPED
    assert view.outcome["reason"] == "SIGTERM during start-up: nothing was trained"
    assert view.events[-1]["event"] == "stopped"


def test_a_stop_does_not_replace_why_another_rank_has_refused_the_run(
    run: Path, stop: Stop, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the first rank when another one has left."""

    def refused_elsewhere(*arguments: object, **options: object) -> None:
        (run / "outcome.json").write_text(json.dumps({"exit_code": 2, "reason": "rank 1", "time": 2.0}))
        stop._ask("SIGTERM")

    monkeypatch.setattr("pretrain.cli.train.preflight", refused_elsewhere)
    with pytest.raises(Left):
        started(run, f"data.manifest={prepared}", stop=stop)
    assert RunView.open(run).outcome["reason"] == "rank 1"


def test_an_error_that_nobody_foresaw_is_the_outcome(
    run: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("pretrain.cli.train.preflight", fail)
    with pytest.raises(RuntimeError):
        started(run, f"data.manifest={prepared}")
    outcome = RunView.open(run).outcome
    assert (outcome["exit_code"], outcome["reason"]) == (ExitCode.UNFORESEEN, "RuntimeError('planted')")


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_a_signal_cuts_no_alert_of_how_the_start_ended(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_foreseen: bool
) -> None:
    """The launcher sends SIGTERM as soon as another rank has left, which cannot reach this one either."""
    stop, error = Stop(), pretrain.device.Unreachable("the ranks cannot meet")
    finish = Alerts.finish

    def start(*arguments: object, **options: object) -> torch.device:
        raise error if is_foreseen else RuntimeError("planted")

    def finish_later(alerts: Alerts) -> None:
        stop._ask("SIGTERM")
        finish(alerts)

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr("pretrain.resilience.signals.LEAVE_SECONDS", 1e6)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(pretrain.device, "start", start)
    monkeypatch.setattr(Alerts, "finish", finish_later)
    told = f"monitor.alert_command={command(tmp_path, WRITES, str(tmp_path / 'got'))}"
    with contextlib.nullcontext() if is_foreseen else pytest.raises(RuntimeError):
        assert started(tmp_path / "night", f"data.manifest={prepared}", told, stop=stop) == ExitCode.CUT_OFF
    ((_, given),) = calls(tmp_path / "got")
    assert given["event"]["event"] == "failed"


def test_a_start_that_is_being_ended_opens_no_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the thread of signals tells of it, the ranks may meet: opening the folder removes outcome.json."""

    def waits() -> None:
        raise Left

    monkeypatch.setattr("pretrain.resilience.early_end.wait_for_the_end", waits)
    end = EarlyEnd(run, lambda: None)
    noting = threading.Thread(target=end.note, args=(ExitCode.STOPPED, "SIGTERM"))
    noting.start()
    noting.join()
    with pytest.raises(Left):
        end.open(lambda: RunFolder(run, writes=True))
    with pytest.raises(Left):
        end.close(Stop())
    assert RunView.open(run).outcome["reason"] == "SIGTERM" and not list(run.glob("lock-*"))


def test_an_end_is_noted_while_the_folder_waits_for_the_lock_of_a_lost_node(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stays noted where the folder opens before the process has left."""
    monkeypatch.setattr("pretrain.resilience.early_end.OPENING_SECONDS", 0.0)
    end, is_opening, is_noted = EarlyEnd(run, lambda: None), threading.Event(), threading.Event()

    def opened() -> RunFolder:
        is_opening.set()
        is_noted.wait(120)
        return RunFolder(run, writes=True)

    opening = threading.Thread(target=end.open, args=(opened,))
    opening.start()
    is_opening.wait(60)
    noting = threading.Thread(target=end.note, args=(ExitCode.STOPPED, "SIGTERM"))
    noting.start()
    noting.join(60)
    reason = RunView.open(run).outcome["reason"]
    is_noted.set()
    opening.join()
    view = RunView.open(run)
    assert reason == view.outcome["reason"] == "SIGTERM" and view.state is State.STOPPED
    assert [event["event"] for event in view.events[-2:]] == ["opened", "stopped"] and not list(run.glob("lock-*"))


@pytest.mark.parametrize("wrong", ["data.manifest=nowhere", "train.stepz=3", "train", "monitor.print_every_steps=x"])
def test_what_is_refused_before_the_ranks_meet_is_told(tmp_path: Path, wrong: str) -> None:
    """Of a first start too, which leaves nothing in the run folder."""
    told = f"monitor.alert_command={command(tmp_path, WRITES, str(tmp_path / 'got'))}"
    assert started(tmp_path / "night", wrong, told) == ExitCode.REFUSED
    ((sentence, given),) = calls(tmp_path / "got")
    assert sentence.startswith("run night: failed with exit code 2: ") and given["run"] == str(tmp_path / "night")
    assert not (tmp_path / "night").exists()


def test_where_the_configuration_cannot_be_read_the_saved_one_says_whom_to_tell(run: Path, tmp_path: Path) -> None:
    monitor = {"alert_command": command(tmp_path, WRITES, str(tmp_path / "got"))}
    (run / "config.json").write_text(json.dumps({**CONFIG, "monitor": monitor}))
    assert main(["--config", str(tmp_path / "gone.json"), "--run-dir", str(run)]) == ExitCode.REFUSED
    ((sentence, _),) = calls(tmp_path / "got")
    assert "--config: there is no file" in sentence


def test_nobody_is_told_who_did_not_ask(tmp_path: Path) -> None:
    told = f"monitor.alert_command={command(tmp_path, WRITES, str(tmp_path / 'got'))}"
    assert started(tmp_path / "night", "data.manifest=nowhere", told, 'monitor.alerts=["finished"]') == 2
    assert started(tmp_path / "night", "train.stepz=3", told, "--dry-run") == ExitCode.REFUSED
    assert calls(tmp_path / "got") == []


def _refused(rank: int, config: Config, run: Path) -> None:
    sources = Sources.find(config, lambda error: None, follow_links=False)
    assert sources is not None
    with pytest.raises((UserError, PeerFailed)):
        train(config, sources, run, torch.device("cpu"))


def test_what_the_ranks_refuse_once_they_have_met_is_the_outcome_and_told(
    run: Path, prepared: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    shard = Manifest.load(data).split("train")[1].file  # the second of all files: rank 1's
    (data / shard).write_bytes(b"")
    told = f"monitor.alert_command={command(tmp_path, WRITES, str(tmp_path / 'got'))}"
    run_ranks(_refused, 2, light_config(data, told), run)
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["exit_code"] == ExitCode.REFUSED and shard in outcome["reason"]
    ((_, given),) = calls(tmp_path / "got")
    assert given["event"]["event"] == "failed" and shard in given["event"]["reason"]


def _unconnected(rank: int, config: Config, run: Path) -> None:
    def unreachable(timeout_seconds: float, first_message: Callable[[Any], object]) -> Any:
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


def _unreachable(rank: int, config: Config, run: Path) -> None:
    guard = pretrain.resilience.guard
    identity = guard.process_identity
    # As on another machine each, whose /etc/hosts has its own name beside the loopback.
    guard.process_identity = lambda pid: {**identity(pid), "host": f"node{rank}", "boot": f"boot {rank}"}
    guard.gloo_address = lambda env: None if rank == 0 else "127.0.1.1"
    with pytest.raises(UserError if rank else PeerFailed) as raised:
        train(config, Sources.load(config), run, torch.device("cpu"))
    if rank:
        assert str(raised.value).startswith(
            "GLOO_SOCKET_IFNAME: is not set, and node1 knows itself as 127.0.1.1, where node0 cannot reach it; set it"
        )


def test_a_machine_that_others_cannot_reach_is_refused_before_they_wait_for_it(prepared: Path, tmp_path: Path) -> None:
    run_ranks(_unreachable, 2, light_config(prepared), tmp_path)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["exit_code"] == ExitCode.REFUSED and "node1 knows itself as 127.0.1.1" in outcome["reason"]


def _cut_off(rank: int, config: Config, run: Path) -> None:
    def cut(function: Callable[[], Any]) -> Any:
        if isinstance(found := agreed(function), RunFolder):
            raise torch.distributed.DistNetworkError("Connection closed by peer")
        return found

    pretrain.loop.agreed = cut  # this process ends with the test
    with pytest.raises(RuntimeError):
        train(config, Sources.load(config), run, torch.device("cpu"))


def test_a_rank_that_is_lost_as_the_folder_opens_is_the_outcome_and_leaves_no_lock(
    run: Path, prepared: Path, tmp_path: Path
) -> None:
    told = f"monitor.alert_command={command(tmp_path, WRITES, str(tmp_path / 'got'))}"
    run_ranks(_cut_off, 1, light_config(prepared, told), run)
    assert RunView.open(run).outcome["exit_code"] == ExitCode.CUT_OFF
    assert not list(run.glob("lock-*"))
    assert [given["event"]["event"] for _, given in calls(tmp_path / "got")] == ["failed"]
