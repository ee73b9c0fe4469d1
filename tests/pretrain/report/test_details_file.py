"""details.jsonl of a real run that goes back: each step once, with the choices of all steps since the line before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.pretrain.runs import light_config, train_runs

ROOT = Path(__file__).resolve().parents[3]
KEYS = ("monitor.tensorboard=true", "monitor.details_every_steps=2", "checkpoint.every_steps=3", "train.steps=6")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_goes_back_has_each_line_once(prepared: Path, tmp_path: Path) -> None:
    config = light_config(prepared, *KEYS)
    run_ranks(train_runs, 1, [(config, tmp_path / "whole")])
    run = tmp_path / "back"
    run_ranks(train_runs, 1, [(light_config(prepared, *KEYS, "train.stop_after_steps=5"), run)])
    back = light_config(prepared, *KEYS, f"checkpoint.resume={run / 'checkpoints' / 'step-00000003'}")
    run_ranks(train_runs, 1, [(back, run)])
    whole, again = lines(tmp_path / "whole" / "details.jsonl"), lines(run / "details.jsonl")
    assert [line["step"] for line in whole] == [1, 2, 4, 6] == [line["step"] for line in again]
    assert [line["load_from_step"] for line in whole] == [1, 2, 3, 5]
    assert [line["load_from_step"] for line in again] == [1, 2, 4, 5], "a start counts its own steps"
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.partition("## What the details have")[2].partition("\n## ")[0]
    keys = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert whole[0].keys() == set(re.findall(r"`(\w+)`", "".join(keys)))
    for norms in ("gradient_norm", "parameter_norm", "update_norm"):
        assert [line[norms] for line in whole] == [line[norms] for line in again]
    norm = sum(value**2 for value in whole[-1]["gradient_norm"].values()) ** 0.5
    assert norm == pytest.approx(lines(tmp_path / "whole" / "metrics.jsonl")[-1]["grad_norm"], rel=1e-5)
    tokens = config.batch.global_sequences * config.model.sequence_length
    attention, feedforward = config.model.attention.routers, config.model.feedforward.routers
    assert attention is not None and feedforward is not None
    for line in whole:
        counted = tokens * (line["step"] - line["load_from_step"] + 1)
        assert sum(line["load"]["blocks.0.feedforward"]) == counted * feedforward.active
        heads = line["load"]["blocks.0.attention.value"]
        assert [sum(head) for head in heads] == [counted * attention.active] * config.model.attention.num_heads
