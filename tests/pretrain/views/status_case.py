"""Run folders made by hand, of which launch/status.py says what they do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pretrain.views.reading import RunView
from pretrain.views.status import screen

CONFIG = {
    "description": "a test",
    "train": {"steps": 40},
    "batch": {"global_sequences": 4},
    "model": {
        "sequence_length": 8,
        "attention": {"num_experts": 4, "active_experts": 2},
        "feedforward": {"num_experts": 8, "active_experts": 2},
    },
}


def row(step: int, **more: Any) -> dict[str, Any]:
    values = {"step": step, "loss": 5.0 - step / 10, "tokens": 32 * step, "step_seconds": 2.0, **more}
    return {**values, "attention_load_max": 1.5, "feedforward_load_max": 3.0, "feedforward_unused_experts": 2}


def write(folder: Path, steps: int = 10, *, events: list[dict[str, Any]] | None = None, **outcome: Any) -> Path:
    """A run folder by hand."""
    (folder / "checkpoints" / "step-00000008").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row(n + 1)) + "\n" for n in range(steps)))
    events = [{"event": "started", "time": 1.0, "step": 0, "ranks": 2, "last_step": 40}, *(events or [])]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if outcome:
        (folder / "outcome.json").write_text(json.dumps(outcome))
    return folder


def shown(folder: Path, width: int = 100) -> str:
    return screen(RunView.open(folder), width=width, now=time.time())
