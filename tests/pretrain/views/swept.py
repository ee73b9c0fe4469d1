"""Runs of a sweep, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.strict_json import finite
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
        rows = [row(n, finite(x)) for n, x in enumerate(losses, 1)]
        path = write(folder / run.name, rows, {"train": {"steps": 3}})
        event: dict[str, Any] = {"event": "validation", "split": split, "step": len(losses)}
        event["loss"] = finite(losses[-1] + 0.1) if losses else None
        (path / "events.jsonl").write_text(json.dumps(event) + "\n" if validated and losses else "")
        if code is not None:
            (path / "outcome.json").write_text(json.dumps({"exit_code": code}))
    return Result.read(run, folder, unrecorded, job)
