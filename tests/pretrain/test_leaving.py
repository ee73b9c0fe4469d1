"""A rank that fails alone: NCCL's process group waits for the others when it is left, and they wait for this rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain import device

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, threading
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from common.errors import UserError
from pretrain import device, loop
from pretrain.cli.train import run
from pretrain.config.schema import ResilienceConfig, TrainConfig
from pretrain.ranks import Ranks
from pretrain.resilience.signals import Stop


def fail(*arguments):
    raise {error}("planted")


loop.train = fail
device.LEAVE_SECONDS = 0.1
dist.destroy_process_group = threading.Event().wait
config = SimpleNamespace(train=TrainConfig(device="cpu", threads=1), resilience=ResilienceConfig())
sys.exit(run(config, None, Path("unused"), Ranks(0, 0, 1, 1), Stop()))
"""


@pytest.mark.parametrize(
    "error, code, said", [("RuntimeError", 1, "RuntimeError: planted"), ("UserError", 2, "error: planted")]
)
def test_a_rank_that_fails_alone_says_why_and_leaves_though_its_group_holds_it(
    error: str, code: int, said: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(error=error)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == said


def test_what_the_process_group_says_at_the_end_does_not_change_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As NCCL's does after a fault of the network."""

    def fail() -> None:
        raise dist.DistBackendError("NCCL communicator was aborted")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", fail)
    device.stop(7)
    assert "NCCL communicator was aborted" in capsys.readouterr().err
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers), "nothing ends it later"
    with pytest.raises(dist.DistBackendError):
        device.stop()
