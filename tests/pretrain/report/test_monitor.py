"""What a run writes: metrics, TensorBoard, validation, unigram perplexity, expert load."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.shards.format import Manifest
from model.language_model import build_model
from model.parallel.context import ParallelContext
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.checkpoint.loading import load_weights
from pretrain.data.windows import WindowReader
from pretrain.report.event_text import TEXTS
from pretrain.report.monitor import clock, perplexity
from tests.harness import run_ranks
from tests.pretrain.runs import events, light_config, metrics, train_runs

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
METRICS_TABLE = "\n".join(
    row.split("|")[1]
    for row in PAGE.partition("## What a run writes")[2].partition("\n## ")[0].splitlines()
    if row.startswith("| `")
)
"""First column of the table of keys."""


def test_clock_and_perplexity() -> None:
    assert (clock(61), clock(3725), clock(0.4)) == ("1:01", "1:02:05", "0:00")
    assert perplexity(0) == 1 and perplexity(800) == math.inf


def test_a_run_writes_metrics_tensorboard_and_a_layout_free_validation(prepared: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = {}
    for ranks in (1, 3):  # 12 sequences a step; 21 validation windows do not divide evenly
        keys = (
            "train.steps=3",
            "batch.global_sequences=12",
            "batch.micro_sequences=4",
            "evaluate.sequences=21",
            "monitor.tensorboard=true",
            f"monitor.tensorboard_every_steps={ranks}",
            "parallel.zero=3",
            "schedule.shape=constant",
            "model.dropout=0.5",  # in training alone
            "model.attention.expert_dropout=0.5",
            "model.feedforward.expert_dropout=0.5",
        )
        run_dir = tmp_path / str(ranks)
        run_ranks(train_runs, ranks, [(light_config(prepared, *keys), run_dir)])
        rows = metrics(run_dir)
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert rows[-1]["tokens"] == 3 * 12 * 16
        assert [row["lr"] for row in rows] == pytest.approx([0.001, 0.002, 0.003])  # its warm-up
        for row in rows:
            assert {
                "loss",
                "grad_norm",
                "lr",
                "tokens_per_second",
                "auxiliary_loss",
                "memory_bytes",
                "memory_peak_bytes",
                "feedforward_load_max",
                "feedforward_unused_experts",
                "attention_load_max",
                "attention_busiest_share",
                "routing_negative_entropy",
            } <= row.keys()
            assert -math.log(5) <= row["routing_negative_entropy"] <= 0
            documented = set(re.findall(r"`([a-z_/A-Z]+)`", METRICS_TABLE))
            assert row.keys() <= documented, row.keys() - documented
            replayed = {"routing_choices", "routing_flips", "routing_flip_distance"}
            compared = {"slowest_rank", "slowest_rank_behind_seconds"}  # after more steps
            elsewhere = {"loss_scale", "epoch/NAME", "memory_reserved_bytes", *replayed, *compared}
            assert documented - row.keys() == elsewhere
        board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
        tags = set(board.Tags()["scalars"])
        assert {
            "loss/train",
            "optimizer/gradient norm",
            "perplexity/train",
            "optimizer/learning rate",
            "speed/tokens per second",
            "loss/validation",
            "perplexity/validation",
            "routing/feed-forward/load max/block 0",
        } <= tags
        assert [e.step for e in board.Scalars("loss/train")] == {1: [1, 2, 3], 3: [3]}[ranks]
        assert board.Scalars("loss/train")[-1].value == pytest.approx(rows[2]["loss"], rel=1e-6)
        (validation,) = events(run_dir, "validation")
        assert validation["tokens"] == 21 * 16 and validation["unigram_perplexity"] > 1
        losses[ranks] = validation["loss"]
    assert losses[1] == pytest.approx(losses[3], rel=1e-5)

    # The same number from the saved weights in plain PyTorch.
    config = light_config(prepared)
    network = build_model(config.model, seed=99)
    load_weights(Checkpoint.open(list_checkpoints(tmp_path / "1" / "checkpoints")[-1]), network, ParallelContext())
    reader = WindowReader(Manifest.load(prepared), "validation", 16)
    tokens, targets = reader.read(np.arange(21) * reader.num_windows // 21)
    network.eval()
    logits, _ = network.logits(tokens)
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten())
    assert losses[1] == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_the_page_has_every_kind_of_event() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "pretrain").rglob("*.py")]
    told = {kind for text in sources for kind in re.findall(r'\bevent\(\s*"([a-z_]+)"', text)}
    told |= {kind for text in sources for kind in re.findall(r'"event": "([a-z_]+)"', text)}
    table = PAGE.partition("## What an event says")[2].partition("\n## ")[0]
    shown = {
        kind for row in table.splitlines() if row.startswith("| `") for kind in re.findall("`(.*?)`", row.split("|")[1])
    }
    assert shown == told | set(TEXTS)
