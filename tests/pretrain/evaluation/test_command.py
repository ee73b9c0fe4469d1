"""launch/evaluate.py around what it computes: its options, and how each rank of a launcher ends."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from common.errors import PassingError, UserError
from pretrain import device
from pretrain.cli import evaluate_checkpoint as command
from pretrain.cli.evaluate import main
from pretrain.cli.evaluate_checkpoint import Choices
from pretrain.config.schema import TrainConfig
from pretrain.parallel.agreement import PeerFailed
from pretrain.ranks import Ranks


@pytest.fixture
def evaluate_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """In place of all that it computes."""
    computes = Mock(return_value=None)
    monkeypatch.setattr(command, "evaluate_checkpoint", computes)
    return computes


def test_every_option_reaches_the_evaluation(evaluate_checkpoint: Mock) -> None:
    line = "run --tasks validation=other,cbt --harness arc_easy --shots 0 --log-samples --limit 3 --batch 5 --context 7 "
    line += "--data d --out o --ema --device cpu --set evaluate.sequences=4"
    assert main(line.split()) == 0
    choices = Choices(
        wanted={"validation": "other", "cbt": None},
        harness="arc_easy",
        shots=0,
        keeps_samples=True,
        limit=3,
        batch=5,
        context=7,
        data=("d",),
        out=Path("o"),
        overrides=("evaluate.sequences=4",),
        ema=True,
    )
    evaluate_checkpoint.assert_called_once_with(Path("run"), choices, torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shots", "0"], "--shots: is for the tasks of --harness, and there is none"),
        (["--log-samples"], "--log-samples: is for the tasks of --harness, and there is none"),
        (["--harness", "arc_easy", "--set", "model.position.memory_chunks=2"], "--set model.position.memory_chunks: "),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    evaluate_checkpoint: Mock, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}") and not evaluate_checkpoint.called


@pytest.mark.parametrize(
    "ended_by, code, said",
    [
        (None, 0, ""),
        (UserError("planted"), 2, "error: planted\n"),
        (PassingError("planted"), 2, "error: planted\n"),
        (PeerFailed(), 2, ""),  # the other rank has said it
        (device.Unreachable("planted"), 7, "error: planted\n"),
        (dist.DistNetworkError("Connection closed by peer"), 7, "error: "),
        (RuntimeError("planted"), 1, "RuntimeError: planted\n"),
    ],
    ids=repr,
)
def test_each_rank_of_a_launcher_ends_with_the_code_of_what_ended_it(
    evaluate_checkpoint: Mock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended_by: Exception | None,
    code: int,
    said: str,
) -> None:
    """And leaves its group with that code, which a rank that waits for others would never do."""
    place = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_SIZE": 2, "MASTER_ADDR": "::1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    start, stop = Mock(), Mock()
    monkeypatch.setattr(device, "start", start)
    monkeypatch.setattr(device, "stop", stop)
    evaluate_checkpoint.side_effect = ended_by
    assert main(["run", "--device", "cpu"]) == code
    start.assert_called_once_with(Ranks(1, 1, 2, 2), TrainConfig(device="cpu"))
    stop.assert_called_once_with(code)
    printed = capsys.readouterr().err
    assert printed.endswith(said) if code == 1 else printed.startswith(said) and bool(printed) == bool(said)
