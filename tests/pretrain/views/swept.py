"""Runs of a sweep, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.views.sweep import Result, SweepRun
from tests.pretrain.views.compared import row, write

RATE = "optimizer.learning_rate"


def result(
    folder: Path,
    value: str,
    losses: list[float] | None = None,
    code: int | None = 0,
    *,
    config: str = "x",
    key: str = RATE,
    validated: bool = True,
    split: str = "validation",
    unrecorded: int | None = None,
    job: str = "",
) -> Result:
    """A run with these training losses, whose validation loss is 0.1 above the last; without losses not begun.
    `code`: of its outcome."""
    run = SweepRun(name=f"{config},{value}", config=config, values={key: value})
    if losses is not None:
        path = write(folder / run.name, [row(n, x) for n, x in enumerate(losses, 1)], {"train": {"steps": 3}})
        event: dict[str, Any] = {"event": "validation", "split": split, "step": len(losses)}
        event["loss"] = losses[-1] + 0.1
        (path / "events.jsonl").write_text(json.dumps(event) + "\n" if validated else "")
        if code is not None:
            (path / "outcome.json").write_text(json.dumps({"exit_code": code}))
    return Result.read(run, folder, unrecorded, job)
