"""The run folder: config.json, metrics.jsonl, events.jsonl, checkpoints/, tensorboard/. Written by rank 0 only."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from pretrain.atomic import write_json
from pretrain.errors import UserError
from pretrain.exit_codes import ExitCode
from pretrain.resilience.lock import FolderLock


class RunFolder:
    """Creates the folder and appends to its logs; every line is flushed, so a killed run loses none."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """`writes` is true on one rank, which creates the folder and appends; on the others every call is a no-op.
        Raises UserError if the folder cannot be written."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.lock: FolderLock | None = None
        self._has_ended = False
        self._writes = writes
        if not writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock = FolderLock(path)
            self._remove_leftovers()
            self._append("events.jsonl", {"event": "opened", "time": time.time(), "process": self.lock.owner})
        except OSError as error:
            if self.lock is not None:
                self.lock.release()
            raise UserError(f"--run-dir: {path} cannot be written: {error.strerror}") from None
        for owner in self.lock.taken_over:
            self.event("lock_taken_over", owner=owner)

    def _remove_leftovers(self) -> None:
        """What a start that was killed did not clean up. A report of a hang is kept, under a name with its time."""
        for pattern in (".seen-by-rank-0-*", ".clock-*", "*.partial", "outcome.json", "ranks/*"):
            for path in self.path.glob(pattern):
                path.unlink()
        hang = self.path / "hang"
        if hang.exists():
            when = time.strftime("%Y%m%dT%H%M%S", time.localtime(hang.stat().st_mtime))
            hang.rename(self.path / f"hang-{when}-{secrets.token_hex(2)}")

    def end(self, code: ExitCode, reason: str, *, step: int | None = None) -> None:
        """outcome.json: how this start ended, also for scripts whose launcher lost the exit code. Gives the folder
        free. May be called from another thread, and more than once: the first counts."""
        if not self._writes or code is ExitCode.FOLDER_LOST or self._has_ended:
            return
        self._has_ended = True
        outcome = {"exit_code": int(code), "reason": reason, "step": step, "time": time.time()}
        try:
            write_json(self.path / "outcome.json", outcome)
        finally:
            if self.lock is not None:
                self.lock.release()

    def losses(self, last_step: int, count: int) -> list[float]:
        """The last `count` finite losses up to step `last_step`, from metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        if not self._writes or not path.exists():
            return []
        found: collections.deque[float] = collections.deque(maxlen=count)
        with open(path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):
                    values = json.loads(line)
                    if values["step"] <= last_step and values["loss"] is not None:
                        found.append(values["loss"])
        return list(found)

    def was_validated(self, step: int) -> bool:
        """Whether events.jsonl holds a validation after `step`."""
        path = self.path / "events.jsonl"
        if not self._writes or not path.exists():
            return False
        with open(path, encoding="utf-8") as file:
            return any('"validation"' in line and f'"step": {step},' in line for line in file)

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
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
