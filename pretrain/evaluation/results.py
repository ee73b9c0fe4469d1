"""What an evaluation leaves: a table on the terminal, and a JSON file for each task."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replace_file, write_json
from common.folders import making
from common.tables import text_table
from pretrain.checkpoint.folder import Checkpoint
from pretrain.evaluation.tasks import TASKS, TaskResult

FOLDER = "evaluation"
MOST_GROUPS = 10
"""A task with more groups than this shows their mean alone; the file has all."""


def results_folder(checkpoint: Checkpoint, *, ema: bool = False) -> Path:
    """RUN/evaluation/step-NNNNNNNN for a checkpoint of a run folder; else `evaluation` beside the checkpoint. Results
    of its moving average have a folder of their own."""
    path = checkpoint.path.absolute()
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return run / FOLDER / (path.name + "-ema" * ema)


def write_result(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Writes NAME.json, whole or not at all, in place of an earlier one of the same task; NAME-DIGEST.json where the
    earlier one is of other data, whose folder has the same name. Raises UserError."""
    path = folder / f"{name}.json"
    digest = content.get("digest")
    if digest is not None and _digest(path) not in (None, digest):
        path = folder / f"{name}-{digest[:12]}.json"
    try:
        with making(folder):
            write_json(path, {**content, "time": time.time()})
    except OSError as error:
        raise UserError(f"--out: {error.filename or path} cannot be written: {error.strerror}") from None
    return path


def write_lines(folder: Path, name: str, lines: Sequence[str]) -> Path:
    """Writes NAME.jsonl, whole or not at all, in place of an earlier one. Raises UserError."""
    path = folder / f"{name}.jsonl"
    try:
        with making(folder):
            replace_file(path, (line.encode("utf-8", errors="replace") + b"\n" for line in lines))
    except OSError as error:
        raise UserError(f"--out: {error.filename or path} cannot be written: {error.strerror}") from None
    return path


def _digest(path: Path) -> str | None:
    """Of the data that an earlier result is of; None without one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("digest") if isinstance(found, dict) else None


def described(result: TaskResult) -> dict[str, Any]:
    """A result as JSON."""
    return {
        "task": result.name,
        **result.values,
        "examples": result.examples,
        "groups": result.groups,
        "questions_left_out": result.left_out,
        "texts_cut": result.cut,
    }


def rows_of(result: TaskResult) -> list[tuple[str, ...]]:
    """Rows of the table: task, group, metric, value, examples."""
    rows: list[tuple[str, ...]] = [
        (result.name, "", key, number(value), f"{result.examples:,}") for key, value in result.values.items()
    ]
    if len(result.groups) <= MOST_GROUPS:
        rows += [
            (result.name, name, "accuracy", number(group["accuracy"]), f"{group['examples']:,}")
            for name, group in result.groups.items()
        ]
    return rows


def notes_of(result: TaskResult, context: int) -> list[str]:
    """What one should know about a result."""
    notes, published = [], TASKS[result.name].groups
    if len(result.groups) < published:
        notes.append(
            f"{result.name}: the mean is over {len(result.groups)} of the {published} published files; numbers of "
            f"others are over all"
        )
    if result.cut:
        notes.append(f"{result.name}: {cut_text(result.cut, context)}")
    if result.left_out:
        notes.append(
            f"{result.name}: {result.left_out:,} questions of the files have other than ten candidates and were left "
            f"out"
        )
    return notes


def cut_text(cut: int, context: int) -> str:
    """What one should know of texts that were cut."""
    return (
        f"{cut:,} texts have more than the {context} tokens that the model looks back to; their beginning was cut off "
        f"(--context)"
    )


def number(value: float) -> str:
    """Four decimals, or two for what is large."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    return text_table(("task", "group", "metric", "value", "examples"), rows, left=(0, 1, 2))
