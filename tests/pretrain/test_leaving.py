"""A rank that fails alone: NCCL's process group waits for the others when it is left, and they wait for this rank."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from common.errors import PassingError, UserError
from pretrain import device, loop
from pretrain.cli.train import run
from pretrain.config.schema import TrainConfig
from pretrain.config.watching import ResilienceConfig
from pretrain.parallel.agreement import PeerFailed
from pretrain.ranks import Ranks
from pretrain.resilience.guard import Diverged, RankLost, ReplicasDiffer, collective_timeout
from pretrain.resilience.signals import ProcessState, Stop
from tests.harness import LIMIT_SECONDS, forked


def leave(output: Path, error: type[Exception]) -> int:
    """What launch/pretrain.py does with a run that fails at once, in a group that nobody is let go from."""

    def fail(*arguments: object, **options: object) -> None:
        raise error("planted")

    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    loop.train = fail  # type: ignore[assignment]
    device.LEAVE_SECONDS = 0.1
    never = threading.Event()
    dist.destroy_process_group = lambda group=None: never.wait()
    train, resilience = TrainConfig(device="cpu", threads=1), ResilienceConfig()
    config: Any = SimpleNamespace(train=train, resilience=resilience)
    nothing: Any = None
    return run(config, nothing, output.parent / "unused", Ranks(0, 0, 1, 1), Stop())


@pytest.mark.parametrize(
    "error, code, said", [(RuntimeError, 1, "RuntimeError: planted"), (UserError, 2, "error: planted")]
)
def test_a_rank_that_fails_alone_says_why_and_leaves_though_its_group_holds_it(
    tmp_path: Path, error: type[Exception], code: int, said: str
) -> None:
    with forked(leave, tmp_path / "said", error) as process:
        process.join(LIMIT_SECONDS)
        assert process.exitcode == code, (tmp_path / "said").read_text()
    assert (tmp_path / "said").read_text().splitlines()[-1] == said


@pytest.mark.parametrize(
    "error, code, speakers",
    [
        (UserError("planted"), 2, (0, 1)),
        (PassingError("planted"), 7, (0, 1)),
        (PeerFailed(UserError), 2, ()),
        (PeerFailed(PassingError), 7, ()),
        (Diverged("planted"), 3, (0,)),
        (ReplicasDiffer("planted"), 4, (0,)),
        (RankLost("planted"), 7, (0, 1)),  # rank 0 may be the one that is gone
        (dist.DistNetworkError("Connection closed by peer"), 7, (0, 1)),
    ],
    ids=repr,
)
def test_each_rank_ends_with_the_code_of_what_ended_the_run(
    error: Exception,
    code: int,
    speakers: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It leaves its group with that code, and no signal of the launcher changes it any more."""
    config: Any = SimpleNamespace(train=TrainConfig(device="cpu"), resilience=ResilienceConfig())
    for rank in (0, 1):
        stop, start, end, left = Stop(), Mock(), Mock(), []
        monkeypatch.setattr(device, "start", start)
        monkeypatch.setattr(device, "stop", lambda code, stop=stop, left=left: left.append((code, stop.state)))
        monkeypatch.setattr(loop, "train", Mock(side_effect=error))
        nothing: Any = None
        assert run(config, nothing, tmp_path, Ranks(rank, rank, 2, 2), stop, end=end) == code
        assert left == [(code, ProcessState.ENDING)]
        assert start.call_args.kwargs == {"timeout_seconds": collective_timeout(config.resilience)}
        end.close.assert_called_once_with(stop)
        said = capsys.readouterr().err
        assert said.startswith("error: ") == (rank in speakers) and said.count("\n") == (rank in speakers), said
        assert str(error) in said or rank not in speakers


def test_what_the_process_group_says_at_the_end_does_not_change_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As NCCL's does after a fault of the network."""

    def fail() -> None:
        raise dist.DistBackendError("NCCL communicator was aborted")

    monkeypatch.setattr(device, "_left", [])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", fail)
    device.stop(7)
    assert "NCCL communicator was aborted" in capsys.readouterr().err
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers), "nothing ends it later"
    with pytest.raises(dist.DistBackendError):
        device.stop()


def test_a_second_training_in_a_process_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loop over seeds in a notebook makes it. DeepSpeed ended it in its depths: a group that is not registered."""
    monkeypatch.setattr(device, "_left", [])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    device.stop(0)
    with pytest.raises(UserError, match=r"has begun a training before.* of its own, as launch/sweep.py does$"):
        device.start(Ranks(0, 0, 1, 1), TrainConfig(device="cpu"))
