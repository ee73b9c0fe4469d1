"""What a job's log says while a run validates."""

from __future__ import annotations

import contextlib
from pathlib import Path

from common import progress_bar
from pretrain.config.schema import Config
from tests.harness import run_ranks
from tests.pretrain.evaluation import published
from tests.pretrain.runs import light_config, train_runs


def train_where_every_batch_is_long(rank: int, runs: list[tuple[Config, Path]], log: Path) -> None:
    """`train_runs` with what it prints on stderr in a file, and every batch of a validation worth a line."""
    progress_bar.LOG_INTERVAL_SECONDS = 0.0
    with open(log, "a") as file, contextlib.redirect_stderr(file):
        train_runs(rank, runs)


def test_the_first_rank_says_how_far_a_long_validation_is(prepared: Path, tmp_path: Path) -> None:
    """20 windows in two ranks and micro-batches of two: 5 batches of each rank, four in a call."""
    config = light_config(
        prepared,
        "train.steps=1",
        "batch.micro_sequences=2",
        "evaluate.sequences=20",
        "train.ema_decay=0.5",
        "evaluate.ema=true",
        f"evaluate.tasks.lambada={published.lambada(tmp_path)}",
        "model.sequence_length=64",
    )
    log = tmp_path / "log"
    run_ranks(train_where_every_batch_is_long, 2, [(config, tmp_path / "run")], log)
    lines = [
        line.rpartition(" after ")[0] for line in log.read_text().splitlines() if " of " in line and " after " in line
    ]
    assert lines == [
        "validation after step 1: 0 of 5 batches",
        "validation after step 1: 4 of 5 batches",
        "validation of the moving average after step 1: 0 of 5 batches",
        "validation of the moving average after step 1: 4 of 5 batches",
        "lambada after step 1: 0 of 7 texts",
        "lambada after step 1: 7 of 7 texts",
    ]
    assert "\r" not in log.read_text()
