"""A rank that fails alone: NCCL's process group waits for the others when it is left, and they wait for this rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
