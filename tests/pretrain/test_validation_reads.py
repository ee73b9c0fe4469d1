"""How much of the held-out split a validation reads, and has in memory, at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pretrain.evaluate
from model.parallel.context import ParallelContext
from pretrain.cli.evaluate import main
from pretrain.data.sources import Sources
from pretrain.data.windows import Batch, WindowReader
from pretrain.evaluate import evaluate
from tests.pretrain.runs import light_config


class Means:
    """Stands for a model: the loss of a window is the mean of its tokens."""

    def __init__(self) -> None:
        self.module, self.most, self._waiting = torch.nn.Identity(), 0, 0

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        self._waiting -= len(batches)
        return [batch.tokens.float().mean(1) / 7 for batch in batches]

    def was_read(self) -> None:
        self._waiting += 1
        self.most = max(self.most, self._waiting)


@pytest.mark.parametrize("memory", ["model.position.type=rope", "model.position.type=xl"])
def test_a_long_validation_is_read_in_parts(prepared: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step of many micro-batches, and with memory in many steps of a few."""
    config = light_config(prepared, "evaluate.sequences=100", "evaluate.streams=10", "batch.micro_sequences=2", memory)
    reader = Sources.load(config).reader("validation", config)
    read, found = reader.read, []
    for most in (1 << 22, 3 * 2 * 16 + 1):
        model = Means()

        def watched(windows: np.ndarray, model: Means = model) -> tuple[Tensor, Tensor]:
            model.was_read()
            return read(windows)

        monkeypatch.setattr(reader, "read", watched)
        monkeypatch.setattr(pretrain.evaluate, "READ_AT_ONCE", most)
        values = evaluate(model, reader, config, ParallelContext(), torch.device("cpu"))  # type: ignore[arg-type]
        found.append((values, model.most))
    (whole, all_at_once), (parts, few) = found
    assert whole == parts and whole is not None and whole["tokens"] == 1600
    assert all_at_once == 50 and few <= 4 + 3, "those of a call, and those of a read"


def test_a_batch_is_no_larger_than_what_there_is(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it lacks would be computed too, and not counted."""
    read, seen = WindowReader.read, list[int]()

    def watched(reader: WindowReader, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        seen.append(len(windows))
        return read(reader, windows)

    monkeypatch.setattr(WindowReader, "read", watched)
    found = []
    for batch in ("3", "64"):
        assert main([str(trained), "--limit", "3", "--batch", batch, "--out", str(tmp_path / batch)]) == 0
        found.append(json.loads((tmp_path / batch / "validation.json").read_text()))
    assert max(seen) == 3 and found[0]["loss"] == found[1]["loss"] and found[0]["tokens"] == 3 * 16
