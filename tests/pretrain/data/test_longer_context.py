"""A run that continues with longer sequences, as at the end of pretraining: what it has read is counted in tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.costs import training_flops_per_token
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.cli.checkpoint import main as checkpoint_command
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.windows import num_windows
from pretrain.resumed_stages import reads_by_end, stages_of
from tests.harness import run_ranks
from tests.pretrain.data.test_stages import FIRST, base, mixed
from tests.pretrain.report.boards import read, steps_of
from tests.pretrain.runs import events, light_config, metrics, train_runs

__all__ = ["base"]
"""The fixture of the data sets."""


def test_tokens_and_epochs_go_on_where_they_were(base: Path, tmp_path: Path) -> None:
    """3 steps of 8 sequences of 16 tokens, then 3 of 4 of 32, with a start between them."""
    run = tmp_path / "run"
    short = mixed(base, FIRST, "train.stop_after_steps=3", ranks=1)
    keys = ("model.sequence_length=32", "batch.global_sequences=4", "batch.micro_sequences=4")
    allowed = 'checkpoint.allow_changes=["model.sequence_length", "batch.global_sequences"]'
    longer = [
        mixed(base, FIRST, *keys, f"train.stop_after_steps={last}", *more) for last, more in ((5, [allowed]), (6, []))
    ]
    for config in (short, *longer):
        run_ranks(train_runs, 1, [(config, run)])
    lines = metrics(run)
    assert [line["tokens"] for line in lines] == [128, 256, 384, 512, 640, 768]

    # 17 and 7 of the first 24 windows are c4's and pes2o's: 272 and 112 tokens, 9 and 4 windows of 32.
    (stage,) = events(run, "data_stage")
    assert [(s["name"], s["read"]) for s in stage["sources"]] == [("c4", 9), ("pes2o", 4)]
    sizes = [num_windows(source.manifest, "train", 32) for source in Sources.load(short).sources]
    read = [round(lines[-1][f"epoch/{name}"] * size, 6) for name, size in zip(FIRST, sizes, strict=True)]
    assert sum(read) == 9 + 4 + 12 and lines[-1]["epoch"] == pytest.approx(25 / sum(sizes))
    assert read[0] == pytest.approx(9 + 0.7 * 12, abs=1)

    newest = list_checkpoints(run / "checkpoints")[-1]
    assert Checkpoint.open(newest).progress.tokens(32) == 768
    assert checkpoint_command(["convert", str(newest), str(tmp_path / "weights")]) == 0
    assert json.loads((tmp_path / "weights" / "weights.json").read_text())["tokens"] == 768


def test_streams_go_on_with_their_epochs_too(prepared: Path, tmp_path: Path) -> None:
    """4 steps of 8 sequences of 16 tokens, then 2 of 32, with a start between them: 32 windows are 16 of twice the
    length. On the terminal and the board, and in what a start says of its epochs."""
    run, allowed = tmp_path / "run", 'checkpoint.allow_changes=["model.sequence_length"]'
    keys = ("data.order=streams", "evaluate.sequences=0")
    longer = ("model.sequence_length=32", allowed)
    configs = [
        light_config(prepared, *keys, "train.stop_after_steps=4"),
        light_config(prepared, *keys, *longer, "train.stop_after_steps=5"),
        light_config(prepared, *keys, *longer, "train.stop_after_steps=6"),
    ]
    for config in configs:
        run_ranks(train_runs, 1, [(config, run)])
    manifest, batch = Sources.load(configs[0]).sources[0].manifest, configs[0].batch.global_sequences
    placed = {length: num_windows(manifest, "train", length) // batch * batch for length in (16, 32)}
    read = [(n * batch, 16) for n in range(1, 5)] + [(2 * batch + batch * n, 32) for n in (1, 2)]
    assert [line["epoch"] for line in metrics(run)] == [pytest.approx(n / placed[length]) for n, length in read]
    checkpoint = Checkpoint.open(list_checkpoints(run / "checkpoints")[-1])
    (stage,) = stages_of(checkpoint, Sources.load(configs[2]), configs[2])[1:]
    steps = configs[2].train.steps
    assert reads_by_end(configs[2], checkpoint, stage) == [2 * batch + (steps - 4) * batch]
    assert not events(run, "data_stage"), "no other data are read"


def test_progress_counts_tokens_over_any_number_of_changes() -> None:
    progress = Progress(2, 16)
    assert progress.tokens(64) == 1024
    longer = progress.in_sequences_of(256, before=64).after_step(4)
    assert longer.tokens(256) == 1024 + 1024
    assert longer.in_sequences_of(32, before=256).after_step(1).tokens(32) == 2048 + 32
    assert Progress.from_json(json.loads(json.dumps(longer.to_json()))) == longer
    assert progress.in_sequences_of(64, before=64) == progress


def test_flops_go_on_where_they_were(base: Path, tmp_path: Path) -> None:
    """Shorter sequences are fewer FLOPs a token: with those alone the run would fall behind itself, and TensorBoard
    hide the points that it has passed."""
    run, board = tmp_path / "run", "monitor.tensorboard=true"
    keys = ("model.sequence_length=64", "batch.global_sequences=2", "batch.micro_sequences=2", board)
    first = mixed(base, FIRST, *keys, "train.stop_after_steps=3")
    allowed = 'checkpoint.allow_changes=["model", "batch"]'
    second = mixed(base, FIRST, "train.stop_after_steps=4", allowed, board, ranks=1)
    for config in (first, second):
        run_ranks(train_runs, 1, [(config, run)])
    rates = [training_flops_per_token(config.model) for config in (first, second)]
    assert rates[0] > rates[1]
    progress = Checkpoint.open(list_checkpoints(run / "checkpoints")[-1]).progress
    assert progress.tokens(16) * rates[1] + progress.extra_flops == 384 * rates[0] + 128 * rates[1]
    points = [n * 128 * rates[0] for n in (1, 2, 3)] + [384 * rates[0] + 128 * rates[1]]
    found = read(run / "tensorboard" / "against MFLOP")
    assert steps_of(found, "loss against MFLOP/train") == [flops // 10**6 for flops in points]
