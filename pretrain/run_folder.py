"""The run folder: config.json, metrics.jsonl, events.jsonl, checkpoints/, tensorboard/. Written by rank 0 only."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pretrain.atomic import write_json
from pretrain.errors import UserError


class RunFolder:
    """Creates the folder and appends to its logs; every line is flushed, so a killed run loses none."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """`writes` is true on one rank, which creates the folder and appends; on the others every call is a no-op.
        Raises UserError if the folder cannot be written."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._writes = writes
        if not writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._append("events.jsonl", {"event": "opened", "time": time.time()})
        except OSError as error:
            raise UserError(f"--run-dir: {path} cannot be written: {error.strerror}") from None

    def write_config(self, tree: dict[str, Any]) -> None:
        """config.json: the resolved configuration of the newest start."""
        write_json(self.path / "config.json", tree)

    def event(self, kind: str, **values: Any) -> None:
        """One line of events.jsonl: what happened, when (seconds since the epoch)."""
        self._append("events.jsonl", {"event": kind, "time": time.time(), **values})

    def metrics(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl: exactly one per optimizer step, floats with full precision."""
        self._append("metrics.jsonl", values)

    def make_durable(self) -> None:
        """Brings metrics.jsonl to the disk, so that no committed checkpoint is ahead of it after a power loss."""
        path = self.path / "metrics.jsonl"
        if self._writes and path.exists():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def rewind_metrics(self, step: int) -> None:
        """Moves the lines of steps after `step` to events.jsonl: they will be computed again. A torn last line (the
        machine stopped while writing) is dropped."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept: list[tuple[str, dict[str, Any]]] = []
        superseded: list[tuple[str, dict[str, Any]]] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            (kept if values["step"] <= step else superseded).append((line, values))
        for _, values in superseded:
            self.event("superseded_metrics", metrics=values)
        partial = path.with_name("metrics.jsonl.partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def _append(self, name: str, values: dict[str, Any]) -> None:
        if not self._writes:
            return
        line = json.dumps(values, allow_nan=False) + "\n"
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:  # a full disk
            raise UserError(f"--run-dir: {self.path / name} cannot be written: {error.strerror}") from None
