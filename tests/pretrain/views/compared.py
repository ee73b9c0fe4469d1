"""Run folders made by hand, to be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.views.comparison import open_runs
from pretrain.views.reading import RunView


def write(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(step: int, loss: float | None, tokens: int = 0, **more: Any) -> dict[str, Any]:
    speed = {"tokens_per_second": 50.0 * step, "flops_per_second": 3000.0 * step}
    return {"step": step, "loss": loss, "tokens": tokens or 100 * step, "grad_norm": 1.0, **speed, **more}


def runs_of(*paths: Path) -> list[Any]:
    return open_runs([RunView.open(path) for path in paths])


def of_mixture(
    folder: Path, validations: dict[int, dict[str, float | None]], *, split: str = "validation", loss: float = 4.0
) -> Path:
    """A run that was validated after these steps, with these losses by source."""
    path = write(folder, [row(step, 5.0) for step in range(1, 9)])
    events = [
        {"event": "validation", "time": 1e9, "step": step, "split": split, "loss": loss}
        | {f"loss/{name}": loss for name, loss in losses.items()}
        for step, losses in validations.items()
    ]
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path
