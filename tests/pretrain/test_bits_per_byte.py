"""Training on bytes: validation also says bits per byte, in the event, TensorBoard and the printed lines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from data_prep.cli import main as data_prep
from tests.harness import run_ranks
from tests.pretrain.runs import small_config
from tests.pretrain.test_checkpoint import train_runs


def prepare_bytes(folder: Path) -> Path:
    """A small file in the format of Enwik8, prepared; returns the folder of the manifest."""
    draw = random.Random(5)
    words = [draw.choice(["the ", "größe ", "[[link]] ", "&amp; ", "\n"]) for _ in range(4000)]
    data = "".join(words).encode()[:12_000]
    (folder / "enwik8").write_bytes(data)
    config = {
        "input": str(folder / "enwik8"),
        "output": str(folder / "bytes"),
        "format": "enwik8",
        "split_bytes": [10_000, 1_000, 1_000],
        "workers": 1,
        "tokenizer": {"type": "bytes"},
    }
    (folder / "data.json").write_text(json.dumps(config))
    assert data_prep(["run", "--config", str(folder / "data.json")]) == 0
    return folder / "bytes"


def test_bits_per_byte_is_the_loss_over_ln_2_and_only_for_bytes(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = ("train.steps=2", "monitor.tensorboard=true")
    config = small_config(prepare_bytes(tmp_path), "model.vocab_size=256", *keys)
    pieces = small_config(prepared, *keys)
    capfd.readouterr()
    run_ranks(train_runs, 1, [(config, tmp_path / "run"), (pieces, tmp_path / "pieces")])
    printed = capfd.readouterr().out.splitlines()

    def validation(run: str) -> dict[str, float]:
        events = [json.loads(line) for line in (tmp_path / run / "events.jsonl").read_text().splitlines()]
        return next(event for event in events if event["event"] == "validation")

    values = validation("run")
    assert values["bits_per_byte"] == pytest.approx(values["loss"] / math.log(2), rel=1e-12)
    assert "bits_per_byte" not in validation("pieces")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (scalar,) = board.Scalars("validation/bits_per_byte")
    assert scalar.step == 2 and scalar.value == pytest.approx(values["bits_per_byte"], rel=1e-6)
    (line,) = [line for line in printed if f"bits per byte {values['bits_per_byte']:.4f}" in line]
    assert line.startswith("validation after step 2: loss")
    (last,) = [line for line in printed if f"({values['bits_per_byte']:.4f} bits per byte)" in line]
    assert last.startswith("validation perplexity")
    assert sum("bits per byte" in line for line in printed) == 2
